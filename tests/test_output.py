"""What workers print: whole lines, in order, through the user's own stdout, and bounded."""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from wires import PATIENCE, until

from distpool import config
from distpool.node.output import OutputReader
from distpool.node.threads import SerialQueue, ThreadCache
from distpool.transport.ioloop import IoLoop

PREFIX = "      From worker 7:\t"


class Setup:
    def __init__(self) -> None:
        self.loop = IoLoop("output")
        self.loop.start()
        self.notices = SerialQueue(ThreadCache("notices"))
        self.reading, self.writing = os.pipe()
        self.hook: Any = None
        self.ended = threading.Event()
        self.open = True

    def reader(self, early: bytes = b"") -> OutputReader:
        made: list[OutputReader] = []
        done = threading.Event()

        def make() -> None:
            made.append(OutputReader(self.loop, self.reading, 7, self.notices, lambda: self.hook, early))
            made[0].on_end = self.ended.set
            done.set()

        self.loop.call_soon(make)
        assert done.wait(PATIENCE)
        return made[0]

    def write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self.writing, data) :]

    def end(self) -> None:
        """The worker is gone: all it said is printed."""
        if self.open:
            self.open = False
            os.close(self.writing)
        assert self.ended.wait(PATIENCE)
        assert self.notices.join(PATIENCE)


@pytest.fixture
def setup() -> Iterator[Setup]:
    made = Setup()
    yield made
    if made.open:
        os.close(made.writing)
    made.loop.stop()


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """All that has been printed so far."""
    so_far: list[str] = []

    def look() -> str:
        so_far.append(capsys.readouterr().out)
        return "".join(so_far)

    return look


def test_lines_get_their_prefix(setup: Setup, printed: Callable[[], str]) -> None:
    setup.reader()
    setup.write(b"one\ntwo\n\nfo")
    setup.write(b"ur\n")
    setup.end()
    assert printed() == "".join(f"{PREFIX}{line}\n" for line in ("one", "two", "", "four"))


def test_a_last_line_without_an_end(setup: Setup, printed: Callable[[], str]) -> None:
    reader = setup.reader()
    setup.write(b"whole\nnot whole")
    setup.end()
    assert printed() == f"{PREFIX}whole\n{PREFIX}not whole\n"
    assert list(reader.tail) == ["whole", "not whole"] and reader.ended


def test_early_output(setup: Setup, printed: Callable[[], str]) -> None:
    """What was read with the header line already."""
    setup.reader(b"early\nbegin")
    setup.write(b"ning\n")
    setup.end()
    assert printed() == f"{PREFIX}early\n{PREFIX}beginning\n"


def test_characters_cut_in_pieces_and_bytes_that_are_none(setup: Setup, printed: Callable[[], str]) -> None:
    setup.reader()
    data = "grüße €\n".encode()
    for byte in data:
        setup.write(bytes([byte]))
    setup.write(b"\xff\xfe\n")
    setup.end()
    assert printed() == f"{PREFIX}grüße €\n{PREFIX}��\n"


def test_lines_that_have_a_prefix_already(setup: Setup, printed: Callable[[], str]) -> None:
    """A worker's worker: its lines say whose they are."""
    setup.reader()
    setup.write(b"      From worker 9:\tdeep\n")
    setup.end()
    assert printed() == "      From worker 9:\tdeep\n"


def test_the_tail_is_short(setup: Setup, printed: Callable[[], str]) -> None:
    reader = setup.reader()
    setup.write(b"".join(b"%d\n" % number for number in range(100)))
    setup.end()
    assert list(reader.tail) == [str(number) for number in range(100 - config.OUTPUT_LINES, 100)]


def test_the_hook_decides(setup: Setup, printed: Callable[[], str]) -> None:
    setup.hook = lambda pid, line: None if line == "secret" else f"[{pid}] {line}"
    setup.reader()
    setup.write(b"one\nsecret\ntwo\n")
    setup.end()
    assert printed() == "[7] one\n[7] two\n"


@pytest.mark.parametrize("error", [ValueError("hook"), SystemExit("hook")])
def test_a_hook_that_raises_costs_no_later_line(setup: Setup, printed: Callable[[], str], error: BaseException) -> None:
    def hook(pid: int, line: str) -> str:
        if line == "bad":
            raise error
        return line

    setup.hook = hook
    setup.reader()
    setup.write(b"bad\n")
    assert setup.notices.join(PATIENCE)
    setup.write(b"good\n")
    setup.end()
    assert printed().endswith("good\n")


class Closed(io.StringIO):
    def write(self, text: str) -> int:
        raise ValueError("I/O operation on closed file")


@pytest.mark.parametrize("stream", [None, Closed()], ids=["none", "closed"])
def test_a_stdout_that_takes_nothing(setup: Setup, monkeypatch: pytest.MonkeyPatch, stream: Any) -> None:
    monkeypatch.setattr(sys, "stdout", stream)
    reader = setup.reader()
    setup.write(b"lost\n" * 1000)
    setup.end()
    assert list(reader.tail)[-1] == "lost"


