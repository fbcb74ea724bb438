"""wire/failures: exceptions to bytes and back, whatever their classes do."""

from __future__ import annotations

import dataclasses
import multiprocessing.pool
import pickle
import threading
import traceback
import weakref
from concurrent.futures.process import _RemoteTraceback

import pytest

from distpool.errors import (
    CapturedException,
    CompositeException,
    DistpoolError,
    ProcessExitedException,
    RemoteException,
    SerializationError,
    cause_of,
)
from distpool.wire import codec, failures


class Plain(Exception):
    pass


class OtherArguments(Exception):
    def __init__(self, code, reason):
        super().__init__(f"{code}: {reason}")


class WithLock(Exception):
    def __init__(self, text):
        super().__init__(text)
        self.lock = threading.Lock()


class RaisingReduce(Exception):
    def __reduce__(self):
        raise ValueError("no reduce today")


class ExitingReduce(Exception):
    def __reduce__(self):
        raise SystemExit(3)


class RaisingLoad(Exception):
    def __setstate__(self, state):
        raise OSError("no state today")


class ExitingLoad(Exception):
    def __reduce__(self):
        return exit_now, ()


class InterruptedLoad(Exception):
    def __setstate__(self, state):
        raise KeyboardInterrupt


def exit_now():
    raise SystemExit(4)


class NotAnException(Exception):
    def __reduce__(self):
        return list, ()


class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no text")

    __repr__ = __str__


class Guarded(Exception):
    def __setattr__(self, name, value):
        raise AttributeError(f"{name} is read-only")


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    code: int


def raised(error, cause=None):
    """The error as a task leaves it: with a traceback of more than one frame."""

    def inner():
        raise error from cause

    try:
        inner()
    except BaseException as caught:
        return caught


def roundtrip(error, **options):
    return failures.decode_exception(failures.encode_exception(error), **options)


@pytest.mark.parametrize(
    "error",
    [Plain("foobar"), KeyError("k"), SystemExit(3), KeyboardInterrupt(), ValueError(), OSError(2, "No such file", "f")],
)
def test_the_original_comes_back_with_the_remote_traceback_as_its_cause(error):
    back = roundtrip(raised(error), pid=2)
    assert type(back) is type(error) and back.args == error.args and str(back) == str(error)
    cause = back.__cause__
    assert type(cause) is _RemoteTraceback
    assert cause.tb.startswith('\n"""\nTraceback (most recent call last):\n') and cause.tb.endswith('"""')
    assert "in inner" in cause.tb and __file__ in cause.tb and "raise error from cause" in cause.tb


def test_the_text_is_what_the_standard_library_would_have():
    from concurrent.futures.process import _ExceptionWithTraceback

    error = raised(Plain("x"), raised(ValueError("first")))
    assert roundtrip(error).__cause__.tb == _ExceptionWithTraceback(error, error.__traceback__).tb


def test_the_kind_of_cause_is_the_callers():
    back = roundtrip(raised(Plain("x")), cause=multiprocessing.pool.RemoteTraceback)
    assert type(back.__cause__) is multiprocessing.pool.RemoteTraceback
    assert "Plain: x" in back.__cause__.tb


def test_chained_errors_are_in_the_text():
    error = raised(Plain("outer"), raised(ValueError("the inner cause")))
    text = roundtrip(error).__cause__.tb
    assert "ValueError: the inner cause" in text and "direct cause" in text
    try:
        try:
            raise KeyError("context")
        except KeyError:
            raise Plain("outer")
    except Plain as caught:
        assert "KeyError: 'context'" in roundtrip(caught).__cause__.tb


def test_attributes_and_notes_travel():
    error = Plain("x")
    error.code = 7
    error.add_note("remember this")
    back = roundtrip(raised(error))
    assert back.code == 7 and back.__notes__ == ["remember this"]
    assert "remember this" in back.__cause__.tb


def test_groups_travel():
    back = roundtrip(raised(ExceptionGroup("several", [Plain("one"), KeyError("two")])))
    assert [type(inner) for inner in back.exceptions] == [Plain, KeyError]
    back = roundtrip(CompositeException([Plain("one"), RemoteException(3, Plain("two"))]))
    assert len(back) == 2 and back.exceptions[1].pid == 3


