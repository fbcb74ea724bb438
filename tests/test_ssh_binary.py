"""An OpenSSH program as the client, with a script in its place; tests/ssh has the real one."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import PATIENCE

from distpool.managers import ssh_binary
from distpool.managers.specs import split_spec
from distpool.managers.ssh_binary import BinaryConnection, connect
from distpool.managers.ssh_client import LoginError

Connect = Callable[..., BinaryConnection]


def soon() -> float:
    return time.monotonic() + PATIENCE


@pytest.fixture
def ssh(tmp_path: Path) -> Iterator[Connect]:
    """A connection by a script; `script` sees ssh's arguments."""
    made: list[BinaryConnection] = []

    def one(script: str, spec: str = "me@host:2222", flags: Any = (), tunnels: bool = False) -> BinaryConnection:
        program = tmp_path / "ssh"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        made.append(connect(split_spec(spec), [str(program)], list(flags), tunnels, soon()))
        return made[-1]

    yield one
    for connection in made:
        connection.close()


def output(session: Any) -> list[str]:
    found = b""
    while data := session.read(1000):
        found += data
    assert session.read(10) == b""  # and again, when it is closed
    return found.decode().splitlines()


ECHO = 'for word; do printf "%s\\n" "$word"; done'


def test_the_command_line_of_a_login(ssh: Connect) -> None:
    session = ssh(ECHO, flags=["-i", "key"]).run("command --with 'words'", soon())
    words = output(session)
    assert words[:3] == ["-T", "-a", "-x"]
    assert words[-7:] == ["-l", "me", "-p", "2222", "--", "host", "command --with 'words'"]
    assert words.index("key") < words.index("BatchMode=yes")  # the user's come first: ssh takes the first
    assert {"BatchMode=yes", "ClearAllForwardings=yes", "ServerAliveCountMax=2"} <= set(words)
    assert not {"-M", "-S"} & set(words)
    assert session.status(PATIENCE) == 0


def test_a_host_without_user_and_port(ssh: Connect) -> None:
    words = output(ssh(ECHO, spec="host").run("true", soon()))
    assert words[-3:] == ["--", "host", "true"] and "-l" not in words and "-p" not in words


def test_the_time_for_the_connection_is_what_is_left(ssh: Connect) -> None:
    connection = ssh(ECHO)
    assert "ConnectTimeout=7" in output(connection.run("true", time.monotonic() + 7.9))
    assert "ConnectTimeout=1" in output(connection.run("true", time.monotonic() - 5))


def test_tunnels_are_one_login_for_all(ssh: Connect) -> None:
    connection = ssh(ECHO, tunnels=True)
    directory = connection._directory
    first, second = (output(connection.run("true", soon())) for _ in range(2))
    assert "-M" in first and "-M" not in second
    assert first[first.index("-S") + 1] == second[second.index("-S") + 1] == os.path.join(directory, "s")
    assert "ControlPersist=no" in first


def test_the_directory_goes_with_the_program(ssh: Connect) -> None:
    """Also when this process has been killed: the shell around the program sees to it."""
    connection = ssh("exit 3", tunnels=True)
    assert os.stat(connection._directory).st_mode & 0o777 == 0o700
    session = connection.run("true", soon())
    assert session.status(PATIENCE) == 3 and not os.path.exists(connection._directory)


def test_streams_of_a_command(ssh: Connect) -> None:
    session = ssh("echo error >&2; cat; exit 5").run("true", soon())
    session.write(b"line\n")
    session.close()
    assert output(session) == ["line"]
    assert session.read_errors(100) == b"error\n" and session.read_errors(100) == b""
    assert session.status(PATIENCE) == 5
    session.write(b"nobody reads")  # closed: never raises
    session.close()


def test_who_does_not_read_any_more(ssh: Connect) -> None:
    session = ssh("exec <&-; echo ready; exec sleep 100").run("true", soon())
    assert session.read(100) == b"ready\n"
    session.write(b"x" * 1_000_000)
    assert session.status(0.01) is None


def test_reads_give_what_is_there(ssh: Connect) -> None:
    session = ssh("printf abc; cat").run("true", soon())
    found = b""
    while len(found) < 3:
        found += session.read(2)
    assert found == b"abc"


def test_a_program_that_does_not_end(ssh: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh_binary, "_END_SECONDS", 0.05)
    connection = ssh("trap '' TERM HUP; echo ready; while :; do sleep 100; done", tunnels=True)
    session = connection.run("true", soon())
    assert session.read(100) == b"ready\n"
    connection.close()
    assert session.status(0) == -9 and not os.path.exists(connection._directory)


def test_there_is_no_such_program() -> None:
    with pytest.raises(LoginError, match="no SSH program 'no-such-ssh'"):
        connect(split_spec("host"), ["no-such-ssh"], [], True, soon())


def test_no_room_for_the_socket(ssh: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: Any) -> str:
        raise OSError("no space")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(LoginError, match="no directory for the control socket: no space"):
        ssh(ECHO, tunnels=True)


def test_a_program_that_cannot_be_run(ssh: Connect, tmp_path: Path) -> None:
    connection = ssh(ECHO)
    (tmp_path / "ssh").unlink()
    with pytest.raises(LoginError, match="No such file"):
        connection.run("true", soon())


