"""The exceptions: their bases, what they carry, how they read, and that they survive a pickle."""

from __future__ import annotations

import pickle
import subprocess
import sys
from concurrent.futures import BrokenExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pytest

from distpool import errors
from distpool.errors import (
    AuthenticationError,
    CapturedException,
    ChannelClosedError,
    CompositeException,
    DistpoolError,
    LaunchWorkerError,
    ProcessExitedException,
    ProtocolError,
    RemoteException,
    SerializationError,
    TopologyError,
    UnreachableError,
    VersionMismatchError,
    cause_of,
    set_cause,
    traceback_of,
)

BASES: list[tuple[type[BaseException], type[BaseException]]] = [
    (RemoteException, DistpoolError),
    (ProcessExitedException, BrokenProcessPool),
    (ProcessExitedException, BrokenExecutor),
    (SerializationError, pickle.PicklingError),
    (ChannelClosedError, RuntimeError),
    (TopologyError, RuntimeError),
    (LaunchWorkerError, RuntimeError),
    (AuthenticationError, ConnectionError),
    (VersionMismatchError, ConnectionError),
    (ProtocolError, ConnectionError),
    (UnreachableError, TopologyError),
    (UnreachableError, ConnectionError),
    (CompositeException, ExceptionGroup),
]


@pytest.mark.parametrize("kind, base", BASES, ids=lambda kind: kind.__name__)
def test_bases(kind: type[BaseException], base: type[BaseException]) -> None:
    assert issubclass(kind, base) and issubclass(kind, DistpoolError) and issubclass(kind, Exception)


def test_every_error_is_listed_and_says_what_it_is() -> None:
    for name in errors.__all__:
        kind = getattr(errors, name)
        assert kind.__doc__ and kind.__module__ == "distpool.errors" and kind.__name__ == name
    with pytest.raises(AttributeError, match="Nonsense"):
        errors.Nonsense  # type: ignore[attr-defined]


EXAMPLES: list[BaseException] = [
    UnreachableError("process 2 and process 3 cannot be connected"),
    RemoteException(3, CapturedException(ValueError("x"), "Traceback: x")),
    ProcessExitedException(4, -9, False, "last\nwords", "because"),
    ProcessExitedException(4),
    SerializationError("a lock"),
    ChannelClosedError("closed"),
    TopologyError("peer 3 is not connected to 2"),
    LaunchWorkerError("host", "its output", "no python"),
    AuthenticationError("no cookie"),
    VersionMismatchError("3.11 and 3.12"),
    ProtocolError("garbage"),
    CompositeException([ValueError("a"), KeyError("b")]),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("protocol", [2, 5])
def test_pickle(error: BaseException, protocol: int) -> None:
    copy = pickle.loads(pickle.dumps(error, protocol))
    assert type(copy) is type(error) and str(copy) == str(error)
    for name in ("worker_id", "exitcode", "maybe_ran", "output", "reason", "host", "pid"):
        assert getattr(copy, name, None) == getattr(error, name, None)


def test_process_exited() -> None:
    killed = ProcessExitedException(7, -9, True, "l1\nl2")
    assert (killed.worker_id, killed.exitcode, killed.maybe_ran, killed.output) == (7, -9, True, "l1\nl2")
    assert "worker 7" in str(killed) and "signal 9" in str(killed) and "l1\nl2" in str(killed)
    assert "exit code 3" in str(ProcessExitedException(7, 3))
    assert "not started" in str(ProcessExitedException(7, 3, False)) and "not started" not in str(killed)
    assert "memory" in str(ProcessExitedException(7, -9, True, "", "over its memory limit"))
    assert str(ProcessExitedException(7)) == "worker 7 exited"


def test_remote_exception() -> None:
    original = ValueError("deep")
    error = RemoteException(5, CapturedException(original, "Traceback (most recent call last):\nValueError: deep\n"))
    assert error.pid == 5 and error.captured.ex is original and error.__cause__ is original
    assert str(error).startswith("On worker 5:\n") and "ValueError: deep" in str(error)
    bare = RemoteException(2, original)
    assert bare.captured.ex is original and "ValueError: deep" in str(bare)
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy.captured.ex, ValueError) and copy.captured.traceback == error.captured.traceback


def test_composite() -> None:
    parts = [ValueError("a"), KeyError("b"), ValueError("c")]
    error = CompositeException(parts)
    assert len(error) == 3 and list(error) == parts and error.exceptions == tuple(parts) and error
    assert "ValueError: a (and 2 more)" in str(error)
    seen: list[Any] = []
    try:
        raise error
    except* ValueError as group:
        seen += group.exceptions
        assert isinstance(group, CompositeException)
    except* KeyError as group:
        seen += group.exceptions
    assert sorted(map(str, seen)) == sorted(map(str, parts))
    copy = pickle.loads(pickle.dumps(error))
    assert [type(one) for one in copy] == [ValueError, KeyError, ValueError]


def test_launch_error_says_where_and_why() -> None:
    text = str(LaunchWorkerError("node7", "bash: python: not found", "exit code 127"))
    assert "node7" in text and "exit code 127" in text and "not found" in text


def test_the_module_does_not_load_the_process_pool() -> None:
    code = "import sys, distpool.errors; print('concurrent.futures.process' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.stdout == "False\n"


def test_a_composite_of_nothing_is_refused_as_any_group() -> None:
    with pytest.raises(ValueError, match="non-empty"):
        CompositeException([])


class Labelled(RemoteException):
    """A subclass with a constructor of its own."""

    def __init__(self, label: str) -> None:
        super().__init__(3, ValueError(label))
        self.label = label


class Group(CompositeException):
    pass


@pytest.mark.parametrize("protocol", [2, 5])
def test_notes_and_subclasses_outlive_pickling(protocol: int) -> None:
    remote = RemoteException(3, CapturedException(ValueError("deep"), "its traceback"))
    group = CompositeException([remote, KeyError("b")])
    for error in (remote, group):
        error.add_note("in the third round")
    copy = pickle.loads(pickle.dumps(group, protocol))
    assert copy.__notes__ == copy.exceptions[0].__notes__ == ["in the third round"]
    assert copy.message == group.message and str(copy.exceptions[0]) == str(remote)
    assert type(copy.exceptions[0].__cause__) is ValueError

    labelled = Labelled("x")
    labelled.add_note("noted")
    copy = pickle.loads(pickle.dumps(labelled, protocol))
    assert type(copy) is Labelled and (copy.label, copy.pid, str(copy)) == ("x", 3, str(labelled))
    assert copy.__notes__ == ["noted"] and type(copy.captured.ex) is ValueError
    group = pickle.loads(pickle.dumps(Group([labelled], "two of them"), protocol))
    assert type(group) is Group and group.message == "two of them" and type(group.exceptions[0]) is Labelled


class Touchy(Exception):
    """Refuses to be looked at."""

    def __getattribute__(self, name: str) -> Any:
        raise LookupError(name)


def test_what_an_error_consists_of_is_known_without_its_class() -> None:
    error, cause = Touchy(), ValueError()
    assert cause_of(error) is None and traceback_of(error) is None
    set_cause(error, cause)
    assert cause_of(error) is cause
    try:
        raise error
    except Touchy:
        assert traceback_of(error).tb_next is None
