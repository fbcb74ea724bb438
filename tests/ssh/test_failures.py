"""Hosts that do not come up: in bounded time, with a message that says what to do, and without harm to the others."""

from __future__ import annotations

import contextlib
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import distpool
from distpool import LaunchWorkerError, remotecall_fetch, rmprocs

from .sshd import Server, free_port, keygen, missing, options
from .test_ssh import sessions, wait_until

Failure = Callable[..., LaunchWorkerError]

# Together they take a minute, and what they look at depends on the clients and not on the Python.
pytestmark = pytest.mark.slow


@pytest.fixture
def fails(server: Server, ssh: Any) -> Iterator[Failure]:
    """The error of one machine, started beside a good one, which must come up."""

    def check(machine: Any, within: float = 15.0, **more: Any) -> LaunchWorkerError:
        begin = time.monotonic()
        good = distpool.addprocs_async(["host2"], **options(server, ssh))
        with pytest.raises(distpool.CompositeException) as info:
            distpool.addprocs([machine], **options(server, ssh, **more))
        took = time.monotonic() - begin
        assert took < within, f"took {took:.1f} s"
        (error,) = info.value.exceptions
        assert isinstance(error, LaunchWorkerError), error
        host = machine if isinstance(machine, str) else machine[0]
        assert error.host == host.split()[0].rpartition("@")[2].partition(":")[0]
        assert str(error).startswith(f"could not launch worker on {error.host}: ")
        assert remotecall_fetch(abs, good.result(30)[0], -1) == 1
        rmprocs(good.result())
        print(error)
        return error

    yield check
    rmprocs(distpool.procs()[1:])
    wait_until(lambda: not sessions(server))