# -- through the login -----------------------------------------------------------------------------------------------

CONTROL = r"""
while [ $# -gt 0 ]; do case "$1" in -O) order=$2;; -L) forward=$2;; esac; shift; done
echo "$order $forward" >> "$(dirname "$0")/orders"
case "$order" in forward) {forward};; esac
"""


@pytest.mark.parametrize("host", ["10.0.0.7", "::1"])
def test_dialling(ssh: Connect, tmp_path: Path, host: str) -> None:
    connection = ssh(CONTROL.replace("{forward}", "true"), tunnels=True)
    path = os.path.join(connection._directory, "1")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        sock = connection.dial(host, 80, soon())
        peer, _ = server.accept()
    with peer:
        peer.sendall(b"x")
        assert sock.recv(1) == b"x" and sock.gettimeout() is None
    there = f"{path}:[::1]:80" if ":" in host else f"{path}:{host}:80"
    assert (tmp_path / "orders").read_text().splitlines() == [f"forward {there}", f"cancel {there}"]
    assert not os.path.exists(path)  # nobody else shall use the way
    descriptor = sock.fileno()
    connection.forget()
    with pytest.raises(OSError):
        os.fstat(descriptor)


def test_ways_are_not_those_of_the_configuration(ssh: Connect, tmp_path: Path) -> None:
    """The login would be asked for the forwards in it as well; a port that is taken there ends ours, too."""
    connection = ssh('echo "$@" > "$(dirname "$0")/words"; exit 255', tunnels=True)
    with pytest.raises(OSError):
        connection.dial("h", 80, soon())
    words = (tmp_path / "words").read_text().split()
    assert words[words.index("-F") + 1] == os.devnull and "key" not in words


def test_a_way_that_leads_nowhere(ssh: Connect, tmp_path: Path) -> None:
    connection = ssh(CONTROL.replace("{forward}", "true"), tunnels=True)
    with pytest.raises(OSError):
        connection.dial("h", 80, soon())
    assert len((tmp_path / "orders").read_text().splitlines()) == 2


def test_a_login_that_does_not_forward(ssh: Connect) -> None:
    connection = ssh(CONTROL.replace("{forward}", "echo refused >&2; exit 255"), tunnels=True)
    with pytest.raises(OSError, match="cannot forward a connection through the login to host: refused"):
        connection.dial("h", 80, soon())


def test_a_login_that_does_not_answer(ssh: Connect) -> None:
    connection = ssh(CONTROL.replace("{forward}", "exec sleep 100"), tunnels=True)
    with pytest.raises(TimeoutError, match="the login to host does not answer"):
        connection.dial("h", 80, time.monotonic() + 0.1)


def test_a_forked_child_leaves_the_program_alone(ssh: Connect) -> None:
    connection = ssh("cat; exit 4", tunnels=True)
    session = connection.run("true", soon())
    process = session._process
    copies = [os.dup(stream.fileno()) for stream in (process.stdin, process.stdout, process.stderr)]  # type: ignore[union-attr]
    connection.forget()
    assert process.returncode == 0 and connection._master is None
    os.close(copies[0])  # its stdin ends here, not by that
    pid, status = os.waitpid(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 4
    for copy in copies[1:]:
        os.close(copy)
    for stream in (process.stdin, process.stdout, process.stderr):
        try:
            stream.close()  # type: ignore[union-attr]
        except OSError:
            pass  # its descriptor was closed


# -- what it prints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("printed", "said"),
    [
        ("ssh: Could not resolve hostname host: Name or service not known", "no such host: host"),
        ("me@host: Permission denied (publickey).", "check it with: ssh -p 2222 me@host"),
        ("Host key verification failed.", "is not known. Log in once by hand"),
        ("@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.", "has CHANGED"),
        ("@ WARNING: REVOKED HOST KEY DETECTED! @\nHost key verification failed.", "revoked"),
        ("Received disconnect: Too many authentication failures\nPermission denied", "too many keys"),
        ("connect to host host port 22: Connection refused", "no sshd listens there"),
        ("kex_exchange_identification: Connection closed by remote host", "MaxStartups"),
        ("Connection closed by 10.0.0.7 port 22", "MaxStartups"),
        ("Cannot execute command-line and remote command.", "RemoteCommand=none"),
        ("something new", "ssh failed"),
        ("  \n", ""),
    ],
)
def test_explanations(ssh: Connect, printed: str, said: str) -> None:
    assert said in ssh(ECHO).explain(255, printed)


@pytest.mark.parametrize("status", [None, 0, 1, 127])
def test_what_was_not_the_programs_fault(ssh: Connect, status: int | None) -> None:
    assert ssh(ECHO).explain(status, "Permission denied") == ""


def test_long_names_of_the_directory_for_temporary_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 80)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    directory = ssh_binary._socket_directory()
    assert directory.startswith("/tmp/distpool-ssh-") and not list(long.iterdir())
    shutil.rmtree(directory)


def test_two_commands_at_the_same_time_are_one_login(ssh: Connect) -> None:
    connection = ssh(ECHO, tunnels=True)
    barrier, found = threading.Barrier(4), []

    def run() -> None:
        barrier.wait(PATIENCE)
        found.append(output(connection.run("true", soon())))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert sum("-M" in words for words in found) == 1 and len(found) == 4
