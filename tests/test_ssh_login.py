"""One login as the master sees it, with a client that is a pair of queues."""

from __future__ import annotations

import errno
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from distpool import LaunchWorkerError, VersionMismatchError, WorkerConfig
from distpool.managers import ssh_login
from distpool.managers.login_protocol import MARK, LoginSettings, pack_event
from distpool.managers.ssh_client import LoginError
from distpool.managers.ssh_login import HostLogin, Order, RemoteProcess, explain


class FakeSession:
    """A command that prints what the test says."""

    def __init__(self) -> None:
        self.output: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.errors: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.written = b""
        self.exit_status: int | None = 0
        self.heard = threading.Condition()

    def say(self, data: bytes) -> None:
        self.output.put(data)

    def read(self, size: int) -> bytes:
        return self.output.get()

    def read_errors(self, size: int) -> bytes:
        return self.errors.get()

    def write(self, data: bytes) -> None:
        with self.heard:
            self.written += data
            self.heard.notify_all()

    def wait_for(self, text: bytes) -> None:
        with self.heard:
            assert self.heard.wait_for(lambda: text in self.written, 10), self.written

    def status(self, timeout: float) -> int | None:
        return self.exit_status

    def close(self) -> None:
        self.end(b"")

    def end(self, errors: bytes = b"") -> None:
        if errors:
            self.errors.put(errors)
        self.errors.put(b"")
        self.output.put(b"")


class FakeConnection:
    def __init__(self, session: FakeSession) -> None:
        self.session = session
        self.closed = 0
        self.forgotten = 0
        self.explanation = ""

    def run(self, command: str, deadline: float) -> FakeSession:
        self.session.written += f"[{command}]".encode()
        return self.session

    def dial(self, host: str, port: int, deadline: float) -> Any:
        return host, port

    def explain(self, status: int | None, errors: str) -> str:
        return self.explanation

    def close(self) -> None:
        self.closed += 1
        self.session.end()

    def forget(self) -> None:
        self.forgotten += 1


class Bench:
    """A login and all that it reports."""

    def __init__(self, connect: Callable[[float], Any] | None = None, **settings: Any) -> None:
        self.session = FakeSession()
        self.connection = FakeConnection(self.session)
        self.workers: queue.SimpleQueue[WorkerConfig] = queue.SimpleQueue()
        self.settled: queue.SimpleQueue[list[LaunchWorkerError]] = queue.SimpleQueue()
        self.over = threading.Event()
        self.login = HostLogin(
            "node1",
            LoginSettings(**{"cookie": "c", **settings}),
            connect or (lambda deadline: self.connection),
            lambda: Order("command", b"feed", lambda digest: f"<{digest}>".encode()),
            lambda login, process: WorkerConfig(process=process, userdata=login),
            self.workers.put,
            self.settled.put,
        )
        self.login.begin(time.monotonic() + 30, self.over.set)

    def worker(self, number: int = 0, port: int = 5) -> RemoteProcess:
        self.session.say(pack_event(worker=number, ospid=1000 + number, host="10.0.0.1", port=port, tls=True))
        process: RemoteProcess = self.workers.get(timeout=10).process
        return process

    def begin(self) -> None:
        self.session.say(b"Welcome\n" + MARK + pack_event(address="10.0.0.1", cpus=3))

    def finish(self) -> None:
        self.login.close()
        assert self.over.wait(10)


@pytest.fixture
def bench() -> Any:
    made: list[Bench] = []

    def make(*arguments: Any, **settings: Any) -> Bench:
        made.append(Bench(*arguments, **settings))
        return made[-1]

    yield make
    for one in made:
        one.finish()
        while not one.workers.empty():
            os.close(one.workers.get().process.output)


def read(process: RemoteProcess) -> bytes:
    with open(process.output, "rb") as stream:
        return stream.read()


def test_from_the_order_to_the_exit_status(bench: Any) -> None:
    one = bench(count=2)
    one.begin()
    first, second = one.worker(0, 5), one.worker(1, 6)
    assert one.settled.get(timeout=10) == []
    one.session.wait_for(b"[command]feed" + one.login.settings.to_line())
    assert first.address == ("tcp", "10.0.0.1", 5) and first.ospid == 1000 and first.encrypted and not first.is_here
    codes: queue.SimpleQueue[Any] = queue.SimpleQueue()
    second.add_exit_callback(codes.put)
    one.session.say(pack_event(b"one\n", output=1) + pack_event(b"lost", output=9) + pack_event(b"two\n", output=1))
    one.session.say(pack_event(exited=1, status=-11))
    assert read(second) == b"one\ntwo\n" and codes.get(timeout=10) == -11
    one.session.say(pack_event(exited=0, status=0))
    assert read(first) == b"" and not first.gone.wait(0) or first.gone.wait(10)


def test_auto_is_what_the_host_says(bench: Any) -> None:
    one = bench(count="auto")
    one.begin()
    for number in range(3):
        assert one.settled.empty()
        os.close(one.worker(number).output)
    assert one.settled.get(timeout=10) == []


