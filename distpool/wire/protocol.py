"""The handshake of a link, without I/O: frames in, answers and events out (layer 1).

                 connector (master, or the process that dials)        acceptor (worker)
    FRESH        HELLO  nonce_c                                ->
                                                               <-     CHALLENGE  nonce_a, proof(nonce_c, nonce_a)
    ASKED        PROOF  proof(nonce_a, nonce_c)                ->
                                                               <-     JOIN... (both sides are READY)

Both prove that they know the cookie, which itself never travels; nothing is unpickled and no frame of more than
`config.MAX_BEFORE_AUTH` bytes is accepted before. The two proofs are made over different labels, so that a proof
cannot be reflected. Legal moves are the table `MOVES`; anything else is a `ProtocolError`.
"""

from __future__ import annotations

import enum
import os

from distpool.errors import AuthenticationError, ProtocolError
from distpool.wire import mac
from distpool.wire.frames import Frame, Kind, pack_frame

MAGIC = b"distpool/1\n"
NONCE = 32


class State(enum.Enum):
    """Where a handshake stands."""

    FRESH = "fresh"  # nothing received yet
    CHALLENGED = "challenged"  # acceptor: waits for the peer's proof
    READY = "ready"
    FAILED = "failed"


class Role(enum.Enum):
    """Which side of the handshake this process is."""

    CONNECTOR = "connector"
    ACCEPTOR = "acceptor"


#: (role, state, kind received) -> state afterwards. What is not here is illegal.
MOVES: dict[tuple[Role, State, Kind], State] = {
    (Role.ACCEPTOR, State.FRESH, Kind.HELLO): State.CHALLENGED,
    (Role.ACCEPTOR, State.CHALLENGED, Kind.PROOF): State.READY,
    (Role.CONNECTOR, State.FRESH, Kind.CHALLENGE): State.READY,
    (Role.CONNECTOR, State.FRESH, Kind.REFUSED): State.FAILED,
}


class Handshake:
    """One handshake. `begin()` and `receive(frame)` return the parts to send; `state` says whether it is over."""

    def __init__(self, role: Role, cookie: str) -> None:
        self.role = role
        self.state = State.FRESH
        self._key = cookie.encode()
        self._mine = os.urandom(NONCE)
        self._theirs = b""

    @property
    def ready(self) -> bool:
        """Whether both sides have proved that they know the cookie."""
        return self.state is State.READY

    def begin(self) -> list[bytes]:
        """What this side sends first (the acceptor: nothing)."""
        if self.role is Role.ACCEPTOR:
            return []
        return pack_frame(Kind.HELLO, MAGIC + self._mine)

    def receive(self, frame: Frame) -> list[bytes]:
        """Take the peer's frame and return the answer; `ProtocolError` or `AuthenticationError` end the link."""
        try:
            kind = Kind(frame.kind)
        except ValueError:
            kind = None
        following = MOVES.get((self.role, self.state, kind)) if kind is not None else None
        if following is None or len(frame.body):
            self.state = State.FAILED
            raise ProtocolError(f"Invalid connection credentials: frame {frame.kind} during the handshake")
        try:
            answer = self._act(kind, frame.control)
        except (ProtocolError, AuthenticationError):
            self.state = State.FAILED
            raise
        self.state = following
        return answer

    def _act(self, kind: Kind | None, control: bytes) -> list[bytes]:
        if kind is Kind.HELLO:
            if len(control) != len(MAGIC) + NONCE or not control.startswith(MAGIC):
                raise ProtocolError("Invalid connection credentials: not a distpool peer of this version")
            self._theirs = control[len(MAGIC) :]
            return pack_frame(Kind.CHALLENGE, self._mine + self._proof(b"acceptor", self._theirs, self._mine))
        if kind is Kind.CHALLENGE:
            self._theirs, proof = control[:NONCE], control[NONCE:]
            self._verify(proof, self._proof(b"acceptor", self._mine, self._theirs))
            return pack_frame(Kind.PROOF, self._proof(b"connector", self._theirs, self._mine))
        if kind is Kind.PROOF:
            self._verify(control, self._proof(b"connector", self._mine, self._theirs))
            return []
        raise AuthenticationError("the worker refused this process: the cluster cookies differ")

    def veil(self, data: bytes) -> bytes:
        """A short secret as it travels to the other side after the handshake, also where the link is in clear; applied
        there, it gives the secret again. For one secret of a link: the same bytes hide everything that is given here.
        """
        first, second = sorted((self._mine, self._theirs))
        pad = b"".join(
            self._proof(b"veil" + number.to_bytes(4, "big"), first, second)
            for number in range(-(-len(data) // mac.SIZE))
        )
        return bytes(one ^ other for one, other in zip(data, pad, strict=False))

    def _proof(self, label: bytes, first: bytes, second: bytes) -> bytes:
        return mac.digest(self._key, label + b"\0" + first + second)

    @staticmethod
    def _verify(given: bytes, expected: bytes) -> None:
        if not mac.same(given, expected):
            raise AuthenticationError("Invalid connection credentials: the cluster cookies differ")
