"""What workers print: forwarded line by line to the master's stdout (layer 3).

    worker's stdout+stderr -> pipe -> leader: bytes cut into lines, last lines kept -> notices thread -> sys.stdout

`sys.stdout` may be anything (a test's capture, a notebook), so writing to it is user code and happens on the notices
thread, in order. When that falls behind, the pipe is not read until it has caught up: a worker that prints without end
then blocks, and memory stays bounded.
"""

from __future__ import annotations

import collections
import contextlib
import os
import sys
from collections.abc import Callable

from distpool import config
from distpool.hints import Any
from distpool.logs import Log
from distpool.node.threads import SerialQueue
from distpool.transport.ioloop import IoLoop

log = Log("output")

_CHUNK = 65536
_HIGH_WATER = 4 << 20  # bytes read and not yet written by the notices thread
_PIPE = 1 << 20  # bytes that a pipe holds at most, unless root has enlarged it

#: `f(pid, line) -> str | None`: the text to print instead of the default, or None for nothing.
OutputHook = Callable[[int, str], "str | None"]


class OutputReader:
    """Reads one worker's output pipe. Methods run on the leader; `_print` on the notices thread."""

    def __init__(
        self,
        loop: IoLoop,
        descriptor: int,
        pid: int,
        notices: SerialQueue,
        hook: Callable[[], OutputHook | None],
        early: bytes = b"",
        on_line: Callable[[str], bool] | None = None,
    ) -> None:
        # While set: gets each line; whether it is what was waited for (the header). Until then nothing is printed,
        # because what a login prints is not the worker's; the last lines are kept, since they explain a failure.
        self.on_line = on_line
        self.tail: collections.deque[str] = collections.deque(maxlen=config.OUTPUT_LINES)
        self.ended = False
        self.on_end: Callable[[], object] | None = None
        self._loop = loop
        self._descriptor = descriptor
        self._pid = pid
        self._notices = notices
        self._hook = hook
        self._partial = b""
        self._waiting = 0  # bytes handed to the notices thread; leader adds, notices thread subtracts via call_soon
        self._paused = False
        os.set_blocking(descriptor, False)
        if early:
            self._take(early)
        if not self.ended:
            loop.register(descriptor, self._on_readable)

    def _on_readable(self) -> None:
        try:
            data = os.read(self._descriptor, _CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
        else:
            self._take(data)

    def _take(self, data: bytes) -> None:
        *lines, self._partial = (self._partial + data).split(b"\n")
        if len(self._partial) > _HIGH_WATER:  # no line end in sight: do not hold it for ever
            lines.append(self._partial)
            self._partial = b""
        if lines:
            self._hand_over(lines)

    def _hand_over(self, lines: list[bytes]) -> None:
        texts = [line.decode("utf-8", "replace") for line in lines]
        size = sum(map(len, lines)) + len(lines)
        if self.on_line is not None:
            texts = self._search(texts)
        self.tail.extend(texts)
        self._waiting += size
        self._notices.put(lambda: self._print(texts, size))
        if self._waiting > _HIGH_WATER and not self._paused and not self.ended:
            self._paused = True
            self._loop.unregister(self._descriptor)

    def _search(self, texts: list[str]) -> list[str]:
        """Show lines to `on_line` until it has found its own; the lines behind that one are the worker's."""
        for index, text in enumerate(texts):
            if self.on_line is None:  # nobody waits any more
                return texts[index:]
            if self.on_line(text):
                self.on_line = None
                return texts[index + 1 :]
            self.tail.append(text)
        return []

    def _print(self, texts: list[str], size: int) -> None:
        hook = self._hook()
        self._notices.prints = hook is None and sys.stdout is sys.__stdout__
        try:
            show(sys.stdout, self._pid, texts, hook)
        finally:
            self._notices.prints = False
            self._loop.call_soon(lambda: self._written(size))

    def _written(self, size: int) -> None:
        self._waiting -= size
        if self._paused and self._waiting < _HIGH_WATER // 2:
            self._paused = False
            if not self.ended:
                self._loop.register(self._descriptor, self._on_readable)

    def drain(self) -> None:
        """Read what is there now (the worker is dead; somebody else may still hold its pipe, and print without end)."""
        left = _PIPE
        while left > 0 and not self.ended:
            try:
                data = os.read(self._descriptor, _CHUNK)
            except OSError:
                return
            if not data:
                self.close()
                return
            left -= len(data)
            self._take(data)

    def close(self) -> None:
        """The end of the pipe, or nobody wants it any more."""
        if self.ended:
            return
        self.ended = True
        self._loop.unregister(self._descriptor)
        os.close(self._descriptor)
        if self._partial:
            rest, self._partial = self._partial, b""
            self._hand_over([rest])
        if self.on_end is not None:
            self.on_end()

    def close_descriptor(self) -> None:
        """In a forked child: only close what was inherited."""
        if not self.ended:
            self.ended = True
            os.close(self._descriptor)


def show(stream: Any, pid: int, texts: list[str], hook: OutputHook | None) -> None:
    """Print these lines of a worker on `stream`, which is the user's, or None."""
    pieces = [_line(pid, text, hook) for text in texts]
    with contextlib.suppress(OSError, ValueError):  # it is closed: nobody can read it
        if stream is not None and pieces:
            _write(stream, "".join(pieces))
            stream.flush()


def _line(pid: int, text: str, hook: OutputHook | None) -> str:
    """What is printed for one line."""
    if hook is not None:
        try:
            line = hook(pid, text)
            return "" if line is None else line if line.endswith("\n") else line + "\n"
        except BaseException:  # SystemExit too: the lines beside it are not lost for it
            log.exception("the output hook failed on a line of worker %d", pid)
    return text + "\n" if text.startswith("      From worker ") else f"      From worker {pid}:\t{text}\n"


def _write(stream: Any, text: str) -> None:
    """All of it: what the stream's encoding has no bytes for appears as an escape such as `\\u2713`."""
    try:
        stream.write(text)
        return
    except UnicodeEncodeError:
        pass
    # A stream of the user's may not name its encoding, or name another one than that of what is beneath it.
    with contextlib.suppress(UnicodeError, LookupError, TypeError, AttributeError):
        stream.write(text.encode(stream.encoding, "backslashreplace").decode(stream.encoding))
        return
    stream.write(text.encode("ascii", "backslashreplace").decode("ascii"))