def test_one_worker_less(bench: Any) -> None:
    one = bench(count=2)
    one.begin()
    one.session.say(pack_event(problem="no address"))
    os.close(one.worker(1).output)
    (error,) = one.settled.get(timeout=10)
    assert (error.host, error.reason) == ("node1", "no address")
    assert not one.login._closed, "the other one lives"


def test_the_login_ends_and_with_it_its_workers(bench: Any) -> None:
    one = bench()
    one.begin()
    process = one.worker()
    assert one.settled.get(timeout=10) == []
    codes: queue.SimpleQueue[Any] = queue.SimpleQueue()
    process.add_exit_callback(codes.put)
    one.session.end()
    assert codes.get(timeout=10) is None and one.over.wait(10) and read(process) == b""
    assert one.settled.empty(), "settled once"
    assert one.connection.closed == 1
    with pytest.raises(ConnectionError, match="the login to node1 has ended"):
        one.login.dial("10.0.0.1", 5, 1.0)


@pytest.mark.parametrize(
    ("output", "errors", "status", "reason"),
    [
        (b"hello\n", b"sh: python: not found\n", 127, "no Python is found there"),
        (b"", b"No module named distpool\n", 1, "distpool is not installed"),
        (b"", b"ModuleNotFoundError: No module named 'cloudpickle'\n", 1, "a module is missing for the Python there"),
        (b"", b"OSError: [Errno 28] No space left on device\n", 1, "its disk is full"),
        (b"", b"sh: /x: Permission denied\n", 126, "may not be executed"),
        (b"bye\n", b"", 3, "exit code 3"),
        (b"", b"", None, "the connection was lost, or a signal ended it"),
        (MARK + b"nonsense\n", b"", 0, "does a terminal or a program repeat its input?"),
        (b"x\n" * 1002, b"", 0, "more than 1000 lines"),
    ],
)
def test_why_there_are_no_workers(bench: Any, output: bytes, errors: bytes, status: Any, reason: str) -> None:
    one = bench()
    one.session.exit_status = status
    one.session.say(output) if output else None
    one.session.end(errors)
    (error,) = one.settled.get(timeout=10)
    assert reason in error.reason and error.host == "node1"
    for line in (output + errors).decode().splitlines()[-2:]:
        assert line in error.output or line.startswith(MARK.decode())
    assert one.over.wait(10) and one.workers.empty()


def test_a_login_that_repeats_its_input_shows_no_secrets(bench: Any) -> None:
    key = "-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMGByqGSM49\n-----END PRIVATE KEY-----\n"
    one = bench(cookie="0123456789abcdef", tls={"certificate": "x", "key": key})
    one.session.say(one.login.settings.to_line())
    one.session.end(b"sh: 0123456789abcdef: not found\n")
    (error,) = one.settled.get(timeout=10)
    assert "BEGIN PRIVATE KEY" in error.output and "sh: <secret>: not found" in error.output
    assert not any(piece in str(error) + error.output for piece in one.login.settings.secrets())


def test_the_client_may_know_better(bench: Any) -> None:
    one = bench()
    one.connection.explanation = "the cable is out"
    one.session.end(b"No module named distpool\n")
    assert one.settled.get(timeout=10)[0].reason == "the cable is out"


@pytest.mark.parametrize(
    ("error", "reason"),
    [(LoginError("no such host", "said"), "no such host"), (ZeroDivisionError("oops"), "ZeroDivisionError: oops")],
)
def test_no_login(bench: Any, error: Exception, reason: str) -> None:
    def connect(deadline: float) -> Any:
        raise error

    (found,) = bench(connect).settled.get(timeout=10)
    assert found.reason == reason


# -- time is up --------------------------------------------------------------------------------------------------


def test_the_login_does_not_come_about(bench: Any) -> None:
    go_on = threading.Event()
    closed = threading.Event()

    def connect(deadline: float) -> Any:
        go_on.wait(20)
        connection = FakeConnection(FakeSession())
        connection.close = closed.set  # type: ignore[method-assign]
        return connection

    one = bench(connect)
    one.login.expire(3)
    assert one.settled.get(timeout=10)[0].reason == "the login did not come about within 3 seconds"
    one.login.close()
    go_on.set()
    assert one.over.wait(10) and one.settled.empty()
    assert closed.is_set(), "the login that came too late is not kept"


def test_no_worker_reports(bench: Any) -> None:
    one = bench()
    one.session.say(b"password?\n")
    one.session.wait_for(b"feed")
    deadline = time.monotonic() + 10
    while not one.login._events.seen and time.monotonic() < deadline:
        time.sleep(0.01)
    one.login.expire(3)
    (error,) = one.settled.get(timeout=10)
    assert "no worker reported within 3 seconds" in error.reason and error.output == "password?"
    assert one.over.wait(10) and one.connection.closed == 1


