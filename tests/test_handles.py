"""Processes and outputs of managers of others, as the group wants them."""

from __future__ import annotations

import io
import os
import selectors
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import PATIENCE
from wires import until

from distpool.managers import handles
from distpool.managers.handles import PopenHandle, open_output
from distpool.transport.ioloop import IoLoop


@pytest.fixture
def loop() -> Iterator[IoLoop]:
    made = IoLoop("test-io")
    made.start()
    yield made
    made.stop()


@pytest.fixture
def cat() -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends when its stdin does."""
    made = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    yield made
    made.kill()
    made.wait()
    assert made.stdin is not None
    made.stdin.close()


def end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()


class Ended:
    """An exit callback."""

    def __init__(self) -> None:
        self.codes: list[int | None] = []
        self.event = threading.Event()

    def __call__(self, code: int | None) -> None:
        self.codes.append(code)
        self.event.set()


def no_descriptor(pid: int) -> int:
    raise OSError("none left")


@pytest.mark.parametrize("pidfd", [True, False])
def test_the_exit_is_told_once_to_each(
    loop: IoLoop, cat: subprocess.Popen[bytes], pidfd: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not pidfd:
        monkeypatch.setattr(os, "pidfd_open", no_descriptor, raising=False)
    handle = PopenHandle(loop, cat)
    told = [Ended(), Ended()]
    for each in told:
        handle.add_exit_callback(each)
    assert not handle.exited and handle.exitcode is None and "running" in repr(handle)
    assert not handle.has_ended
    cat.send_signal(signal.SIGTERM)
    for each in told:
        assert each.event.wait(PATIENCE)
    late = Ended()
    handle.add_exit_callback(late)
    assert [each.codes for each in (*told, late)] == [[-signal.SIGTERM]] * 3
    assert handle.exited and handle.exitcode == -signal.SIGTERM and "exited" in repr(handle)
    assert handle.has_ended
    assert handle._pidfd == -1


def test_an_exit_while_somebody_asks_is_told_once(loop: IoLoop, cat: subprocess.Popen[bytes]) -> None:
    """The leader looks just when the callback has been noted."""
    handle = PopenHandle(loop, cat)
    handle.add_exit_callback(lambda code: None)

    class Lock:
        def __enter__(self) -> None:
            pass

        def __exit__(self, *error: object) -> None:
            handle._lock = threading.Lock()
            end(cat)
            until(lambda: handle.exited, "the leader has looked")

    told = Ended()
    handle._lock = Lock()  # type: ignore[assignment]
    handle.add_exit_callback(told)
    assert told.event.wait(PATIENCE)
    assert told.codes == [0]


def test_a_process_that_the_manager_has_reaped(loop: IoLoop, cat: subprocess.Popen[bytes]) -> None:
    end(cat)
    cat.wait()
    told = Ended()
    PopenHandle(loop, cat).add_exit_callback(told)
    assert told.event.wait(PATIENCE) and told.codes == [0]


def test_one_that_was_reaped_and_whose_process_id_somebody_else_has(loop: IoLoop, cat: subprocess.Popen[bytes]) -> None:
    end(cat)
    cat.wait()
    handle = PopenHandle(loop, cat)
    handle.ospid = os.getpid()
    told = Ended()
    handle.add_exit_callback(told)
    assert told.event.wait(PATIENCE) and told.codes == [0]


def test_somebody_else_waits_for_it_at_this_moment(
    loop: IoLoop, cat: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then `poll` says None although the process has ended; it is asked again."""
    monkeypatch.setattr(handles, "_AGAIN", 0.001)
    answers = iter([None, None])
    poll = cat.poll
    monkeypatch.setattr(cat, "poll", lambda: next(answers, poll()))
    told = Ended()
    PopenHandle(loop, cat).add_exit_callback(told)
    end(cat)
    assert told.event.wait(PATIENCE) and told.codes == [0] and next(answers, "used up") == "used up"


def test_a_process_of_several_workers_is_killed_for_the_last(loop: IoLoop) -> None:
    class Process:
        pid = 1
        signals: list[int] = []

        def send_signal(self, signum: int) -> None:
            self.signals.append(signum)
            raise ProcessLookupError

    process: Any = Process()
    handle = PopenHandle(loop, process)
    assert handle.retain().retain() is handle
    handle.kill()
    assert process.signals == []
    handle.release()
    handle.kill()
    handle.release()
    handle.kill(signal.SIGINT)
    assert process.signals == [signal.SIGKILL, signal.SIGINT]


