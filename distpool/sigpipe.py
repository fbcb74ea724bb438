"""The end of a worker, a login or a watcher raises an error where we write to it, and ends no program (layer 0).

    quietly()     around writes to pipes, and those of libraries
    QUIET         a flag for `send` and `sendall` of sockets
    QuietSocket   a socket for libraries that send on threads of their own

Python ignores SIGPIPE. Programs whose output may go to `head` set it back to SIG_DFL, to end quietly when nobody reads
it any more: that is not meant for ends of ours.
"""

from __future__ import annotations

import contextlib
import signal
import socket

TYPE_CHECKING = False  # not from `typing`: see `hints`
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

QUIET: int = getattr(socket, "MSG_NOSIGNAL", 0)
_SIGPIPE = getattr(signal, "SIGPIPE", None)
_NOTHING = contextlib.nullcontext()


def quietly() -> contextlib.AbstractContextManager[object]:
    """A context in which a write to what nobody reads raises BrokenPipeError and nothing else. Any thread."""
    if _SIGPIPE is None or signal.getsignal(_SIGPIPE) is signal.SIG_IGN:  # as Python sets it
        return _NOTHING
    return _without_sigpipe(_SIGPIPE)


@contextlib.contextmanager
def _without_sigpipe(sigpipe: int) -> Iterator[None]:
    """It is for the thread that writes: what has come is taken before that thread could hear of it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (sigpipe,))
    try:
        yield
    finally:
        if sigpipe not in before:
            if sigpipe in signal.sigpending():
                signal.sigwait((sigpipe,))
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class QuietSocket(socket.socket):
    """A socket whose `send` says so itself."""

    @classmethod
    def of(cls, sock: socket.socket) -> QuietSocket:
        """The same connection; `sock` is closed by that."""
        timeout = sock.gettimeout()
        made = cls(sock.family, sock.type, sock.proto, sock.detach())
        made.settimeout(timeout)
        return made

    def send(self, data: Any, flags: int = 0, /) -> int:
        """As a socket's."""
        return super().send(data, flags | QUIET)


__all__ = ["QUIET", "QuietSocket", "quietly"]
