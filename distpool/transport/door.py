"""The door of a listening process: connections that have not proved yet that they belong to the cluster (layer 2).

    listener --accept--> [TLS handshake] --> arrived(stream), which makes a link of it and calls `admit(link)`
    guest: anything with `close(reason)`; `admit` starts its clock, `forget` ends it (it has proved itself, or is gone)

Whoever does not prove in time that he knows the cookie is cut off; so is, of too many, the one who has been silent
longest. Nobody else is disturbed: accepting is one system call per event of the loop, TLS handshakes never block, and
when no descriptor is left the door is shut for a moment (the listener stays readable, so the loop would spin).

Everything runs on the leader.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable

from distpool import config
from distpool.errors import ProtocolError
from distpool.hints import Any
from distpool.transport.ioloop import IoLoop
from distpool.transport.tls import Acceptance, Identity, TlsStream

_REST = 0.25  # seconds that the door stays shut when the system has no descriptor left
_USED_UP = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Door:
    """Accepts from `listener` (if any); with an `identity`, TLS of its members only. `arrived(stream)` gets each
    connection, `complain(text)` what went wrong with others."""

    def __init__(
        self,
        loop: IoLoop,
        listener: socket.socket | None,
        identity: Identity | None,
        arrived: Callable[[Any], object],
        complain: Callable[[str], object],
    ) -> None:
        self._loop = loop
        self._listener = listener
        self._identity = identity
        self._arrived = arrived
        self._complain = complain
        self._guests: dict[Any, Any] = {}  # in the order of their coming -> the timer of each
        if listener is not None:
            listener.setblocking(False)
            loop.register(listener, self._on_accept)

    @property
    def guests(self) -> int:
        """How many there are."""
        return len(self._guests)

    def _on_accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except OSError as error:  # mostly: gone again
            if error.errno in _USED_UP:
                self._shut()
            return
        if self._identity is None:
            self._arrived(sock)
            return
        try:
            self.admit(Acceptance(self._loop, sock, self._identity, self._secured, self._insecure))
        except OSError:  # it has gone meanwhile
            sock.close()

    def _shut(self) -> None:
        """The guest who came first makes room; the others wait in the listener's queue."""
        assert self._listener is not None
        if self._guests:
            self._send_away(next(iter(self._guests)), "too many open files")
            return
        self._loop.unregister(self._listener)
        self._loop.call_later(_REST, self._reopen)

    def _reopen(self) -> None:
        if self._listener is not None and self._listener.fileno() >= 0:
            self._loop.register(self._listener, self._on_accept)

    def _secured(self, acceptance: Acceptance, stream: TlsStream) -> None:
        self.forget(acceptance)
        self._arrived(stream)

    def _insecure(self, acceptance: Acceptance, error: Exception) -> None:
        self.forget(acceptance)
        self._complain(f"no TLS connection of this cluster: {error}")

    # -- guests ------------------------------------------------------------------------------------------------

    def admit(self, guest: Any) -> None:
        """From now on its time is running."""
        if len(self._guests) >= config.MAX_STRANGERS:
            self._send_away(next(iter(self._guests)), "too many unknown connections")
        self._guests[guest] = self._loop.call_later(config.PROOF_SECONDS, lambda: self._too_late(guest))

    def _too_late(self, guest: Any) -> None:
        self._send_away(guest, f"no proof of the cookie within {config.PROOF_SECONDS:g} seconds")

    def _send_away(self, guest: Any, why: str) -> None:
        self.forget(guest)
        # Who has sent nothing at all is a port scanner or a health check: no reason for a line on stderr.
        guest.close(ProtocolError(why) if getattr(guest, "bytes_in", 1) else None)

    def forget(self, guest: Any) -> bool:
        """It has proved who it is, or it is gone; whether it was here."""
        timer = self._guests.pop(guest, None)
        if timer is None:
            return False
        timer.cancel()
        return True


__all__ = ["Door"]
