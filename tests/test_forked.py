"""The master's end of a zygote, with a zygote that the test plays: answers, ends, descriptors, and nobody who waits."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fakes import PATIENCE
from wires import until

from distpool.errors import LaunchWorkerError
from distpool.managers import forked
from distpool.managers.forked import FRAME, ForkServer, Gone
from distpool.managers.process import LaunchedProcess, LaunchSpec
from distpool.transport.ioloop import IoLoop


class Zygote:
    """The other end: what it was told, and answers at will. It is its own `Popen` and `ZygoteProcess`."""

    def __init__(self) -> None:
        control, self.sock = socket.socketpair()
        self.control = control.detach()
        self.startup, self.says = os.pipe()
        os.set_blocking(self.startup, False)
        self.process = self
        self.given = {"FROM": "a command"}
        self.killed = threading.Event()
        self.returncode: int | None = None
        self.pids = itertools.count(100_000_000)  # nobody has such a process id
        self.writers: dict[int, int] = {}

    def kill(self) -> None:
        self.killed.set()
        self.hang_up()

    def wait(self) -> int:
        return 7

    def hang_up(self) -> None:
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def receive(self) -> dict[str, Any]:
        self.sock.settimeout(PATIENCE)
        (length,) = FRAME.unpack(self._read(FRAME.size))
        found: dict[str, Any] = json.loads(self._read(length))
        return found

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += self.sock.recv(size - len(data))
        return data

    def send(self, message: dict[str, Any], descriptors: tuple[int, ...] = (), cut: int = 0) -> None:
        text = json.dumps(message).encode()
        data = FRAME.pack(len(text)) + text
        socket.send_fds(self.sock, [data[: cut or None]], list(descriptors))
        if cut:
            self.sock.sendall(data[cut:])

    def born(self, number: int, fds: int = 1, given: int = 1, cut: int = 0) -> int:
        ospid = next(self.pids)
        reader, self.writers[ospid] = os.pipe()
        message = {"id": number, "ospid": ospid, "address": ["tcp", "127.0.0.1", 9], "fds": fds}
        self.send(message, (reader,) * given, cut)
        os.close(reader)
        return ospid

    def close(self) -> None:
        self.sock.close()
        os.close(self.says)
        for writer in self.writers.values():
            os.close(writer)


@pytest.fixture
def zygote() -> Iterator[Zygote]:
    made = Zygote()
    yield made
    made.close()


@pytest.fixture
def loop() -> Iterator[IoLoop]:
    made = IoLoop("test-io")
    made.start()
    yield made
    made.stop()


@pytest.fixture
def ended() -> list[ForkServer]:
    return []


@pytest.fixture
def server(loop: IoLoop, zygote: Zygote, ended: list[ForkServer]) -> Iterator[ForkServer]:
    made = ForkServer(loop, zygote, ended.append)  # type: ignore[arg-type]
    yield made
    zygote.hang_up()
    made.close()
    until(lambda: made._startup < 0, "it is closed")


def spec(**changes: Any) -> LaunchSpec:
    given = {"count": 1, "argv": [], "env": {"A": "b"}, "cwd": "/", "sys_path": [], "cookie": "c"}
    return LaunchSpec(**{**given, **changes})


def launch(server: ForkServer, count: int = 1, seconds: float = PATIENCE, meanwhile: Any = lambda: None) -> Any:
    return server.launch(spec(timeout=seconds), count, time.monotonic() + seconds, meanwhile)


class Launch(threading.Thread):
    """A launch thread: what it gets."""

    def __init__(self, server: ForkServer, count: int = 1, seconds: float = PATIENCE) -> None:
        super().__init__()
        self.iterator = launch(server, count, seconds)
        self.processes: list[LaunchedProcess] = []
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            for process in self.iterator:
                self.processes.append(process)
        except BaseException as error:
            self.error = error

    def end(self) -> Launch:
        self.join(PATIENCE)
        assert not self.is_alive()
        for process in self.processes:
            os.close(process.output)
        return self


def test_an_order_and_its_workers(server: ForkServer, zygote: Zygote) -> None:
    first = Launch(server, 2)
    order = zygote.receive()
    assert order["count"] == 2 and order["settings"] == {
        **spec(timeout=PATIENCE).settings(),
        "env": {"A": "b"},
        "given": {"FROM": "a command"},
        "limits": {},  # of which a command may have changed some as well: only later changes are sent
    }
    assert not server.idle()
    pids = [zygote.born(order["id"]), zygote.born(order["id"], cut=3)]
    first.end()
    assert [process.ospid for process in first.processes] == pids and first.error is None
    assert first.processes[0].address == ("tcp", "127.0.0.1", 9)
    assert not server.idle() and server.served
    codes: list[int | None] = []
    told = threading.Event()
    for process in first.processes:
        process.add_exit_callback(lambda code: (codes.append(code), told.set() if len(codes) == 2 else None)[0])
    for pid, status in zip(pids, (3, -9), strict=True):
        zygote.send({"exited": pid, "status": status})
    assert told.wait(PATIENCE) and codes == [3, -9] and server.idle()


def test_two_orders_at_the_same_time(server: ForkServer, zygote: Zygote) -> None:
    one = Launch(server)
    number = zygote.receive()["id"]
    other = Launch(server)
    last = zygote.receive()["id"]
    pids = [zygote.born(last), zygote.born(number)]
    assert [each.end().processes[0].ospid for each in (other, one)] == pids


def test_meanwhile_runs_when_the_order_is_out(server: ForkServer, zygote: Zygote) -> None:
    seen: list[dict[str, Any]] = []
    iterator = launch(server, meanwhile=lambda: seen.append(zygote.receive()) or zygote.born(seen[0]["id"]))
    (process,) = iterator
    assert seen
    os.close(process.output)


def test_a_refusal_says_what_the_zygote_printed(server: ForkServer, zygote: Zygote) -> None:
    os.write(zygote.says, b"Traceback: no module\n")
    until(server.startup_output, "its output")
    asked = Launch(server)
    zygote.send({"id": zygote.receive()["id"], "error": "cannot listen"})
    error = asked.end().error
    assert type(error) is LaunchWorkerError and "cannot listen" in str(error) and "no module" in str(error)
    assert server.alive and server.idle()


def test_no_descriptors_left(server: ForkServer, zygote: Zygote) -> None:
    asked = Launch(server)
    pid = zygote.born(zygote.receive()["id"], fds=2, given=1)
    assert "no file descriptors left" in str(asked.end().error)
    assert zygote.receive() == {"kill": pid, "signal": 9}


def test_no_answer_in_time(server: ForkServer, zygote: Zygote) -> None:
    """One that never answered anybody would hold up the next launch as well, so it goes; one that did stays."""
    good = Launch(server)
    zygote.born(zygote.receive()["id"])
    good.end()
    asked = Launch(server, seconds=0.01)
    number = zygote.receive()["id"]
    assert "no answer within 0.01 seconds" in str(asked.end().error)
    assert server.alive and not zygote.killed.is_set()
    pid = zygote.born(number)  # after all: nobody wants it
    assert zygote.receive() == {"kill": pid, "signal": 9}


def test_one_that_has_never_answered_is_killed(server: ForkServer, zygote: Zygote) -> None:
    assert "no answer within" in str(Launch(server, seconds=0.01).end().error)
    assert zygote.killed.is_set() and not server.alive


def test_what_nobody_takes_is_ended(server: ForkServer, zygote: Zygote) -> None:
    iterator = launch(server, 3, meanwhile=lambda: None)
    box: list[Any] = []
    thread = threading.Thread(target=lambda: box.append(next(iterator)))
    thread.start()
    number = zygote.receive()["id"]
    pids = [zygote.born(number), zygote.born(number)]
    thread.join(PATIENCE)
    until(lambda: len(server._children) == 2, "both have come")
    iterator.close()
    assert zygote.receive() == {"kill": pids[1], "signal": 9}
    pids.append(zygote.born(number))
    assert zygote.receive() == {"kill": pids[2], "signal": 9}
    os.close(box[0].output)


def test_the_end_of_the_zygote_is_that_of_all(server: ForkServer, zygote: Zygote, ended: list[ForkServer]) -> None:
    good = Launch(server)
    zygote.born(zygote.receive()["id"])
    (process,) = good.end().processes
    waits = Launch(server)
    zygote.receive()
    zygote.hang_up()
    error = waits.end().error
    assert type(error) is Gone and "ended with code 7" in str(error)
    until(lambda: process.exited, "its workers have ended")
    assert process.exitcode is None and not server.alive and ended == [server]
    with pytest.raises(Gone, match="code 7"):
        next(launch(server))
    server.close()
    assert ended == [server]


def test_close_ends_it_and_hears_the_last_reports(server: ForkServer, zygote: Zygote, ended: list[ForkServer]) -> None:
    good = Launch(server)
    pid = zygote.born(zygote.receive()["id"])
    (process,) = good.end().processes

    def serve() -> None:
        zygote.sock.settimeout(PATIENCE)
        assert zygote.sock.recv(1) == b""
        zygote.send({"exited": pid, "status": -15})
        zygote.hang_up()

    thread = threading.Thread(target=serve)
    thread.start()
    server.close()
    thread.join(PATIENCE)
    assert process.exitcode == -15 and ended == [server] and not server.alive


def test_close_does_not_wait_for_ever(server: ForkServer, zygote: Zygote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forked, "CLOSE_SECONDS", 0.01)
    server.close()
    assert zygote.killed.is_set() and server._ended


def test_retiring_tells_it_to_leave_the_directory(server: ForkServer, zygote: Zygote) -> None:
    server.retire(True)
    assert not server.alive and zygote.receive() == {"keep": True}
    assert zygote.sock.recv(1) == b""


def test_signals_go_through_it(server: ForkServer, zygote: Zygote) -> None:
    good = Launch(server)
    pid = zygote.born(zygote.receive()["id"])
    good.end().processes[0].kill(signal.SIGTERM)
    assert zygote.receive() == {"kill": pid, "signal": signal.SIGTERM}


def test_orders_larger_than_the_socket(server: ForkServer, zygote: Zygote) -> None:
    asked = Launch.__new__(Launch)
    threading.Thread.__init__(asked)
    order = spec(env={"A": "x" * (4 << 20)}, timeout=PATIENCE)
    asked.iterator = server.launch(order, 1, time.monotonic() + PATIENCE, lambda: None)
    asked.processes, asked.error = [], None
    asked.start()
    found = zygote.receive()
    assert len(found["settings"]["env"]["A"]) == 4 << 20
    zygote.born(found["id"])
    assert asked.end().error is None


def test_its_end_while_an_order_waits_for_room(
    server: ForkServer, zygote: Zygote, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush = server._flush

    def full() -> bool:
        if server._ended:
            return flush()
        zygote.hang_up()
        until(lambda: server._ended and server._control.fileno() < 0, "the leader has seen it")
        return False

    monkeypatch.setattr(server, "_flush", full)
    with pytest.raises(Gone):
        list(launch(server))


def test_a_forked_child_only_closes(zygote: Zygote) -> None:
    class Loop:
        def register(self, source: Any, on_readable: Callable[[], None]) -> None:
            pass

    server = ForkServer(Loop(), zygote, lambda server: None)  # type: ignore[arg-type]
    startup = server._startup
    server._lock.acquire()  # by a thread that does not exist there
    server.forget()
    with pytest.raises(OSError):
        os.fstat(startup)
    assert server._control.fileno() == -1 and zygote.returncode == 0 and not zygote.killed.is_set()
