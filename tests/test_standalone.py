"""Workers that were not started by distpool: what they are told, what they announce, and what is refused."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distpool import config, standalone
from distpool.managers.base import parse_header
from distpool.node import node as nodes

REPO = str(Path(__file__).resolve().parents[1])


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.BytesIO]:
    """What descriptor 0 gives, without taking it from pytest."""
    source = io.BytesIO()
    monkeypatch.setattr(standalone, "os", SimpleNamespace(read=lambda descriptor, size: source.read(size)))
    yield source


@pytest.mark.parametrize(
    ("data", "cookie", "rest"),
    [
        (b"abc\nrest", "abc", b"rest"),
        (b"abc\r\n", "abc", b""),
        (b" a b\t\n", " a b\t", b""),
        (b"abc", "abc", b""),
        (b"", "", b""),
        (b"\nabc", "", b"abc"),
    ],
)
def test_the_first_line_and_not_a_byte_more(stdin: io.BytesIO, data: bytes, cookie: str, rest: bytes) -> None:
    stdin.write(data)
    stdin.seek(0)
    assert standalone.read_cookie() == cookie and stdin.read() == rest


def test_a_line_without_an_end_is_no_cookie_and_is_not_read_for_ever(stdin: io.BytesIO) -> None:
    stdin.write(b"x" * 1000)
    stdin.seek(0)
    with pytest.raises(ValueError):
        config.check_cookie(standalone.read_cookie())
    assert stdin.tell() < 100


@pytest.mark.parametrize("out", [io.StringIO(), io.BytesIO()])
def test_the_header_goes_where_it_is_wanted(out: Any) -> None:
    standalone.announce(out, "distpool_worker:1#h\n")
    line = out.getvalue()
    assert parse_header(line if isinstance(line, str) else line.decode()) == ("h", 1)


def test_the_header_is_flushed_and_written_at_once() -> None:
    class Out:
        said: list[Any] = []

        def write(self, data: bytes) -> None:
            self.said.append(data)

        def flush(self) -> None:
            self.said.append("flush")

    standalone.announce(Out(), "line\n")
    assert Out.said == [b"line\n", "flush"]


def test_the_header_comes_behind_what_was_printed() -> None:
    code = (
        f"import sys; sys.path.insert(0, {REPO!r}); from distpool import standalone\n"
        "print('before', end=' '); standalone.announce(None, 'header\\n')\n"
        "standalone.redirect(True, True); print(repr(sys.stdin.read())); sys.stdout.flush()\n"
        "print('error', file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], input="not for you", capture_output=True, text=True, check=True)
    assert done.stdout == "before header\n''\nerror\n" and done.stderr == ""


@pytest.mark.parametrize("stream", ["sys.stderr", "sys.stderr.buffer", "open(2, 'wb', closefd=False)"])
def test_the_header_goes_to_stderr_if_that_was_wanted(stream: str) -> None:
    """It went to stdout: errors are redirected to there before."""
    code = (
        f"import sys; sys.path.insert(0, {REPO!r}); import distpool\n"
        f"print('error', file=sys.stderr); distpool.start_worker({stream}, 'cookie')"
    )
    environment = {**os.environ, "DISTPOOL_WORKER_TIMEOUT": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    first, header, *rest = done.stderr.splitlines()
    assert first == "error" and rest == [] and parse_header(header) is not None
    assert parse_header(done.stdout) is None and "could not connect" in done.stdout


def test_streams_that_are_to_stay() -> None:
    code = (
        f"import sys; sys.path.insert(0, {REPO!r}); from distpool import standalone\n"
        "standalone.redirect(False, False); print(sys.stdin.read()); print('error', file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], input="yours", capture_output=True, text=True, check=True)
    assert done.stdout == "yours\n" and done.stderr == "error\n"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_listening(host: str) -> None:
    if ":" in host and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        listener = standalone.listen(host, 0)
    except OSError:
        if ":" in host:
            pytest.skip("no IPv6 here")
        raise
    with listener:
        address = listener.getsockname()[:2]
        socket.create_connection(address, 10).close()
        with pytest.raises(OSError):
            standalone.listen(host, address[1])
    standalone.listen(host, address[1]).close()  # the one before must not keep its successor out


def test_where_nobody_can_listen() -> None:
    for host in ("192.0.2.1", "no-such-host.invalid"):
        with pytest.raises(OSError):
            standalone.listen(host, 0)


# -- who is in a group already ---------------------------------------------------------------------------------------


class Existing:
    """A node of this process."""

    def __init__(self, worker: Any = None, group: Any = None) -> None:
        self.worker, self.group = worker, group


@pytest.mark.parametrize("existing", [Existing(worker=object()), Existing(group=object())])
def test_a_member_cannot_become_a_worker(existing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "existing", lambda: existing)
    for use in (
        lambda: standalone.init_worker("c"),
        lambda: standalone.start_worker(cookie="c"),
        standalone.check_unused,
    ):
        with pytest.raises(RuntimeError, match="belongs to a process group"):
            use()


@pytest.mark.parametrize("existing", [None, Existing()])
def test_what_is_checked_first(existing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before this process is changed in any way."""
    monkeypatch.setattr(nodes, "existing", lambda: existing)
    monkeypatch.setattr(standalone, "redirect", lambda *arguments: pytest.fail("too early"))
    standalone.check_unused()
    with pytest.raises(ValueError, match="cookie"):
        standalone.init_worker("")
    with pytest.raises(ValueError, match="cookie"):
        standalone.start_worker(cookie="")
    with pytest.raises(OSError):
        standalone.serve(None, "c", "192.0.2.1", 0)
    with pytest.raises(RuntimeError, match="call init_worker first"):
        standalone.process_messages(None, None)


def test_streams_are_checked_in_the_thread_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "existing", lambda: Existing(worker=object()))
    with pytest.raises(TypeError):
        standalone.process_messages(object(), object())


def test_descriptors_are_not_left_open() -> None:
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(3):
        with pytest.raises(OSError):
            standalone.listen("192.0.2.1", 0)
    assert not before or len(os.listdir("/proc/self/fd")) <= before