class Narrow(io.TextIOWrapper):
    """A stdout for few characters, as PYTHONIOENCODING makes it."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding)


class Tee:
    """One of the user's, which does not know what is beneath."""

    encoding: Any

    def __init__(self, encoding: Any) -> None:
        self.beneath = Narrow("ascii")
        if encoding is not None:
            self.encoding = encoding

    def write(self, text: str) -> int:
        return self.beneath.write(text)

    def flush(self) -> None:
        self.beneath.flush()


@pytest.mark.parametrize(
    ("stream", "shown"),
    [
        (Narrow("latin-1"), "h\u00e9llo \\u2713"),
        (Narrow("cp1252"), "h\u00e9llo \\u2713"),  # it calls itself charmap in its errors
        (Narrow("ascii"), "h\\xe9llo \\u2713"),
        (Tee("utf-8"), "h\\xe9llo \\u2713"),
        (Tee("no such encoding"), "h\\xe9llo \\u2713"),
        (Tee(0), "h\\xe9llo \\u2713"),
        (Tee(None), "h\\xe9llo \\u2713"),
    ],
)
def test_a_stdout_that_has_not_all_characters(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, stream: Any, shown: str
) -> None:
    """That line, and those that came with it, were lost."""
    monkeypatch.setattr(sys, "stdout", stream)
    setup.reader()
    setup.write("before\nh\u00e9llo \u2713\nafter\n".encode())
    setup.end()
    wrapper = stream if isinstance(stream, Narrow) else stream.beneath
    printed = wrapper.buffer.getvalue().decode(wrapper.encoding)
    assert printed == f"{PREFIX}before\n{PREFIX}{shown}\n{PREFIX}after\n"


def test_what_a_hook_makes_of_a_line_may_be_no_text(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Narrow("utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    setup.hook = lambda pid, line: f"{line} \udce9"
    setup.reader()
    setup.write("\u2713\n".encode())
    setup.end()
    assert stream.buffer.getvalue().decode() == "\u2713 \\udce9\n"  # type: ignore[attr-defined]


class Slow(io.StringIO):
    """A stdout that takes nothing until it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def write(self, text: str) -> int:
        assert self.go.wait(PATIENCE)
        return super().write(text)


def test_a_slow_stdout_holds_the_worker_up_and_nothing_is_lost(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory stays bounded: the pipe is not read while too much waits."""
    slow = Slow()
    monkeypatch.setattr(sys, "stdout", slow)
    setup.reader()
    total = 24 << 20
    written = threading.Event()
    so_far = [0]

    def write() -> None:
        line = b"x" * 1023 + b"\n"
        for _ in range(total // 1024):
            setup.write(line)
            so_far[0] += 1024
        written.set()

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    assert not written.wait(0.5)
    assert so_far[0] < 16 << 20
    slow.go.set()
    assert written.wait(PATIENCE)
    thread.join(PATIENCE)
    setup.end()
    assert slow.getvalue().count("x" * 1023 + "\n") == total // 1024


def test_a_line_without_end_is_not_held_for_ever(setup: Setup, printed: Callable[[], str]) -> None:
    setup.reader()
    for _ in range(9):
        setup.write(b"y" * (1 << 20))
    until(lambda: "y" in printed(), "a part of it is printed")
    setup.end()
    assert len(printed().replace(PREFIX, "").replace("\n", "")) == 9 << 20


def test_drain_takes_what_is_there_although_somebody_holds_the_pipe(setup: Setup, printed: Callable[[], str]) -> None:
    reader = setup.reader()
    done = threading.Event()

    def write_and_drain() -> None:
        setup.write(b"last words\n")
        reader.drain()
        reader.close()
        reader.close()
        done.set()

    setup.loop.call_soon(write_and_drain)
    assert done.wait(PATIENCE) and setup.ended.wait(PATIENCE)
    assert setup.notices.join(PATIENCE)
    assert printed() == f"{PREFIX}last words\n"


def test_a_pipe_that_somebody_fills_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker is dead, and a child of it prints faster than we read: the leader has more to do."""
    loop: Any = SimpleNamespace(register=lambda *_: None, unregister=lambda _: None, call_soon=lambda _: None)
    notices: Any = SimpleNamespace(put=lambda function: None)
    reading, writing = os.pipe()
    reader = OutputReader(loop, reading, 7, notices, lambda: None)
    real, given = os.read, 0

    def endless(descriptor: int, size: int) -> bytes:
        nonlocal given
        if descriptor != reading:
            return real(descriptor, size)
        given += size
        assert given < 1 << 26
        return b"y\n" * (size // 2)

    monkeypatch.setattr(os, "read", endless)
    reader.drain()
    monkeypatch.undo()
    assert given >= 1 << 20, "all that a pipe holds"
    os.close(writing)
    reader.close()
