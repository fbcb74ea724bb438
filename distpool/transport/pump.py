"""Blocking byte pairs made into a stream that can be polled (layer 2).

    link <--socket pair--> pump-in thread  <--readinto-- reader
                           pump-out thread --write-----> writer

Two threads per pair, both daemons; they know bytes, not frames. The socket pair gives the link what it needs: a
descriptor for the poller, non-blocking sends, and back-pressure (its buffers are bounded, so a slow writer makes the
link's outbox wait). Tried: a stream of our own over two `SimpleQueue`s with a wake-up descriptor. It saves two system
calls per message and needs a lock, a bound and a partial-write rule of its own; the threads' hand-over dominates both.

Either side's end is everybody's: end of file or an error of the reader, an error of the writer, or the link's close.
Then writer and reader are closed. `close()` of a buffered reader waits for a read that is under way, so it comes last,
on a thread that has nothing else to do.
"""

from __future__ import annotations

import contextlib
import io
import logging
import select
import socket
import threading
from collections.abc import Callable
from typing import Any

log = logging.getLogger("distpool.pump")

_CHUNK = 65536


class Pump:
    """Two threads between `stream` (for the link) and a blocking reader and writer."""

    def __init__(
        self, reader: Any, writer: Any, readinto: Callable[[Any], int | None], write: Callable[[bytes], int]
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._readinto = readinto
        self._write = write
        self.stream, self._near = socket.socketpair()
        for target, name in ((self._pump_in, "in"), (self._pump_out, "out")):
            threading.Thread(target=target, name=f"distpool-pump-{name}", daemon=True).start()

    def is_closed(self) -> bool:
        """Whether the owner has closed one of the two."""
        return any(_closed(end) for end in (self._reader, self._writer))

    def _pump_in(self) -> None:
        buffer = bytearray(_CHUNK)
        view = memoryview(buffer)
        try:
            while True:
                count = self._readinto(buffer)
                if count is None:
                    _wait_for(self._reader, reading=True)
                elif count == 0:
                    break
                else:
                    self._near.sendall(view[:count])
        except Exception as error:  # the reader is user code: whatever it raises is the end of the stream
            log.debug("the reader of a custom transport failed: %r", error)
        self._end()

    def _pump_out(self) -> None:
        try:
            while data := self._near.recv(_CHUNK):
                while data:
                    count = self._write(data)
                    if count == 0:
                        _wait_for(self._writer, reading=False)
                    data = data[count:]
                flush = getattr(self._writer, "flush", None)
                if flush is not None:
                    flush()
        except Exception as error:  # as above
            log.debug("the writer of a custom transport failed: %r", error)
        self._end()
        for end in (self._writer, self._reader):
            with contextlib.suppress(Exception):
                if isinstance(end, socket.socket):
                    end.shutdown(socket.SHUT_RDWR)  # wakes whoever reads; `close` does not
                end.close()
        self._near.close()

    def _end(self) -> None:
        """Both directions are over: the link sees the end, and the other thread comes out of its `recv`."""
        with contextlib.suppress(OSError):
            self._near.shutdown(socket.SHUT_RDWR)


def readinto_of(reader: Any) -> Callable[[Any], int | None]:
    """`readinto(buffer) -> n` of a reader: short reads, 0 at the end, None for "not now" (raw, non-blocking)."""
    # `BufferedReader.readinto` waits until the whole buffer is full; `readinto1` gives what one read brought.
    for name in ("readinto1", "readinto", "recv_into"):
        method = getattr(reader, name, None)
        if callable(method):
            return method  # type: ignore[no-any-return]
    raise TypeError(f"a reader must have readinto(buffer), as io.RawIOBase has it: {type(reader).__name__} has not")


def write_of(writer: Any) -> Callable[[bytes], int]:
    """`write(data) -> n` of a writer: short writes, 0 for "not now"."""
    if isinstance(writer, socket.socket):
        return writer.send
    method = getattr(writer, "write", None)
    if not callable(method):
        raise TypeError(f"a writer must have write(bytes): {type(writer).__name__} has not")
    raw = isinstance(writer, io.RawIOBase)

    def write(data: bytes) -> int:
        count = method(data)
        if count is None:  # a raw stream that would block; other classes (paramiko's files) have written all
            return 0 if raw else len(data)
        return int(count)

    return write


def _closed(end: Any) -> bool:
    if isinstance(end, socket.socket):
        return end.fileno() < 0
    return getattr(end, "closed", False) is True


def _wait_for(end: Any, reading: bool) -> None:
    """Wait until a stream in non-blocking mode can go on; an error if it cannot be waited for."""
    if reading:
        select.select([end], [], [])
    else:
        select.select([], [end], [])


__all__ = ["Pump", "readinto_of", "write_of"]
