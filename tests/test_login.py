"""The process that a login starts, without SSH: its streams are pipes of ours."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from distpool import login
from distpool.managers.login_protocol import LOGIN_ARGUMENTS, EventReader, LoginSettings

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def settings(**more: Any) -> LoginSettings:
    return LoginSettings(**{"cookie": "secret", "bind": "127.0.0.1", "site": "localhost", **more})


class Login:
    """One such process; `next()` is the next event and its payload, None at the end."""

    def __init__(self, *arguments: str, env: dict[str, str] | None = None, shell: str = "") -> None:
        words = [sys.executable, *LOGIN_ARGUMENTS, *arguments]
        self.process = subprocess.Popen(
            ["/bin/sh", "-c", f'{shell}\nexec "$@"', "sh", *words] if shell else words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, **(env or {})},
        )
        self.reader = EventReader()
        self.waiting: list[tuple[dict[str, Any], bytes]] = []

    def write(self, data: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(data)

    def next(self) -> tuple[dict[str, Any], bytes] | None:
        assert self.process.stdout is not None
        while not self.waiting:
            data = self.process.stdout.read(65536)
            if not data:
                return None
            self.waiting += self.reader.feed(data)
        return self.waiting.pop(0)

    def until(self, key: str) -> dict[str, Any]:
        while (found := self.next()) is not None:
            if key in found[0]:
                return found[0]
        raise AssertionError(f"no event {key!r}; stderr: {self.errors()}")

    def errors(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read().decode()


@pytest.fixture
def start() -> Iterator[Callable[..., Login]]:
    started: list[Login] = []

    def make(order: LoginSettings | None, *arguments: str, **options: Any) -> Login:
        started.append(Login(*arguments, **options))
        if order is not None:
            started[-1].write(order.to_line())
        return started[-1]

    yield make
    for one in started:
        one.process.kill()
        one.process.wait()
        for stream in (one.process.stdin, one.process.stdout, one.process.stderr):
            if stream is not None:
                stream.close()


def alive(ospid: int) -> bool:
    return psutil.pid_exists(ospid) and psutil.Process(ospid).status() != psutil.STATUS_ZOMBIE


def wait_until(holds: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.02)


def test_workers_listen_and_end_with_stdin(start: Callable[..., Login]) -> None:
    one = start(settings(count=3))
    first = one.until("address")
    assert first["ospid"] == one.process.pid and first["cpus"] == login.usable_cpus()
    assert first["python"] == ".".join(map(str, sys.version_info[:3]))
    workers = [one.until("worker") for _ in range(3)]
    assert [each["worker"] for each in workers] == [0, 1, 2] and not any(each["tls"] for each in workers)
    for each in workers:
        assert psutil.Process(each["ospid"]).ppid() == one.process.pid
        socket.create_connection((each["host"], each["port"]), 5).close()
    assert one.process.stdin is not None
    one.process.stdin.close()
    assert one.next() is None and one.process.wait(10) == 0
    assert not any(alive(each["ospid"]) for each in workers)


def test_workers_end_with_it_however_it_ends(start: Callable[..., Login]) -> None:
    one = start(settings(count=2))
    workers = [one.until("worker") for _ in range(2)]
    one.process.kill()
    wait_until(lambda: not any(alive(each["ospid"]) for each in workers))


def test_signals_and_exit_statuses(start: Callable[..., Login]) -> None:
    one = start(settings(count=3))
    workers = [one.until("worker") for _ in range(3)]
    one.write(b'{"kill": 1, "signal": 9}\n{"kill": 77, "signal": 9}\n{"of the future": 1}\n')
    assert one.until("exited") == {"exited": 1, "status": -signal.SIGKILL}
    os.kill(workers[0]["ospid"], signal.SIGTERM)
    assert one.until("exited") == {"exited": 0, "status": -signal.SIGTERM}
    one.write(b'{"kill": 2, "signal": 9}\n')
    assert one.until("exited")["exited"] == 2
    assert one.next() is None and one.process.wait(10) == 0, "after the last one it ends"


def test_a_shell_that_has_closed_stderr(start: Callable[..., Login]) -> None:
    one = start(settings(count=2), shell="exec 2>&-")
    workers = [one.until("worker") for _ in range(2)]
    one.write(b'{"kill": 0, "signal": 9}\n')
    assert one.until("exited") == {"exited": 0, "status": -signal.SIGKILL}
    assert alive(workers[1]["ospid"])


def test_a_shell_that_prints_in_the_background(start: Callable[..., Login]) -> None:
    """Whole lines and unfinished ones, before and between the events."""
    one = start(settings(count=2), shell="while echo noise && printf more; do :; done 2>&- &")
    workers = [one.until("worker") for _ in range(2)]
    for number in (1, 0):
        os.kill(workers[number]["ospid"], signal.SIGKILL)
        assert one.until("exited") == {"exited": number, "status": -signal.SIGKILL}


def test_a_worker_that_nobody_comes_for(start: Callable[..., Login]) -> None:
    one = start(settings(env={"DISTPOOL_WORKER_TIMEOUT": "0.2"}))
    one.until("worker")
    event, payload = one.next() or ({}, b"")
    assert event["output"] == 0
    assert payload == b"Master process (id 1) could not connect within 0.2 seconds.\n"
    assert one.until("exited") == {"exited": 0, "status": 1}


@pytest.mark.parametrize(
    ("order", "said"),
    [
        (b"", "before it had said what to do"),
        (b"nonsense\n", "JSONDecodeError"),
        (b"[]\n", "must be a JSON object"),
        (b"{}\n", "the cookie must be 1 to 64 ASCII characters"),
        (b'{"cookie": "secret", "cwd": "/no/such", "strict_cwd": true}\n', "dir='/no/such' is no directory"),
    ],
)
def test_orders_that_are_none(start: Callable[..., Login], order: bytes, said: str) -> None:
    one = start(None)
    assert one.process.stdin is not None
    one.write(order)
    one.process.stdin.close()
    assert one.process.wait(20) == 1 and said in one.errors()


def test_the_cookie_of_the_command_line(start: Callable[..., Login]) -> None:
    one = start(settings(cookie=None), "--worker=of-the-command-line")
    one.until("worker")


def test_an_order_in_pieces_with_more_behind_it(start: Callable[..., Login]) -> None:
    one = start(None)
    line = settings(count=1).to_line() + b'{"kill": 0, "signal": 9}\n'
    one.write(line[:10])
    one.write(line[10:])
    assert one.until("worker") and one.until("exited") == {"exited": 0, "status": -9}


# -- addresses ---------------------------------------------------------------------------------------------------


def test_the_address_that_the_login_came_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.1 40000 10.0.0.7 22")
    assert login.reached_address(settings()) == "10.0.0.7"
    monkeypatch.delenv("SSH_CONNECTION")
    assert login.reached_address(settings(site="127.0.0.1")) == "127.0.0.1", "the name that the master used"
    ours = login.reached_address(settings(site="no-such-host.invalid"))
    assert ours == login.routable_address(), "and not what this host calls itself"
    assert login.reached_address(settings(site="192.0.2.1")) == ours, "that is no address of ours"


def test_listeners() -> None:
    with login.listen(settings(bind=None), "127.0.0.1", 0) as first:
        host, port = first.getsockname()
        assert host == "127.0.0.1"
        with pytest.raises(OSError):
            login.listen(settings(port=port), "", 0)
        with login.listen(settings(port=port), "", 1) as next_one:
            assert port < next_one.getsockname()[1] < port + 1000
        with login.listen(settings(port=port, port_is_hint=True), "", 0) as hinted:
            assert port < hinted.getsockname()[1] < port + 1000
    with login.listen(settings(bind=None, loopback=True), "10.0.0.7", 0) as local:
        assert local.getsockname()[0] == "127.0.0.1"


def test_one_worker_less(start: Callable[..., Login]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        one = start(settings(port=port, count=2))
        assert f"127.0.0.1:{port}" in one.until("problem")["problem"]
        assert one.until("worker")["worker"] == 1


# -- what workers get --------------------------------------------------------------------------------------------


def test_worker_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), "/lib"])
    monkeypatch.setenv("OF_THE_LOGIN", "1")
    made = login.worker_settings(settings(cwd=os.sep, env={"MINE": "2", "MKL_NUM_THREADS": "4"}, memory_limit=5))
    assert made["cwd"] == os.sep and made["sys_path"] == [os.sep, "/lib"] and made["extra"] == {"memory_limit": 5}
    env = made["env"]
    assert (env["OF_THE_LOGIN"], env["MINE"], env["MKL_NUM_THREADS"], env["OMP_NUM_THREADS"]) == ("1", "2", "4", "1")
    made = login.worker_settings(settings(cwd="/no/such", enable_threaded_blas=True))
    assert made["cwd"] == str(tmp_path) and "OMP_NUM_THREADS" not in made["env"]
    with pytest.raises(FileNotFoundError, match="/no/such"):
        login.worker_settings(settings(cwd="/no/such", strict_cwd=True))


def test_it_does_not_wait_for_who_does_not_read(start: Callable[..., Login]) -> None:
    """A worker prints without end and nobody takes it: orders are heard all the same, and memory stays bounded."""
    one = start(settings())
    worker = one.until("worker")
    # The worker itself prints nothing before its master comes, so its pipe is written to from outside.
    pipe = f"/proc/{worker['ospid']}/fd/1"
    if not os.path.exists(pipe):
        pytest.skip("needs /proc")
    wait_until(lambda: os.readlink(pipe).startswith("pipe:"))
    written = 0
    with open(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK), "wb", buffering=0) as stream:
        deadline = time.monotonic() + 20
        idle = 0
        while idle < 20 and time.monotonic() < deadline:
            count = stream.write(b"x" * 65536)
            written += count or 0
            idle = 0 if count else idle + 1
            if not count:
                time.sleep(0.01)
    assert idle == 20 and written < 8 << 20
    one.write(b'{"kill": 0, "signal": 9}\n')
    wait_until(lambda: not alive(worker["ospid"]))
    assert one.until("exited") == {"exited": 0, "status": -9}


def test_a_worker_that_cannot_be_killed_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has become another user's process."""
    orders, events = os.pipe(), os.pipe()
    agent = login.Agent(settings(), orders[0], events[1], b'{"kill": 3, "signal": 9}\n')
    agent._workers[4711] = login._Worker(3, -1, -1)

    def kill(ospid: int, signum: int) -> None:
        raise PermissionError("operation not permitted")

    class Ended(Exception):
        pass

    def end(code: int) -> None:
        raise Ended

    monkeypatch.setattr(os, "kill", kill)
    monkeypatch.setattr(os, "_exit", end)
    assert agent._obey() is None
    with pytest.raises(Ended):
        agent._stop()
    monkeypatch.undo()
    for descriptor in (*orders, *events, agent._wake_read, agent._wake_write):
        os.close(descriptor)


def test_a_worker_whose_child_prints_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker is dead, the child is not: nobody can wait for its end."""
    orders, lifeline, events, output = os.pipe(), os.pipe(), os.pipe(), os.pipe()
    agent = login.Agent(settings(), orders[0], events[1], b"")
    agent._workers[4711] = agent._outputs[output[0]] = login._Worker(3, output[0], lifeline[1])
    taken = 0

    def take(worker: Any) -> bool:
        nonlocal taken
        taken += 1
        assert taken < 10_000
        return True

    monkeypatch.setattr(agent, "_take_output", take)
    ends = [(4711, 0), (0, 0)]
    monkeypatch.setattr(os, "waitpid", lambda ospid, options: ends.pop(0))
    agent._reap()
    monkeypatch.undo()
    assert taken and not agent._workers and not agent._outputs
    assert b'"exited": 3' in os.read(events[0], 65536)
    for descriptor in (*orders, lifeline[0], *events, output[1], agent._wake_read, agent._wake_write):
        os.close(descriptor)