def test_a_forked_child_only_closes(loop: IoLoop, cat: subprocess.Popen[bytes]) -> None:
    handle = PopenHandle(loop, cat)
    handle.forget()
    handle._pidfd = os.open(os.devnull, os.O_RDONLY)
    number = handle._pidfd
    handle.forget()
    with pytest.raises(OSError):
        os.fstat(number)
    assert cat.poll() is None


# -- output ----------------------------------------------------------------------------------------------------------


def rest(descriptor: int) -> bytes:
    with selectors.DefaultSelector() as selector:  # as the I/O loop does
        selector.register(descriptor, selectors.EVENT_READ)
    os.set_blocking(descriptor, True)
    with open(descriptor, "rb") as file:
        return file.read()


@pytest.mark.parametrize("buffering", [0, -1])
def test_a_pipe_is_ours_and_what_was_read_ahead_comes_along(buffering: int) -> None:
    reader, writer = os.pipe()
    source = open(reader, "rb", buffering)
    os.write(writer, b"one\ntwo\n")
    assert source.readline() == b"one\n"
    descriptor, early = open_output(source)
    os.write(writer, b"three\n")
    os.close(writer)
    source.close()  # ours stays
    assert early + rest(descriptor) == b"two\nthree\n"


def test_a_pipe_in_which_nothing_is_yet() -> None:
    reader, writer = os.pipe()
    with open(reader, "rb") as source:
        descriptor, early = open_output(source)  # does not wait
        os.write(writer, b"x")
        os.close(writer)
        assert early == b"" and rest(descriptor) == b"x"


def test_a_readable_without_a_descriptor_is_copied() -> None:
    descriptor, early = open_output(io.BytesIO(b"x" * 100_000))
    assert early == b"" and rest(descriptor) == b"x" * 100_000


@pytest.mark.parametrize("error", [OSError, ValueError, ZeroDivisionError])
def test_whatever_a_readable_raises_is_its_end(error: type[Exception]) -> None:
    class Readable:
        parts = iter([b"abc"])

        def readinto(self, buffer: bytearray) -> int:
            for part in self.parts:
                buffer[: len(part)] = part
                return len(part)
            raise error

    assert rest(open_output(Readable())[0]) == b"abc"


@pytest.mark.parametrize("mode", ["rb", "rb, unbuffered", "temporary"])
def test_a_file_is_copied(tmp_path: Path, mode: str) -> None:
    """A scheduler's `job.out`: no poller takes a regular file."""
    path = tmp_path / "job.out"
    path.write_bytes(b"header\n" + b"x" * 100_000)
    if mode == "temporary":
        with tempfile.NamedTemporaryFile() as source:
            source.write(path.read_bytes())
            source.seek(0)
            assert rest(open_output(source)[0]) == path.read_bytes()
        return
    with open(path, "rb", 0 if "," in mode else -1) as source:
        first = source.readline() if "," not in mode else b""
        descriptor, early = open_output(source)
        assert first + early + rest(descriptor) == path.read_bytes()


@pytest.mark.skipif(not os.path.exists("/dev/null"), reason="no such device here")
def test_a_device_that_cannot_be_polled() -> None:
    with open("/dev/null", "rb") as source:
        assert rest(open_output(source)[0]) == b""


class OnlyRead:
    """As a manager may hand over: each call waits until it has all that was asked for."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def read(self, size: int = -1) -> Any:
        return self.source.read(size)


class Lines(OnlyRead):
    def readline(self) -> Any:
        return self.source.readline()


class BufferedInto(io.BufferedIOBase):
    def __init__(self, source: Any) -> None:
        self.source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> Any:
        return self.source.readinto1(memoryview(buffer)[:1000])


@pytest.mark.parametrize("wrap", [OnlyRead, Lines, BufferedInto])
def test_readables_with_little_to_offer(wrap: Any) -> None:
    reader, writer = os.pipe()
    with open(reader, "rb") as source:
        descriptor, early = open_output(wrap(source))
        assert early == b""
        os.write(writer, b"header\n")
        os.set_blocking(descriptor, True)
        with open(descriptor, "rb") as file:
            assert file.readline() == b"header\n", "although nothing else has come"
            os.write(writer, b"more")
            os.close(writer)
            assert file.read() == b"more"


def test_a_socket() -> None:
    left, right = socket.socketpair()
    with left, right:
        left.sendall(b"x")
        left.shutdown(socket.SHUT_WR)
        assert rest(open_output(right)[0]) == b"x"


def test_what_cannot_be_read() -> None:
    with pytest.raises(TypeError):
        open_output(object())
