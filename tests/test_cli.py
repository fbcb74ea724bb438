"""`python -m distpool`: a worker started by hand serves, `top` shows what a program does, bad usage is refused."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import distpool
from distpool import cli
from distpool.joining import start_workers
from distpool.managers.base import ClusterManager, parse_header
from distpool.managers.record import WorkerConfig
from distpool.node import node as nodes
from distpool.node.group import Member
from distpool.wire import messages
from distpool.wire.frames import Frame, Kind

COMMAND = [sys.executable, "-m", "distpool"]


def command(*args: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *args], capture_output=True, text=True, timeout=50, check=False, **more)


def usage_error(*args: str) -> str:
    """What argparse says."""
    stream = io.StringIO()
    with contextlib.redirect_stderr(stream), pytest.raises(SystemExit) as caught:
        cli.main(args)
    assert caught.value.code == 2
    return stream.getvalue()


def test_help_and_nothing() -> None:
    done = command("--help")
    assert done.returncode == 0 and "worker" in done.stdout and "top" in done.stdout
    assert command().returncode == 2
    assert "COMMAND" in usage_error()
    assert "invalid choice" in usage_error("no-such-command")


# -- worker --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def worker_process(*args: str, cookie: str = "", **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [*COMMAND, "worker", *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more
    )
    assert process.stdin is not None
    try:
        if cookie:
            process.stdin.write(cookie.encode() + b"\n")
            process.stdin.flush()
        yield process
    finally:
        process.kill()
        process.communicate()


def header(process: subprocess.Popen[bytes]) -> tuple[str, int]:
    assert process.stdout is not None
    line = process.stdout.readline().decode()
    assert re.fullmatch(r"distpool_worker:\d+#\S+\n", line)
    found = parse_header(line)
    assert found is not None
    return found


class ByHand(ClusterManager):
    """Knows where a worker listens that somebody else has started."""

    def __init__(self, host: str, port: int) -> None:
        self.config = WorkerConfig(host=host, port=port)

    def launch(self, params: dict[str, Any]) -> list[WorkerConfig]:
        return [self.config]


def ask_for_stacks(host: str, port: int) -> str:
    """Join the worker, ask it something, let it go."""
    answers: list[str] = []
    joined, answered, gone = threading.Event(), threading.Event(), threading.Event()
    members: list[Member] = []

    def prepare(member: Member) -> None:
        members.append(member)
        member.on_joined = lambda _: joined.set()
        member.on_gone = lambda _, reason: (joined.set(), answered.set(), gone.set())  # type: ignore[func-returns-value]
        member.on_frame = on_frame

    def on_frame(member: Member, frame: Frame) -> None:
        if frame.kind == Kind.STACKS_ARE:
            answers.append(bytes(frame.body).decode())
            answered.set()

    node = nodes.current()
    former = node.handlers.pop(Kind.STACKS_ARE, None)
    try:
        start_workers(node, ByHand(host, port), {"timeout": 20}, prepare, lambda count, error: None)
        assert joined.wait(30)
        (member,) = members
        assert member.link is not None and not gone.is_set(), member.launch_error()
        member.link.send(Kind.STACKS, messages.Stacks(1).pack())
        assert answered.wait(20)
        node.loop.call_soon(lambda: member.say_goodbye(5))
        assert gone.wait(20)
    finally:
        if former is not None:
            node.handlers[Kind.STACKS_ARE] = former
    return answers[0]


@pytest.mark.parametrize("name", ["DISTPOOL_WORKER_TIMEOUT", "DISTPOOL_SILENT_SECONDS"])
def test_a_worker_with_a_bad_variable_says_so_in_one_line(name: str) -> None:
    command = [*COMMAND, "worker", "--worker=abc"]
    done = subprocess.run(command, env={**os.environ, name: "soon"}, capture_output=True, text=True, timeout=50)
    said = f"distpool: {name} must be a number of seconds greater than 0, not 'soon'\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        *(("true", True), ("FALSE", False), ("False", False), ("none", None), ("Null", "Null")),
        *(("3", 3), ("[1, 2]", [1, 2]), ("/a/b", "/a/b"), ("", ""), ("'true'", "true")),
    ],
)
def test_values_of_options(said: str, meant: Any) -> None:
    assert cli._option(f"name={said}") == ("name", meant)


def test_a_worker_with_its_cookie_from_stdin_serves() -> None:
    with worker_process("--bind-to", "127.0.0.1", cookie=nodes.current().cookie) as process:
        host, port = header(process)
        assert host == "127.0.0.1" and port > 0
        assert "MainThread" in ask_for_stacks(host, port)
        assert process.wait(20) == 0


def test_a_worker_with_its_cookie_from_the_option() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    cookie = nodes.current().cookie
    with worker_process(f"--worker={cookie}", "--bind-to", f"127.0.0.1:{port}") as process:
        assert header(process) == ("127.0.0.1", port)
        assert "MainThread" in ask_for_stacks("127.0.0.1", port)
        assert process.wait(20) == 0


def test_a_cookie_with_blanks_at_its_ends() -> None:
    """The worker stripped them off, and knew another cookie than its master."""
    node = nodes.current()
    former = node.cookie
    node.cookie = "\t with blanks "
    try:
        with worker_process("--bind-to", "127.0.0.1", cookie=node.cookie) as process:
            assert "MainThread" in ask_for_stacks(*header(process))
            assert process.wait(20) == 0
    finally:
        node.cookie = former


def test_no_cookie_no_service() -> None:
    with worker_process("--worker=wrong", "--bind-to", "127.0.0.1") as process:
        host, port = header(process)
        with pytest.raises(AssertionError, match="uthenticat|credentials|cookie"):
            ask_for_stacks(host, port)
        assert process.poll() is None, "a stranger does not end it"


def test_without_a_master_it_ends() -> None:
    env = {**os.environ, "DISTPOOL_WORKER_TIMEOUT": "0.5"}
    with worker_process(cookie="abc", env=env) as process:
        host, _ = header(process)
        assert host
        assert process.stdout is not None
        assert process.wait(20) == 1
        assert b"could not connect within 0.5 seconds" in process.stdout.read()


@pytest.mark.parametrize("text", ["", "x" * 65 + "\n", "käse\n", "\n"])
def test_bad_cookies_on_stdin(text: str) -> None:
    done = command("worker", input=text)
    assert done.returncode == 1
    assert "cookie" in done.stderr and done.stdout == ""


def test_bad_cookies_and_addresses(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["worker", "--worker="]) == 1
    assert cli.main(["worker", "--worker=" + "x" * 65]) == 1
    assert "cookie" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["worker", "--worker=abc", "--bind-to", f"127.0.0.1:{port}"]) == 1
    assert "cannot listen" in capsys.readouterr().err
    assert cli.main(["worker", "--worker=abc", "--bind-to", "no-such-host.invalid"]) == 1
    for text in ("127.0.0.1:", ":9", "host:port", "[::1", "[::1]9", "127.0.0.1:99999", ""):
        assert "ADDR[:PORT]" in usage_error("worker", "--worker=abc", "--bind-to", text)


@pytest.mark.parametrize(
    "text, expected",
    [
        *(("10.0.0.7", ("10.0.0.7", 0)), ("h:9009", ("h", 9009))),
        *(("::1", ("::1", 0)), ("[::1]:8", ("::1", 8)), ("[::1]", ("::1", 0))),
    ],
)
def test_bind_addresses(text: str, expected: tuple[str, int]) -> None:
    assert cli.bind_address(text) == expected


# -- top -----------------------------------------------------------------------------------------------------------

PROGRAM = """
import sys, time, distpool
with distpool.ClusterExecutor(2) as ex:
    ex.submit(pow, 2, 3).result()
    future = ex.options(label="a long call").submit(time.sleep, 60)
    while len(ex.workers) < 2 or not any(row["running"] for row in ex.stats()):
        time.sleep(0.01)
    print("running", flush=True)
    sys.stdin.readline()
    ex.kill_workers()
