"""Hosts that fall silent: cable pulled, power lost, packets dropped; no reset tells of it (layer 2).

    tune(stream)                 every TCP link: no delay of small writes; the kernel asks an idle peer if it is there
    Watch(loop, stream, silent)  every TCP link to another host: the leader looks if what was sent is acknowledged

The peer's kernel answers, not its process: a worker that is stopped, or holds the GIL for a minute, is not silent.

Two cases. *Nothing is under way*: keepalive probes, wholly the kernel's. *Bytes are under way*: then the kernel sends
no probes and goes on trying for a quarter of an hour. TCP_USER_TIMEOUT would end that, but it also ends connections
whose peer acknowledges everything and only has no room to receive, which is just what a stopped worker with a full
buffer does (so its documentation says; not tried). So `Watch` asks the
kernel now and then when the last acknowledgement came, and for what it still waits.

Where the system does not tell (TCP_INFO of Linux), its own limit for retransmissions is set if there is one (macOS).
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import sys
from collections.abc import Callable

from distpool import config
from distpool.hints import Any
from distpool.transport.ioloop import IoLoop, Timer

_CONNDROP = 0x80  # TCP_RXT_CONNDROPTIME of macOS: seconds of retransmission before the connection is dropped
_KEEPALIVE_OF_MACOS = 0x10  # TCP_KEEPALIVE: what others call TCP_KEEPIDLE
_PROBES = 5
_NO_ANSWER = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, getattr(errno, "EHOSTDOWN", errno.EHOSTUNREACH))
# struct tcp_info, Linux: ... backoff at 4; unacked at 24; last_ack_recv (ms) at 56. Fields are never moved.
_INFO = struct.Struct("=8B 16x I 28x I")


def is_tcp(stream: Any) -> bool:
    """Whether this is a TCP connection of the operating system (TLS or not)."""
    return getattr(stream, "family", None) in (socket.AF_INET, socket.AF_INET6)


def leaves_host(stream: Any) -> bool:
    """Whether this is a TCP connection to an address that is not a loopback one."""
    try:
        host = str(stream.getpeername()[0]) if is_tcp(stream) else "::1"
    except OSError:  # closed already
        return False
    return not is_loopback(host)


def is_silence(error: BaseException | None) -> bool:
    """Whether a connection ended with this because the other host does not answer (and not because it said no)."""
    return isinstance(error, OSError) and (isinstance(error, TimeoutError) or error.errno in _NO_ANSWER)


def is_private(stream: Any) -> bool:
    """Whether nobody else can read what is sent there: it does not leave this host, or is encrypted."""
    return hasattr(stream, "pending") or not leaves_host(stream)


def is_loopback(host: str) -> bool:
    """Whether this address means the machine that uses it."""
    return host in ("localhost", "::1") or host.startswith(("127.", "::ffff:127."))


def acknowledged(stream: Any) -> bool:
    """Whether the peer's kernel has all that was sent; False also where nothing tells."""
    try:
        if is_tcp(stream):
            info = _info(stream)
            return info is not None and not info[1]
        # Of a Unix socket the end is seen at once. One without a name is a pair, behind which are somebody's streams.
        return bool(stream.getsockname() or stream.getpeername())
    except (AttributeError, OSError):
        return False


def _info(stream: Any) -> tuple[int, int, int] | None:
    """Probes without an answer, segments not acknowledged, milliseconds since something was; None: not known."""
    if sys.platform != "linux":
        return None
    data = stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size)
    if len(data) < _INFO.size:
        return None
    _, _, _, probes, _, _, _, _, unacked, last_ack = _INFO.unpack(data)
    return probes, unacked, last_ack


def tune(stream: Any) -> None:
    """Set the options that a link wants of a TCP connection; others are left alone."""
    if not is_tcp(stream):
        return
    seconds = config.silent_seconds()
    first = max(1, int(seconds / 2))
    between = max(1, int((seconds - first) / _PROBES))
    probes = max(1, min(_PROBES, int((seconds - first) / between)))
    options = [
        (socket.IPPROTO_TCP, "TCP_NODELAY", 1),
        (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE", first),
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL", between),
        (socket.IPPROTO_TCP, "TCP_KEEPCNT", probes),
    ]
    for level, name, value in options:
        option = getattr(socket, name, None)
        if option is not None:
            _set(stream, level, option, value)
    if sys.platform == "darwin":
        _set(stream, socket.IPPROTO_TCP, _KEEPALIVE_OF_MACOS, first)
        _set(stream, socket.IPPROTO_TCP, _CONNDROP, max(1, int(seconds)))


def _set(stream: Any, level: int, option: int, value: int) -> None:
    with contextlib.suppress(OSError):  # a system without it, or a connection that has just ended
        stream.setsockopt(level, option, value)


class Watch:
    """Calls `silent()` on the leader, once, when bytes to the peer have not been acknowledged for too long.

    Made on the leader; `end()` on the leader. Harmless for streams that are not TCP to another host.
    """

    def __init__(self, loop: IoLoop, stream: Any, silent: Callable[[], object]) -> None:
        self._loop = loop
        self._stream = stream
        self._silent = silent
        self._seconds = config.silent_seconds()
        self._timer: Timer | None = None
        self._waited = False  # at the last look
        if sys.platform == "linux" and leaves_host(stream):
            self._wait()

    def _wait(self) -> None:
        self._timer = self._loop.call_later(self._seconds / 8, self._look)

    def _look(self) -> None:
        waits, age = self._state()
        # Twice in a row: after a long rest the last acknowledgement is old, although what was just sent is on its way.
        if waits and self._waited and age >= self._seconds:
            self._silent()
            return
        self._waited = waits
        self._wait()

    def _state(self) -> tuple[bool, float]:
        """Whether the kernel waits for an acknowledgement, and seconds since the last one came."""
        try:
            info = _info(self._stream)
        except OSError:
            info = None  # closed: somebody else notices
        if info is None:
            return False, 0.0
        probes, unacked, last_ack = info
        # Bytes under way are sent again after 0.2, 0.4, ... seconds, and the peer's kernel answers at once. Behind a
        # full buffer (nothing under way, probes of the window instead, ever rarer) one lost probe is no proof.
        return bool(unacked or probes >= 2), last_ack / 1000

    def end(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()


__all__ = ["Watch", "acknowledged", "is_loopback", "is_private", "is_silence", "is_tcp", "leaves_host", "tune"]
