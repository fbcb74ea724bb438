"""Byte streams under a link: what one has to offer, and how one is made of what others hand us (layer 2).

    dial(address)                                       -> connected socket
    adopt(socket)             from a manager's connect  -> Adopted: a duplicate of it, polled by the I/O loop
    adopt((reader, writer))   blocking streams          -> Adopted: two pump threads behind a socket pair (`pump`)

A link wants a non-blocking stream with a descriptor (`Stream`): that is what a socket is, so a socket is used as it is,
without a wrapper on the hot path. Only TLS needs one (`tls.TlsStream`); it keeps bytes that no poller sees, so a
stream may also have `pending()`.

Streams that were handed to us still belong to somebody else, who may close them at any time: that means the death of
the worker. But the kernel drops a closed descriptor from the poller without a word, and its number may be somebody
else's a moment later. So we work on a duplicate, and `Adopted.watch` looks from time to time whether the original has
been closed (there is no event to wait for).
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable

from distpool.hints import Any, Protocol
from distpool.transport.ioloop import IoLoop
from distpool.transport.pump import Pump, close_descriptor, readinto_of, write_of

_LOOK = 0.25  # seconds between two looks whether the owner of a stream has closed it


class Stream(Protocol):
    """What a link needs of its transport: a connected, non-blocking socket, or something that behaves like one.

    `recv`, `recv_into`, `send` and `sendmsg` never block: they raise `BlockingIOError` instead, and `OSError` when the
    connection is broken; `recv` returns `b""` at its end. `fileno()` can be polled.
    """

    def fileno(self) -> int: ...
    def setblocking(self, flag: bool, /) -> None: ...
    def setsockopt(self, level: int, option: int, value: int, /) -> None: ...
    def recv(self, size: int, /) -> bytes: ...
    def recv_into(self, buffer: Any, /) -> int: ...
    def send(self, data: Any, /) -> int: ...
    def sendmsg(self, buffers: Any, /) -> int: ...
    def shutdown(self, how: int, /) -> None: ...
    def close(self) -> None: ...


class Adopted:
    """A stream made of what a manager handed us: `stream` is for the link, `close` ends ours and theirs, `forget` only
    closes the descriptors of theirs, in a forked child: there they would hold the connection open behind our back."""

    def __init__(
        self, stream: Any, is_closed: Callable[[], bool], close: Callable[[], None], forget: Callable[[], None]
    ) -> None:
        self.stream = stream
        self.is_closed = is_closed
        self.close = close
        self.forget = forget
        self._over = False

    def watch(self, loop: IoLoop, on_closed: Callable[[], object]) -> None:
        """Call `on_closed()` on the leader when the owner has closed the stream; ends with `end`."""

        def look() -> None:
            if self._over:
                return
            if self.is_closed():
                on_closed()
            else:
                loop.call_later(_LOOK, look)

        loop.call_later(_LOOK, look)

    def end(self) -> None:
        """The link is gone: look no more, close everything."""
        if not self._over:
            self._over = True
            self.close()


def adopt(given: Any) -> Adopted:
    """The stream for a link from a connected socket or a pair `(reader, writer)`; TypeError for anything else."""
    if isinstance(given, socket.socket):
        return _adopt_socket(given)
    try:
        if any(hasattr(given, name) for name in ("readinto", "read", "write")):
            raise TypeError  # one stream: iterating over it would wait for lines
        reader, writer = given
    except (TypeError, ValueError):
        raise TypeError(
            f"connect must return a socket or a pair (reader, writer), not {type(given).__name__}"
        ) from None
    if reader is writer and isinstance(reader, socket.socket):
        return _adopt_socket(reader)
    pump = Pump(reader, writer, readinto_of(reader), write_of(writer))
    return Adopted(pump.stream, pump.is_closed, lambda: None, pump.forget)  # the pump closes what it was given


def _adopt_socket(given: socket.socket) -> Adopted:
    if hasattr(given, "pending"):  # ssl.SSLSocket: its descriptor carries ciphertext
        raise TypeError("a TLS socket cannot be polled: return its makefile streams as a pair (reader, writer)")
    if given.fileno() < 0:
        raise ConnectionError("the socket is closed")
    stream = given.dup()

    def close() -> None:
        with contextlib.suppress(OSError):
            given.close()

    return Adopted(stream, lambda: given.fileno() < 0, close, lambda: close_descriptor(given))


def dial(address: tuple[Any, ...], timeout: float, identity: Any = None) -> Any:
    """A stream connected to `("unix", path)`, `("tcp", host, port)` or, as the member with this `Identity`,
    `("tls", host, port)`; OSError: not within `timeout` seconds. It may block for so long.
    """
    kind, *place = address
    if kind == "unix":
        return _dial_unix(place[0], timeout)
    deadline = time.monotonic() + timeout
    sock = socket.create_connection((place[0], place[1]), timeout=timeout)
    if kind == "tcp":
        return sock
    if identity is None:
        sock.close()
        raise ConnectionError(f"{place[0]}:{place[1]} accepts encrypted links only, and this process has no identity")
    from distpool.transport import tls

    return tls.connect(sock, identity, max(0.001, deadline - time.monotonic()))


def _dial_unix(path: str, timeout: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        sock.connect(path)
    except OSError:
        sock.close()
        raise
    return sock


__all__ = ["Adopted", "Stream", "adopt", "dial"]