def test_one_of_two_does_not_report(bench: Any) -> None:
    one = bench(count=2)
    one.begin()
    process = one.worker()
    one.login.expire(3)
    (error,) = one.settled.get(timeout=10)
    assert "its workers did not start within 3 seconds" in error.reason
    assert not one.connection.closed, "the other one lives"
    os.close(process.output)


# -- signals and the end -----------------------------------------------------------------------------------------


def test_signals_go_through_the_login(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = bench()
    one.begin()
    process = one.worker()
    process.kill(signal.SIGTERM)
    one.session.wait_for(b'{"kill": 0, "signal": 15}\n')
    assert not process.exited
    # A host that says nothing any more: whoever waits for the end of the worker does not wait for ever.
    monkeypatch.setattr(ssh_login, "_KILL_SECONDS", 0.1)
    codes: queue.SimpleQueue[Any] = queue.SimpleQueue()
    process.add_exit_callback(codes.put)
    process.kill()
    one.session.wait_for(b'{"kill": 0, "signal": 9}\n')
    assert codes.get(timeout=10) is None
    os.close(process.output)


def test_a_signal_where_no_thread_can_be_started(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The leader sends it: an error there would be everybody's."""
    one = bench()
    one.begin()
    process = one.worker()

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    process.kill()
    monkeypatch.undo()
    one.session.wait_for(b'{"kill": 0, "signal": 9}\n')
    os.close(process.output)


def test_after_the_last_worker_the_login_ends(bench: Any) -> None:
    one = bench(count=2)
    one.begin()
    processes = [one.worker(0), one.worker(1)]
    assert one.settled.get(timeout=10) == []
    one.login.release()
    assert not one.connection.closed
    one.login.release()
    assert one.connection.closed == 1 and one.over.wait(10)
    for process in processes:
        os.close(process.output)


def test_no_descriptors_left_for_one_more(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = bench(count=2)
    one.begin()
    first = one.worker(0)

    def refuse() -> tuple[int, int]:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(ssh_login.os, "pipe", refuse)
    one.session.say(pack_event(worker=1, ospid=1001, host="10.0.0.1", port=6))
    one.session.wait_for(b'{"kill": 1, "signal": 9}\n')
    (error,) = one.settled.get(timeout=10)
    monkeypatch.undo()
    assert "Too many open files" in error.reason and not one.login._closed and not first.gone.is_set()
    os.close(first.output)


def test_a_worker_that_comes_when_nobody_waits_any_more(bench: Any) -> None:
    one = bench(count=2)
    one.begin()
    first = one.worker(0)
    one.login.expire(3)
    assert len(one.settled.get(timeout=10)) == 1
    one.session.say(pack_event(worker=1, ospid=1001, host="10.0.0.1", port=6))
    one.session.wait_for(b'{"kill": 1, "signal": 9}\n')
    one.session.say(pack_event(exited=1, status=-9))
    assert one.workers.empty() and not one.login._closed
    one.login.release()
    assert one.over.wait(10), "it was not counted"
    os.close(first.output)


def test_a_login_that_is_let_go_before_it_has_settled(bench: Any) -> None:
    one = bench(hold=True)
    one.begin()
    one.login.let_go()
    one.session.say(pack_event(problem="no address"))
    assert len(one.settled.get(timeout=10)) == 1
    assert one.over.wait(10) and one.connection.closed == 1


def test_tunnels(bench: Any) -> None:
    one = bench()
    one.begin()
    os.close(one.worker().output)
    assert one.login.dial("10.0.0.1", 5, 1.0) == ("10.0.0.1", 5)


def test_a_forked_child_only_closes(bench: Any) -> None:
    one = bench()
    one.begin()
    process = one.worker()
    sink = os.dup(process.sink)
    process.forget()
    assert one.connection.forgotten == 1 and process.sink == -1 and not one.connection.closed
    os.close(sink)
    os.close(process.output)
    one.login._closed = False  # this process is none


def test_texts_of_other_programs_do_not_mislead() -> None:
    assert "disk" not in explain(1, "all is well", LoginSettings())
    assert explain(255, "", LoginSettings()).startswith("the login ended before a worker had started")


# -- hosts that lack something -----------------------------------------------------------------------------------


def test_what_a_host_wants_is_sent() -> None:
    bench = Bench()
    bench.session.say(b"Welcome\n" + MARK + pack_event(wants=["one", "two"]))
    bench.session.wait_for(b"<one><two>")
    bench.session.say(b"\n" + MARK + pack_event(address="10.0.0.1", cpus=3))
    bench.worker()
    assert bench.settled.get(timeout=10) == []
    bench.finish()


def test_another_version_of_python() -> None:
    bench = Bench()
    bench.session.say(b"\n" + MARK + pack_event(mismatch="2.7.18", program="/usr/bin/python"))
    (error,) = bench.settled.get(timeout=10)
    assert "the Python there (/usr/bin/python) is 2.7.18, that of this program " in str(error)
    assert isinstance(error.__cause__, VersionMismatchError)
    bench.finish()