def test_errors_of_distpool_come_back_as_themselves():
    error = ProcessExitedException(4, -9, False, "last words")
    back = roundtrip(raised(error))
    assert (back.worker_id, back.exitcode, back.maybe_ran, back.output) == (4, -9, False, "last words")
    assert type(roundtrip(SerializationError("text"))) is SerializationError


def test_nested_remote_exceptions_keep_both_pids_and_texts():
    inner = raised(RemoteException(3, failures.captured(failures.encode_exception(raised(Plain("deep"))))))
    outer = RemoteException(2, failures.captured(failures.encode_exception(inner)))
    assert outer.pid == 2 and outer.captured.ex.pid == 3 and type(outer.captured.ex.captured.ex) is Plain
    assert "On worker 2:" in str(outer) and "On worker 3:" in str(outer) and "Plain: deep" in str(outer)
    assert "On worker 3:" in "".join(traceback.format_exception(outer))


def test_frames_of_the_task_runner_are_left_out():
    def runner():
        return user_code()

    def user_code():
        raise Plain("x")

    try:
        runner()
    except Plain as caught:
        error = caught
    assert "runner" in roundtrip(error).__cause__.tb
    info = failures.failure_info(failures.encode_exception(error, skip_frames=2))
    assert "in runner" not in info.traceback and "in user_code" in info.traceback
    # The last frame stays, whatever is asked for: an error of the runner itself must be found.
    info = failures.failure_info(failures.encode_exception(error, skip_frames=99))
    assert "in user_code" in info.traceback


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OtherArguments(5, "because"), "TypeError"),
        (WithLock("locked"), "cannot pickle '_thread.lock'"),
        (RaisingReduce("x"), "ValueError: no reduce today"),
        (ExitingReduce("x"), "SystemExit: 3"),
        (ExitingLoad("x"), "SystemExit: 4"),
        (NotAnException("x"), "an object of type list"),
    ],
)
def test_what_cannot_be_rebuilt_says_so_and_keeps_its_text(error, reason):
    data = failures.encode_exception(raised(error))
    back = failures.decode_exception(data, pid=5)
    assert type(back) is RemoteException and back.pid == 5
    name = f"{__name__}.{type(error).__name__}"
    for text in (str(back), back.captured.traceback):
        assert f"{name} could not be rebuilt here: " in text and reason in text
        assert "in inner" in text and f"{type(error).__name__}: {error}" in text
    assert type(back.captured.ex) is DistpoolError and name in str(back.captured.ex)
    assert str(error) in str(back.captured.ex)
    assert back.__cause__ is back.captured.ex
    captured = failures.captured(data)
    assert type(captured.ex) is DistpoolError and captured.traceback == back.captured.traceback
    # It travels on (from worker to worker).
    assert roundtrip(back).captured.traceback == back.captured.traceback


def test_a_state_that_cannot_be_loaded():
    error = RaisingLoad("x")
    error.attribute = 1
    assert "OSError: no state today" in str(roundtrip(raised(error)))


@pytest.mark.parametrize("decode", [failures.decode_exception, failures.captured])
def test_an_interrupt_while_it_is_rebuilt_is_the_callers(decode):
    error = InterruptedLoad()
    error.state = 1
    data = failures.encode_exception(error)
    with pytest.raises(KeyboardInterrupt):
        decode(data)
    passed_on = failures.failure_info(failures.pass_on(data, 2, []))  # to somebody who waits for it
    assert passed_on.payload is None and passed_on.reason.endswith("KeyboardInterrupt: ")


def test_a_class_that_is_unknown_here():
    data = failures.encode_exception(raised(Plain("the message")))
    back = failures.decode_exception(data.replace(b"test_failures", b"best_failures"), 2)
    assert type(back) is RemoteException
    assert "best_failures.Plain" in str(back) and "the message" in str(back)
    assert "ModuleNotFoundError" in str(back) and "in inner" in str(back)


def test_an_exception_without_text():
    back = roundtrip(raised(Mute("x")))
    assert type(back) is Mute
    assert "Mute" in back.__cause__.tb
    error = Mute("x")
    error.lock = threading.Lock()
    back = roundtrip(raised(error))
    assert type(back) is RemoteException and "Mute" in str(back)


def test_classes_that_guard_their_attributes():
    back = roundtrip(raised(Guarded(3)))
    assert type(back) is Guarded and type(back.__cause__) is _RemoteTraceback
    # Its state cannot be set by anybody, pickle included.
    assert "FrozenInstanceError" in str(roundtrip(raised(Frozen(3))))


