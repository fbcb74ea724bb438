"""Blocking byte pairs made into a stream that can be polled (layer 2).

    link <--socket pair--> pump-in thread  <--readinto-- reader
                           pump-out thread --write-----> writer

Two threads per pair, both daemons; they know bytes, not frames. The socket pair gives the link what it needs: a
descriptor for the poller, non-blocking sends, and back-pressure (its buffers are bounded, so a slow writer makes the
link's outbox wait). Tried: a stream of our own over two `SimpleQueue`s with a wake-up descriptor. It saves two system
calls per message and needs a lock, a bound and a partial-write rule of its own; the threads' hand-over dominates both.

Either side's end is everybody's: end of file or an error of the reader, an error of the writer, or the link's close.
Then writer and reader are closed.

A thread that reads holds the lock of a buffered reader, and whoever closes it meanwhile waits for that thread; a raw
descriptor that is closed does not wake its reader at all. So streams of the standard library are polled before they are
read (`_source_of`), together with a socket that ends the wait. Other classes have to wake their readers when they are
closed; where they do not, a daemon thread stays behind until the process ends.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable

from distpool.hints import Any
from distpool.logs import Log

log = Log("pump")

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
        self._stop, self._stopped = socket.socketpair()
        self._source = _source_of(reader)
        try:
            for target, name in ((self._pump_in, "in"), (self._pump_out, "out")):
                threading.Thread(target=target, name=f"distpool-pump-{name}", daemon=True).start()
        except RuntimeError:  # no further thread: one alone would stay, and hold the streams open
            self.stream.close()
            self._end()
            self._close()
            raise

    def is_closed(self) -> bool:
        """Whether the owner has closed one of the two."""
        return any(_closed(end) for end in (self._reader, self._writer))

    def forget(self) -> None:
        """In a forked child, which has neither of the threads: only close."""
        for end in (self._reader, self._writer, self._near, self._stop, self._stopped):
            with contextlib.suppress(OSError):
                close_descriptor(end)

    def _pump_in(self) -> None:
        _block_sigpipe()
        buffer = bytearray(_CHUNK)
        view = memoryview(buffer)
        poll = False  # not before the first read: something may lie in the reader's buffer
        try:
            while not poll or self._wait_readable():
                poll = self._source is not None
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
        self._stopped.close()

    def _wait_readable(self) -> bool:
        """False when it is over. Each read takes all that a buffered reader has, so the descriptor tells the truth."""
        assert self._source is not None
        return self._stopped not in _select([self._source, self._stopped])

    def _pump_out(self) -> None:
        _block_sigpipe()
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
        self._close()

    def _close(self) -> None:
        for end in (self._writer, self._reader):
            with contextlib.suppress(Exception):
                sock = _socket_of(end)
                if sock is not None:
                    with contextlib.suppress(OSError):
                        sock.shutdown(socket.SHUT_RDWR)  # `close` of a `makefile` stream leaves its socket open
                end.close()
        self._near.close()

    def _end(self) -> None:
        """Both directions are over: the link sees the end, and the other thread comes out of its `recv`."""
        with contextlib.suppress(OSError):
            self._near.shutdown(socket.SHUT_RDWR)
        self._stop.close()


def _block_sigpipe() -> None:
    """On this thread, for good. Who has set it to SIG_DFL does not mean the ends of workers (see `link`)."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGPIPE,))


def readinto_of(reader: Any) -> Callable[[Any], int | None]:
    """`readinto(buffer) -> n` of a reader: short reads, 0 at the end, None for "not now" (raw, non-blocking)."""
    names = ["readinto", "recv_into"]
    if isinstance(reader, io.BufferedIOBase):
        # Its `readinto` waits until the whole buffer is full, and `readinto1` until something comes, although there is
        # something; `read1` gives what lies there, else what one read brings.
        def read1(buffer: Any) -> int:
            data = reader.read1(len(buffer))
            buffer[: len(data)] = data
            return len(data)

        if _is_own(reader, "read1"):
            return read1
        if _is_own(reader, "readinto1"):
            names.insert(0, "readinto1")
    for name in names:
        method = getattr(reader, name, None)
        if callable(method):
            return method  # type: ignore[no-any-return]
    raise TypeError(f"a reader must have readinto(buffer), as io.RawIOBase has it: {type(reader).__name__} has not")


def _is_own(reader: io.BufferedIOBase, name: str) -> bool:
    """Whether the class has this method, and not only what the base class says of it: `read1` is not supported there,
    and `readinto1` calls it."""
    return getattr(type(reader), name) is not getattr(io.BufferedIOBase, name)


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


def _source_of(reader: Any) -> Any:
    """What can be polled in place of a blocking read; None if there is nothing, or it would not be the truth."""
    sock = _socket_of(reader)
    if sock is not None:
        return None if hasattr(sock, "pending") else sock  # TLS keeps data of its own
    base = reader.raw if isinstance(reader, io.BufferedReader) else reader
    return base if isinstance(base, io.FileIO) and sys.platform != "win32" else None


def _socket_of(end: Any) -> Any:
    """The socket behind a stream, if there is one."""
    base = end.raw if isinstance(end, io.BufferedReader | io.BufferedWriter) else end
    if isinstance(base, socket.SocketIO):
        base = getattr(base, "_sock", None)  # None: closed
    return base if isinstance(base, socket.socket) else None


def close_descriptor(end: Any) -> None:
    """In a forked child: no `close` of its own, which may flush, say goodbye, or wait for a lock that nobody holds."""
    sock = _socket_of(end)
    if sock is not None:
        number = sock.detach()
        if number >= 0:
            os.close(number)
        return
    raw = end.raw if isinstance(end, io.BufferedReader | io.BufferedWriter) else end
    if isinstance(raw, io.FileIO):
        raw.close()


def _select(sources: list[Any]) -> list[Any]:
    """Wait until one of these is readable, or at its end; which are. (`select.select` ends at descriptor 1024.)"""
    if not hasattr(select, "poll"):
        return select.select(sources, [], [])[0]
    poll = select.poll()
    numbers = {source.fileno(): source for source in sources}
    for number in numbers:
        poll.register(number, select.POLLIN)
    return [numbers[number] for number, _ in poll.poll()]


def _closed(end: Any) -> bool:
    if isinstance(end, socket.socket):
        return end.fileno() < 0
    return getattr(end, "closed", False) is True


def _wait_for(end: Any, reading: bool) -> None:
    """Wait until a stream in non-blocking mode can go on; an error if it cannot be waited for."""
    if hasattr(select, "poll"):  # as `_select`
        poll = select.poll()
        poll.register(end, select.POLLIN if reading else select.POLLOUT)
        poll.poll()
    elif reading:
        select.select([end], [], [])
    else:
        select.select([], [end], [])


__all__ = ["Pump", "close_descriptor", "readinto_of", "write_of"]
