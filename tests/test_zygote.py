"""The zygote itself, spoken to directly; and the pieces of startup that need no zygote."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from distpool import config, startup
from distpool.managers.process import PACKAGE, LaunchSpec, boot_code
from distpool.zygote import FEW, Child, Zygote

FRAME = struct.Struct("!I")
HERE = os.path.dirname(os.path.abspath(__file__))


class Peer:
    """A zygote and the master's end of its control socket."""

    def __init__(self, directory: Path, entry: str = "launch_entries:serve") -> None:
        self.control, theirs = socket.socketpair()
        self.control.settimeout(20)
        call = f"main({theirs.fileno()}, {os.getpid()}, {entry!r}, own)"
        code = boot_code(f"from distpool.zygote import main; {call}", [HERE, *sys.path])
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, start_new_session=True
        )
        theirs.close()
        self.directory = directory
        self.buffer = b""
        self.descriptors: list[int] = []

    def request(self, count: int, number: int = 1, **changes: Any) -> bytes:
        spec = LaunchSpec(
            count, [], dict(os.environ), "/", [HERE, PACKAGE, *sys.path], "c", directory=str(self.directory)
        )
        settings = {**spec.settings(), "entry": "launch_entries:serve", "env": spec.env, **changes}
        return self.frame({"id": number, "count": count, "settings": settings})

    def frame(self, message: dict[str, Any]) -> bytes:
        text = json.dumps(message).encode()
        return FRAME.pack(len(text)) + text

    def read(self) -> dict[str, Any]:
        """The next message; its descriptors are appended to `descriptors`."""
        while True:
            if len(self.buffer) >= 4:
                (length,) = FRAME.unpack_from(self.buffer)
                if len(self.buffer) >= 4 + length:
                    message = json.loads(self.buffer[4 : 4 + length])
                    self.buffer = self.buffer[4 + length :]
                    return message
            data, descriptors, _, _ = socket.recv_fds(self.control, 4096, 8)
            assert data, "the zygote has ended"
            self.descriptors += descriptors
            self.buffer += data

    def close(self) -> None:
        self.control.close()
        while self.descriptors:
            os.close(self.descriptors.pop())
        try:
            assert self.process.wait(10) == 0
            assert self.process.stderr is not None
            assert self.process.stderr.closed or self.process.stderr.read() == b""
            self.process.stderr.close()
        finally:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def directory() -> Iterator[Path]:
    """Private, and its path leaves room for the names of sockets. Zygotes take it away themselves."""
    path = Path(tempfile.mkdtemp(prefix="dp-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def peer(directory: Path) -> Iterator[Peer]:
    peer = Peer(directory)
    yield peer
    peer.close()
    assert not directory.exists()


def test_fork_answer_exit(peer: Peer) -> None:
    peer.control.sendall(peer.request(2))
    first, second = peer.read(), peer.read()
    assert first["id"] == second["id"] == 1 and first["ospid"] != second["ospid"]
    assert first["fds"] == len(peer.descriptors) // 2
    assert first["address"][0] == "unix" and os.path.exists(first["address"][1])
    assert psutil.Process(first["ospid"]).ppid() == peer.process.pid
    os.kill(first["ospid"], signal.SIGTERM)
    assert peer.read() == {"exited": first["ospid"], "status": -15}
    assert not os.path.exists(first["address"][1])
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(second["address"][1])
    assert peer.read() == {"exited": second["ospid"], "status": 0}


def test_requests_in_pieces_and_several_at_once(peer: Peer) -> None:
    data = peer.request(1, 1) + peer.request(1, 2)
    for begin in range(0, len(data), 500):
        peer.control.sendall(data[begin : begin + 500])
    assert [peer.read()["id"], peer.read()["id"]] == [1, 2]


def test_kill_requests(peer: Peer) -> None:
    peer.control.sendall(peer.frame({"kill": os.getpid(), "signal": 9}))  # not a child: nothing happens
    peer.control.sendall(peer.request(1))
    ospid = peer.read()["ospid"]
    peer.control.sendall(peer.frame({"kill": ospid, "signal": 10}))
    assert peer.read() == {"exited": ospid, "status": -10}
    peer.control.sendall(peer.frame({"kill": ospid, "signal": 9}))  # gone: nothing happens
    peer.control.sendall(peer.request(1))
    assert "ospid" in peer.read()


def bare(control: socket.socket) -> Zygote:
    """Without what it sets up in its own process."""
    made = object.__new__(Zygote)
    made.control, made.master_gone, made.children, made.directory = control, -1, {}, ""
    return made


def test_who_cannot_be_killed_costs_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that has become another user's process: the zygote died of it, and all others with the zygote."""
    asked: list[int] = []

    def kill(ospid: int, signum: int) -> None:
        asked.append(ospid)
        if ospid == 4711:
            raise PermissionError(errno.EPERM, "operation not permitted")

    class Ended(Exception):
        pass

    def end(code: int) -> None:
        raise Ended

    monkeypatch.setattr(os, "kill", kill)
    monkeypatch.setattr(os, "waitpid", lambda ospid, options: (ospid, signal.SIGKILL))
    monkeypatch.setattr(os, "_exit", end)
    with contextlib.ExitStack() as stack:
        ours, theirs = map(stack.enter_context, socket.socketpair())
        made = bare(theirs)
        made.children = {ospid: Child(os.open(os.devnull, os.O_RDONLY), "") for ospid in (4711, 4712)}
        assert made._handle({"kill": 4711, "signal": 9}) is None
        with pytest.raises(Ended):
            made._stop()
        assert asked == [4711, 4711, 4712] and made.children == {}
        assert b'"exited": 4712' in ours.recv(4096)


@pytest.mark.parametrize("number", [errno.ENOBUFS, errno.ETOOMANYREFS])
def test_an_answer_that_the_system_is_short_of_something_for(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = [OSError(number, os.strerror(number))] * 3
    send_fds = socket.send_fds

    def send(*args: Any) -> int:
        if refused:
            raise refused.pop()
        return send_fds(*args)

    monkeypatch.setattr(socket, "send_fds", send)
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("it has ended"))
    with contextlib.ExitStack() as stack:
        ours, theirs = map(stack.enter_context, socket.socketpair())
        bare(theirs)._send({"id": 1}, [theirs.fileno()])
        ours.settimeout(10)
        data, descriptors, _, _ = socket.recv_fds(ours, 4096, 8)
        assert json.loads(data[4:]) == {"id": 1} and len(descriptors) == 1
        os.close(descriptors[0])


def test_orderly_end_reports_everybody(peer: Peer) -> None:
    peer.control.sendall(peer.request(3))
    ospids = {peer.read()["ospid"] for _ in range(3)}
    peer.control.shutdown(socket.SHUT_WR)
    reports = [peer.read() for _ in range(3)]
    assert {report["exited"] for report in reports} == ospids
    assert {report["status"] for report in reports} == {-9}


def test_keep_leaves_the_directory(directory: Path) -> None:
    peer = Peer(directory)
    peer.control.sendall(peer.frame({"keep": True}))
    peer.close()
    directory.rmdir()


def test_stopped_workers_die_with_the_master(peer: Peer) -> None:
    peer.control.sendall(peer.request(1))
    ospid = peer.read()["ospid"]
    os.kill(ospid, signal.SIGSTOP)
    peer.close()
    assert not psutil.pid_exists(ospid)


def test_request_that_cannot_be_served(peer: Peer) -> None:
    peer.control.sendall(peer.request(3, 5, transport="tcp", bind="192.0.2.77"))
    answer = peer.read()
    assert (answer["id"], answer["missing"]) == (5, 3)
    assert "annot assign" in answer["error"]
    peer.control.sendall(peer.request(1, 6))
    assert peer.read()["id"] == 6


def test_without_a_private_directory_workers_listen_on_the_loopback(directory: Path) -> None:
    taken = directory / "taken"
    taken.mkdir(mode=0o755)  # anybody may look into it
    peer = Peer(taken)
    peer.control.sendall(peer.request(1))
    assert peer.read()["address"][:2] == ["tcp", "127.0.0.1"]
    peer.close()


def test_the_zygote_makes_the_directory_and_takes_it_away(directory: Path) -> None:
    made = directory / "made"
    peer = Peer(made)
    peer.control.sendall(peer.request(1))
    assert peer.read()["address"][0] == "unix" and made.is_dir()
    peer.close()
    assert not made.exists()


def test_failing_preload_is_the_answer_to_each_request(directory: Path) -> None:
    peer = Peer(directory, "no_such_module:run")
    for number in (1, 2):
        peer.control.sendall(peer.request(1, number))
        answer = peer.read()
        assert answer["id"] == number and "No module named 'no_such_module'" in answer["error"]
    peer.close()


def modules_of_newborns(peer: Peer, count: int) -> list[str]:
    """Which of the modules that few need each of `count` new workers was born with."""
    names = {"names": ["cloudpickle", "multiprocessing"]}
    peer.control.sendall(peer.request(count, entry="launch_entries:loaded", extra=names))
    found = []
    for _ in range(count):
        while peer.read().get("fds") is None:
            pass  # the end of one that came before
        with open(peer.descriptors.pop(0), "rb") as output:
            found.append(output.read().decode().strip())
        for descriptor in peer.descriptors:  # pidfd
            os.close(descriptor)
        peer.descriptors.clear()
    return found


def test_the_first_workers_do_not_wait_for_what_few_need(directory: Path) -> None:
    peer = Peer(directory, "launch_entries:loaded")
    assert modules_of_newborns(peer, 2) == ["", ""]
    assert modules_of_newborns(peer, FEW + 1) == ["cloudpickle multiprocessing"] * (FEW + 1)
    assert modules_of_newborns(peer, 1) == ["cloudpickle multiprocessing"]
    peer.close()


def test_a_zygote_at_rest_loads_the_rest(directory: Path) -> None:
    peer = Peer(directory, "launch_entries:loaded")
    deadline = time.monotonic() + 20
    while modules_of_newborns(peer, 1) != ["cloudpickle multiprocessing"]:
        assert time.monotonic() < deadline
        select.select([], [], [], 2 * config.REST_SECONDS)  # it must have been left alone for so long
    peer.close()


def test_many_exits_at_once(peer: Peer) -> None:
    peer.control.sendall(peer.request(20))
    ospids = [peer.read()["ospid"] for _ in range(20)]
    for ospid in ospids:
        os.kill(ospid, signal.SIGKILL)
    assert {peer.read()["exited"] for _ in range(20)} == set(ospids)


def test_worker_of_a_zygote_with_strange_signals(directory: Path) -> None:
    """What the master ignores or blocks is not handed on."""
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        peer = Peer(directory)
    finally:
        signal.signal(signal.SIGTERM, previous)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        peer.control.sendall(peer.request(1))
        ospid = peer.read()["ospid"]
        time.sleep(0.2)  # past its own changes of the signal state; there is nothing to wait on
        os.kill(ospid, number)
        assert peer.read() == {"exited": ospid, "status": -number}
    peer.close()


# --- startup ----------------------------------------------------------------------------------------------------------


def test_listen(directory: Path) -> None:
    settings = {"transport": "unix", "directory": str(directory), "bind": "127.0.0.1"}
    listener = startup.listen(settings, "a")
    assert startup.address_of(listener, settings) == ["unix", str(directory / "a.sock")]
    listener.close()
    startup.remove(str(directory / "a.sock"))
    startup.remove(str(directory / "a.sock"))  # twice is once
    startup.remove("")
    directory.rmdir()
    listener = startup.listen(settings, "a")  # no such directory any more
    kind, host, port = startup.address_of(listener, settings)
    assert (kind, host) == ("tcp", "127.0.0.1") and port > 0
    assert startup.unix_path(listener) == ""
    listener.close()


@pytest.mark.parametrize(
    "busy", ["import time; time.sleep(60)", "import collections as c, itertools as i; c.deque(i.repeat(0), 0)"]
)
def test_lifeline(busy: str) -> None:
    mine, theirs = os.pipe()[::-1]
    code = f"import os; from distpool.startup import arm_lifeline; arm_lifeline({theirs}); os.write(1, b'x'); {busy}"
    process = subprocess.Popen([sys.executable, "-c", code], pass_fds=[theirs], stdout=subprocess.PIPE, cwd=PACKAGE)
    os.close(theirs)
    assert process.stdout is not None
    assert process.stdout.read(1) == b"x"
    assert process.poll() is None
    os.close(mine)
    assert process.wait(2) == -9
    process.stdout.close()


def test_lifeline_that_is_cut_already() -> None:
    theirs, mine = os.pipe()
    os.close(mine)
    code = f"from distpool.startup import arm_lifeline; arm_lifeline({theirs}); import time; time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], pass_fds=[theirs], cwd=PACKAGE)
    os.close(theirs)
    assert process.wait(10) == 1


def test_lifeline_without_signals() -> None:
    """As on macOS: a thread reads the pipe."""
    theirs, mine = os.pipe()
    code = (
        "import sys, os; sys.platform = 'other'; from distpool.startup import arm_lifeline; "
        f"import fcntl; arm_lifeline({theirs}); os.write(1, b'x'); import time; time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], pass_fds=[theirs], stdout=subprocess.PIPE, cwd=PACKAGE)
    os.close(theirs)
    assert process.stdout is not None and process.stdout.read(1) == b"x"
    os.close(mine)
    assert process.wait(2) == 1
    process.stdout.close()


def test_executed_worker_without_settings_ends() -> None:
    """The launcher died between starting the process and telling it what to do."""
    code = boot_code("from distpool.startup import exec_main; exec_main(own)", [])
    process = subprocess.run([sys.executable, "-c", code], input=b'{"half":', stdout=subprocess.PIPE, timeout=20)
    assert (process.returncode, process.stdout) == (1, b"")


def test_startup_imports_nothing_dear() -> None:
    code = f"import sys; sys.path.insert(0, {PACKAGE!r}); before = set(sys.modules); import distpool.startup; "
    code += "print(*set(sys.modules) - before)"
    said = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert not {"subprocess", "asyncio", "multiprocessing", "cloudpickle", "tempfile"} & set(said.split())


def test_output_end_of_a_worker_that_has_children_of_its_own(peer: Peer) -> None:
    """A program that user code leaves behind does not keep the lifeline or the listener open."""
    peer.control.sendall(peer.request(1))
    answer = peer.read()
    with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rw") as stream:
        connection.connect(answer["address"][1])
        source = "import subprocess; result = subprocess.run('ls -l /proc/self/fd', shell=True, capture_output=True)"
        stream.write(json.dumps(f"{source}.stdout.decode()") + "\n")
        stream.flush()
        assert "socket" not in json.loads(stream.readline())
    assert peer.read() == {"exited": answer["ospid"], "status": 0}
    assert select.select([peer.descriptors[0]], [], [], 5)[0]
    assert os.read(peer.descriptors[0], 100) == b""