class NoCause(Exception):
    __cause__ = property(lambda self: 1 // 0)


class Touchy(Exception):
    def __getattribute__(self, name):
        raise LookupError(name)


def test_classes_that_refuse_to_be_looked_at():
    back = roundtrip(raised(NoCause("x")))
    assert type(back) is NoCause and "NoCause" in cause_of(back).tb
    failures.let_go(raised(Touchy("x")))
    back = roundtrip(raised(Touchy("why")))
    assert type(back) is RemoteException and "Touchy: why" in str(back)


def test_an_exception_that_was_never_raised():
    assert "ValueError: x" in roundtrip(ValueError("x")).__cause__.tb


class Falsy(Exception):
    def __bool__(self):
        raise ValueError("neither true nor false")


def test_an_error_that_cannot_be_formatted():
    # `traceback` of 3.11 asks for the truth of what it formats.
    assert "Falsy" in failures.traceback_text(Falsy("why"))


def test_endless_recursion():
    def deeper():
        deeper()

    try:
        deeper()
    except RecursionError as caught:
        back = roundtrip(caught)
    assert type(back) is RecursionError and len(back.__cause__.tb) < 10_000


def test_captured_has_the_error_and_the_text_apart():
    captured = failures.captured(failures.encode_exception(raised(Plain("x"))))
    assert type(captured) is CapturedException and type(captured.ex) is Plain
    assert captured.ex.__cause__ is None
    assert captured.traceback.startswith("Traceback") and captured.traceback.rstrip().endswith("Plain: x")
    wrapper = RemoteException(2, captured)
    assert str(wrapper).startswith("On worker 2:\nTraceback") and "Plain: x" in str(wrapper)
    assert pickle.loads(pickle.dumps(wrapper)).captured.traceback == captured.traceback


def test_the_parts_can_be_read_without_rebuilding():
    info = failures.failure_info(failures.encode_exception(raised(ExitingLoad("x"))))
    assert (info.type_name, info.message) == (f"{__name__}.ExitingLoad", "x")
    assert "in inner" in info.traceback and isinstance(info.payload, bytes) and info.reason == ""
    assert failures.failure_info(failures.encode_exception(KeyError(1))).type_name == "KeyError"


class Reference:
    pass


def test_references_in_an_error_are_reported():
    codec.register_reducer(Reference, lambda reference, peer: (str, (f"peer {peer}",)))
    try:
        reference = Reference()
        seen = []
        data = failures.encode_exception(Plain(reference), 4, seen=seen)
        assert seen == [reference]
        assert failures.decode_exception(data).args == ("peer 4",)
        seen = ["kept"]
        failures.encode_exception(Plain(reference, threading.Lock()), 4, seen=seen)
        assert seen == ["kept"]
    finally:
        codec.unregister_reducer(Reference)


@pytest.mark.parametrize("kind, kept", [(MemoryError, False), (ValueError, True)])
def test_what_has_used_up_the_memory_is_let_go(kind: type[Exception], kept: bool) -> None:
    class Big:
        pass

    seen = []

    def fill():
        held = Big()
        seen.append(weakref.ref(held))
        raise kind("no more")

    try:
        fill()
    except kind as error:
        data = failures.encode_exception(error)
        assert (seen[0]() is not None) is kept
    assert "in fill" in failures.failure_info(data).traceback


class Silent(type):
    """A metaclass that does not say what its classes are called."""

    def __getattribute__(cls, name):
        if name in ("__name__", "__qualname__", "__module__"):
            raise RuntimeError("no names today")
        return type.__getattribute__(cls, name)


class OfSilent(Exception, metaclass=Silent):
    pass


class Unsendable(str):
    def __reduce__(self):
        raise TypeError("not this one")


class StrangeText(Exception):
    def __str__(self):
        return Unsendable("strange")


def test_classes_that_do_not_tell_their_names() -> None:
    """Seen: whoever encoded the error was ended by it, on a worker the process."""
    data = failures.encode_exception(OfSilent("text"))
    info = failures.failure_info(data)
    assert info.type_name == f"{__name__}.OfSilent" and info.message == "text"
    assert isinstance(failures.decode_exception(data), Exception)


def test_a_text_of_a_class_of_its_own() -> None:
    info = failures.failure_info(failures.encode_exception(StrangeText()))
    assert type(info.message) is str and info.message == "strange"