"""


@contextlib.contextmanager
def program(address: str) -> Iterator[subprocess.Popen[str]]:
    """A program that runs a long call until its stdin ends, watched at `address`."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "DISTPOOL_TOP": address},
        text=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "running\n", process.communicate()[1]
        yield process
    finally:
        try:
            process.communicate("\n", timeout=20)
        finally:
            process.kill()
            process.wait()


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_once_over_a_private_socket(tmp_path: Path) -> None:
    path = tmp_path / "top.sock"
    with program(str(path)) as watched:
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        done = command("top", str(path), "--once")
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert lines[0].split() == "pid host ospid cpu % memory done failed queued in out since running".split()
        assert len(lines) == 3
        assert sum("a long call" in line for line in lines) == 1
        assert "\x1b" not in done.stdout
        # A second program with the same variable runs all the same.
        with program(str(path)) as other:
            assert command("top", str(path), "--once").stdout.splitlines()[1].split()[2] == lines[1].split()[2]
            assert other.poll() is None
        assert watched.poll() is None
    assert not path.exists(), "no file outlives the program"


@pytest.mark.parametrize("way", ["addprocs", "run"])
def test_a_program_without_executors_is_watched(tmp_path: Path, way: str) -> None:
    path = tmp_path / "top.sock"
    source = "import sys, distpool; print('running', flush=True); sys.stdin.readline()"
    if way == "addprocs":
        command_line = [sys.executable, "-c", source.replace("distpool;", "distpool; distpool.addprocs(2);", 1)]
    else:
        command_line = [*COMMAND, "run", "-p", "2", "-c", source]
    environment = {**os.environ, "DISTPOOL_TOP": str(path)}
    with subprocess.Popen(
        command_line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        done = command("top", str(path), "--once")
        process.communicate("\n", timeout=20)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3, "a line of titles and two workers"


def test_run_refuses_an_address_that_others_reach() -> None:
    environment = {**os.environ, "DISTPOOL_TOP": "0.0.0.0:8790"}
    done = command("run", "-p", "1", "-c", "print('ran')", env=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("distpool: DISTPOOL_TOP must be a loopback address")


def test_a_killed_program_s_socket_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "top.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with program(str(path)):
        assert command("top", str(path), "--once").returncode == 0


def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with program(str(path)):
        assert path.read_text() == "data"
    assert path.read_text() == "data"


def test_live_until_the_program_ends() -> None:
    address = free_address()
    with program(address):
        process = subprocess.Popen([*COMMAND, "top", address, "--interval", "0.1"], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        seen = ""
        while seen.count("(Ctrl-C ends)") < 3:
            seen += process.stdout.read(1)
    rest, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "a long call" in seen and "\x1b[H" in seen
    assert "2 workers, 1 busy" in seen
    assert rest.endswith("the program has ended\n")


def test_ctrl_c_ends_it_quietly() -> None:
    address = free_address()
    with program(address):
        process = subprocess.Popen(
            [*COMMAND, "top", address], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 0 and errors == ""


def test_the_endpoint_answers_nothing_else() -> None:
    address = free_address()
    host, _, port = address.rpartition(":")
    with program(address):
        for request in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"x" * 10_000, b"\n", b"stats me\n"):
            with socket.create_connection((host, int(port)), 10) as client:
                with contextlib.suppress(ConnectionError):
                    client.sendall(request)
                    assert client.recv(100) == b""
        clients = [socket.create_connection((host, int(port)), 10) for _ in range(12)]
        for client in clients:
            client.close()
        deadline = time.monotonic() + 20
        while command("top", address, "--once").returncode:
            assert time.monotonic() < deadline, "they gave their places back"


def test_addresses_that_others_reach_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    node = nodes.current()
    former, node.top = node.top, None
    try:
        for text in ("0.0.0.0:8790", "192.0.2.1:1", "example.org:80", "nonsense", "127.0.0.1:99999", "[::]:80"):
            monkeypatch.setenv("DISTPOOL_TOP", text)
            with pytest.raises(ValueError, match=re.escape(text)):
                distpool.ClusterExecutor(1)
            assert node.top is None
    finally:
        node.top = former


def test_top_without_a_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", free_address(), "--once"]) == 1
    assert "DISTPOOL_TOP" in capsys.readouterr().err
    assert "HOST:PORT" in usage_error("top", "nonsense")
    for seconds in ("0", "-1", "nan", "inf", "soon"):
        assert "positive" in usage_error("top", "127.0.0.1:1", "--interval", seconds)


def test_top_meets_something_else(capsys: pytest.CaptureFixture[str]) -> None:
    """A server that is none of ours: an error, no hang."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            client, _ = server.accept()
            with client:
                client.recv(100)
                client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert cli.main(["top", f"127.0.0.1:{server.getsockname()[1]}", "--once"]) == 1
        thread.join(10)
    assert capsys.readouterr().err.startswith("distpool: ")


def test_answers_are_json_lines() -> None:
    """What another tool than `top` may rely on."""
    address = free_address()
    host, _, port = address.rpartition(":")
    with program(address), socket.create_connection((host, int(port)), 10) as client, client.makefile("rwb") as stream:

        def ask() -> Any:
            stream.write(b"stats\n")
            stream.flush()
            return json.loads(stream.readline())

        end = time.monotonic() + 20
        while len(ask()["workers"]) < 2:  # the second one may still be coming up
            assert time.monotonic() < end
        for _ in range(2):
            answer = ask()
            assert [entry["pid"] for entry in answer["workers"]] == [2, 3]