def script(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


# -- before the login --------------------------------------------------------------------------------------------


def test_C200_no_such_host(fails: Failure) -> None:
    assert "no such host: no-such-host.invalid" in str(fails("no-such-host.invalid"))


def test_the_connection_is_refused(fails: Failure) -> None:
    error = fails(f"127.0.0.1:{free_port()}")
    assert "connection refused by 127.0.0.1" in str(error) and "no sshd listens there" in str(error)


@contextlib.contextmanager
def black_hole() -> Iterator[int]:
    """A port that lets nobody in and refuses nobody: its queue is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


@pytest.mark.skipif(sys.platform != "linux", reason="full queues drop connections on Linux only")
def test_a_black_hole(fails: Failure) -> None:
    with black_hole() as port:
        error = fails(f"127.0.0.1:{port}", timeout=3, within=12)
    assert "no answer from 127.0.0.1" in str(error) and "is the host up" in str(error)


def test_a_host_that_hangs(fails: Failure) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        error = fails(f"127.0.0.1:{listener.getsockname()[1]}", timeout=3, within=12)
    assert "does not answer" in str(error) or "no answer" in str(error)


def test_it_is_no_sshd(fails: Failure) -> None:
    server = subprocess.Popen(
        [sys.executable, "-c", "import http.server; http.server.test(port=0, bind='127.0.0.1')"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={"PYTHONUNBUFFERED": "1"},
        text=True,
    )
    assert server.stdout is not None
    with server, server.stdout:
        port = server.stdout.readline().split("port ")[1].split()[0]
        try:
            error = fails(f"127.0.0.1:{port}", timeout=10)
        finally:
            server.kill()
    assert "is it an sshd" in str(error) or "closed the connection" in str(error) or "failed" in str(error)


def test_an_unknown_host_key(server: Server, fails: Failure, tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    error = fails("host1", sshflags=["-o", f"UserKnownHostsFile={known}"], timeout=20)
    assert "is not known" in str(error) and "log in once" in str(error).lower()
    assert not known.exists(), "nobody has accepted it"


def test_an_unknown_host_key_is_accepted_on_demand(server: Server, ssh: Any, tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    flags = ["-o", f"UserKnownHostsFile={known}", "-o", "StrictHostKeyChecking=accept-new"]
    rmprocs(distpool.addprocs(["host1"], **options(server, ssh, sshflags=flags)))
    assert f"[127.0.0.1]:{server.port} ssh-ed25519 " in known.read_text()
    flags = flags[:2]
    rmprocs(distpool.addprocs(["host1"], **options(server, ssh, sshflags=flags)))


def test_a_changed_host_key(server: Server, fails: Failure, tmp_path: Path) -> None:
    kind, key, *_ = keygen(tmp_path / "other").with_suffix(".pub").read_text().split()
    known = tmp_path / "known_hosts"
    known.write_text(f"[127.0.0.1]:{server.port} {kind} {key}\n")
    for strict in ("yes", "accept-new"):
        flags = ["-o", f"UserKnownHostsFile={known}", "-o", f"StrictHostKeyChecking={strict}"]
        error = fails("host1", sshflags=flags, timeout=20)
        assert "CHANGED" in str(error) and "ssh-keygen" in str(error) and str(known) in str(error)


def test_a_wrong_key(fails: Failure, server: Server, tmp_path: Path) -> None:
    server_config = server.config.read_text().replace(str(server.key), str(keygen(tmp_path / "wrong")))
    (tmp_path / "config").write_text(server_config)
    error = fails("host1", sshflags=["-F", str(tmp_path / "config")], timeout=20)
    assert "refuses the login" in str(error) and "takes none of the keys" in str(error)
    assert "IdentityFile" in str(error) and "ssh-copy-id" in str(error)


def test_a_key_that_is_not_there(fails: Failure, server: Server, tmp_path: Path) -> None:
    (tmp_path / "config").write_text(server.config.read_text().replace(str(server.key), str(tmp_path / "nothing")))
    error = fails("host1", sshflags=["-F", str(tmp_path / "config")], timeout=20)
    assert "refuses the login" in str(error)


def test_no_such_user(fails: Failure) -> None:
    assert "refuses the login" in str(fails("nobody-of-that-name@host1", timeout=20))


def test_no_such_client(server: Server) -> None:
    with pytest.raises(distpool.CompositeException, match="there is no SSH program '/no/ssh'"):
        distpool.addprocs(["host1"], **options(server, "/no/ssh"))
    assert distpool.procs() == [1]


# -- behind the login --------------------------------------------------------------------------------------------


def test_a_wrong_path_of_python(fails: Failure) -> None:
    error = fails("host1", exename="/no/such/python")
    assert "no Python is found there: name its path with exename=" in str(error) and "/no/such/python" in error.output


def test_python_is_not_executable(fails: Failure, tmp_path: Path) -> None:
    path = tmp_path / "python"
    path.write_text("")
    assert "may not be executed" in str(fails("host1", exename=str(path)))


def test_no_python_at_all(fails: Failure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sh").symlink_to("/bin/sh")
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    error = fails("host1", exename=None, env={"PATH": str(tmp_path)})
    assert "no Python is found there" in str(error)


def test_distpool_is_missing(fails: Failure) -> None:
    error = fails("host1", exeflags=["-S", "-E", "-P"], bootstrap=False)
    assert "distpool is not installed for the Python there" in str(error)


def test_a_full_disk(fails: Failure, tmp_path: Path) -> None:
    stub = script(tmp_path / "python", "#!/bin/sh\necho 'OSError: [Errno 28] No space left on device' >&2\nexit 1\n")
    assert "its disk is full" in str(fails("host1", exename=stub))


def test_what_is_started_is_something_else(fails: Failure, tmp_path: Path) -> None:
    error = fails("host1", exename=script(tmp_path / "python", "#!/bin/sh\necho one\necho two >&2\nexit 7\n"))
    assert "exit code 7 before a worker had started" in str(error)
    assert set(error.output.split()) == {"one", "two"}


def test_it_says_nothing_for_ever(fails: Failure, tmp_path: Path) -> None:
    stub = script(tmp_path / "python", "#!/bin/sh\necho waiting\nexec sleep 60\n")
    error = fails("host1", exename=stub, timeout=4, within=14)
    assert "no worker reported within 4 seconds" in str(error) and "waiting" in error.output


def test_C201_it_talks_too_much(fails: Failure, tmp_path: Path) -> None:
    stub = script(tmp_path / "python", "#!/bin/sh\nexec yes nothing of ours\n")
    error = fails("host1", exename=stub)
    assert "more than 1000 lines" in str(error) and "nothing of ours" in error.output


def with_shell(directory: Path, rc: str) -> Server:
    """An sshd whose shells run `rc` first."""
    directory.mkdir()
    (directory / "rc").write_text(rc)
    rc_file = shlex.quote(str(directory / "rc"))
    return Server(directory / "sshd", f'ForceCommand . {rc_file}; exec sh -c "$SSH_ORIGINAL_COMMAND"')


@pytest.mark.parametrize(
    "rc",
    [
        "for i in $(seq 900); do echo Welcome $i; done; echo to stderr >&2",
        "printf 'no end of line'; printf 'also here' >&2",
        "printf 'distpool_work'; printf '\\377\\376\\0binary\\n'",
    ],
    ids=["lines", "unfinished", "strange"],
)
def test_C201_shells_that_print(ssh: Any, tmp_path: Path, rc: str) -> None:
    if missing():
        pytest.skip(missing())
    server = with_shell(tmp_path / "h", rc)
    try:
        (pid,) = distpool.addprocs(["host1"], **options(server, ssh))
        assert remotecall_fetch(abs, pid, -1) == 1
        rmprocs(pid)
    finally:
        server.stop()


@pytest.mark.parametrize(("rc", "said"), [("echo 'Account expired.'; exit 1", "Account expired."), ("kill -9 $$", "")])
def test_shells_that_end(ssh: Any, tmp_path: Path, rc: str, said: str) -> None:
    if missing():
        pytest.skip(missing())
    server = with_shell(tmp_path / "h", rc)
    try:
        with pytest.raises(distpool.CompositeException) as info:
            distpool.addprocs(["host1"], **options(server, ssh))
        assert said in str(info.value.exceptions[0]) and "before a worker had started" in str(info.value.exceptions[0])
    finally:
        server.stop()


def test_tcsh(ssh: Any, tmp_path: Path, server: Server) -> None:
    """A login shell in which `A=1 command`, `2>` and `!` do not work."""
    import shutil

    if shutil.which("tcsh") is None:
        pytest.skip("needs tcsh (Debian: apt-get install tcsh)")
    csh = Server(tmp_path / "sshd", 'ForceCommand exec tcsh -c "$SSH_ORIGINAL_COMMAND"')
    try:
        env = {"PYTHONSTRANGE": 'it\'s !here! \\ $HOME `x` "q" ~ * {a,b}\nnext', "OTHER": "a!b"}
        pids = distpool.addprocs([("host1", 2)], **options(csh, ssh, shell="csh", env=env))
        for name, value in env.items():
            assert remotecall_fetch(__import__("os").getenv, pids[1], name) == value
        rmprocs(pids)
        pids = distpool.addprocs(["host1"], **options(csh, ssh, exename=None))  # also without being told
        rmprocs(pids)
    finally:
        csh.stop()


# -- several -----------------------------------------------------------------------------------------------------


def test_C203_the_good_ones_stay(server: Server, ssh: Any) -> None:
    bad = [f"127.0.0.1:{free_port()}", "no-such-host.invalid"]
    with pytest.raises(distpool.CompositeException) as info:
        distpool.addprocs([bad[0], ("host1", 2), bad[1], "host2"], **options(server, ssh))
    assert sorted(error.host for error in info.value.exceptions) == ["127.0.0.1", "no-such-host.invalid"]
    pids = distpool.workers()
    assert len(pids) == 3 and [remotecall_fetch(abs, pid, -1) for pid in pids] == [1, 1, 1]
    rmprocs(pids)


@pytest.mark.skipif(sys.platform != "linux", reason="full queues drop connections on Linux only")
def test_each_host_has_a_deadline_of_its_own(server: Server, ssh: Any) -> None:
    """Hosts that wait for their turn behind dead ones still get their time."""
    with black_hole() as port:
        dead = [f"user{number}@127.0.0.1:{port}" for number in range(4)]
        with pytest.raises(distpool.CompositeException) as info:
            distpool.addprocs([*dead, "host1"], **options(server, ssh, max_parallel=2, timeout=3))
    assert len(info.value.exceptions) == 4 and len(distpool.workers()) == 1
    rmprocs(distpool.workers())


def test_what_paramiko_logs_is_not_printed() -> None:
    """Seen: the traceback of its thread on stderr, in programs of which distpool itself had not logged anything."""
    source = """if True:
        import socket, threading, distpool
        listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=lambda: listener.accept()[0].close(), daemon=True).start()
        try:
            distpool.addprocs([f"127.0.0.1:{listener.getsockname()[1]}"], timeout=10)
        except distpool.CompositeException as error:
            print("does not talk SSH" in str(error))
    """
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
