"""The handshake: its table of moves walked from end to end, and everything an intruder might try."""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest

from distpool.errors import AuthenticationError, ProtocolError
from distpool.wire.frames import Frame, FrameReader, Kind
from distpool.wire.protocol import MAGIC, MOVES, NONCE, Handshake, Role, State

COOKIE = "the cookie"


def frames(parts: list[bytes]) -> list[Frame]:
    reader, found = FrameReader(), []
    new = reader.feed(b"".join(parts))
    while new:
        found += new
        new = reader.feed(b"")
    return found


def one(parts: list[bytes]) -> Frame:
    (frame,) = frames(parts)
    return frame


def frame(kind: int, control: bytes = b"", body: bytes = b"") -> Frame:
    return Frame(kind, control, body, [])


def pair(left: str = COOKIE, right: str = COOKIE) -> tuple[Handshake, Handshake]:
    return Handshake(Role.CONNECTOR, left), Handshake(Role.ACCEPTOR, right)


def test_the_whole_handshake() -> None:
    connector, acceptor = pair()
    assert acceptor.begin() == []
    hello = one(connector.begin())
    assert hello.kind == Kind.HELLO and not connector.ready
    challenge = one(acceptor.receive(hello))
    assert challenge.kind == Kind.CHALLENGE and acceptor.state is State.CHALLENGED and not acceptor.ready
    proof = one(connector.receive(challenge))
    assert proof.kind == Kind.PROOF and connector.ready
    assert acceptor.receive(proof) == [] and acceptor.ready


def test_the_cookie_never_travels_and_nothing_repeats() -> None:
    sent = []
    for _ in range(2):
        connector, acceptor = pair()
        hello = one(connector.begin())
        challenge = one(acceptor.receive(hello))
        proof = one(connector.receive(challenge))
        sent += [hello.control, challenge.control, proof.control]
    assert len(set(sent)) == 6
    assert not any(COOKIE.encode() in part for part in sent)


def brought_to(role: Role, state: State) -> Handshake:
    """A handshake of ours in that state, by legal moves where there are any."""
    mine = Handshake(role, COOKIE)
    other = Handshake(Role.ACCEPTOR if role is Role.CONNECTOR else Role.CONNECTOR, COOKIE)
    if state is State.FRESH:
        return mine
    if state is State.FAILED:
        with pytest.raises((ProtocolError, AuthenticationError)):
            mine.receive(frame(Kind.RESULTS))
    elif role is Role.ACCEPTOR:
        challenge = one(mine.receive(one(other.begin())))
        if state is State.READY:
            mine.receive(one(other.receive(challenge)))
    elif state is State.READY:
        mine.receive(one(other.receive(one(mine.begin()))))
    else:
        pytest.skip("a connector is never there")
    assert mine.state is state
    return mine


@pytest.mark.parametrize("role, state", list(itertools.product(Role, State)), ids=lambda value: value.value)
def test_every_move_that_is_not_in_the_table_is_refused(role: Role, state: State) -> None:
    for kind in [*map(int, Kind), 0, 200, 255]:
        if kind in set(Kind) and (role, state, Kind(kind)) in MOVES:
            continue
        handshake = brought_to(role, state)
        with pytest.raises(ProtocolError, match="Invalid connection credentials"):
            handshake.receive(frame(kind, os.urandom(NONCE)))
        assert handshake.state is State.FAILED and not handshake.ready


@pytest.mark.parametrize("move", MOVES, ids=lambda move: "-".join(str(getattr(part, "name", part)) for part in move))
def test_every_move_of_the_table(move: tuple[Role, State, Kind]) -> None:
    role, state, kind = move
    mine = brought_to(role, state)
    other = Handshake(Role.ACCEPTOR if role is Role.CONNECTOR else Role.CONNECTOR, COOKIE)
    if kind is Kind.REFUSED:
        with pytest.raises(AuthenticationError, match="cookies differ"):
            mine.receive(frame(kind))
    elif kind is Kind.HELLO:
        mine.receive(one(other.begin()))
    elif kind is Kind.CHALLENGE:
        mine.receive(one(other.receive(one(mine.begin()))))
    else:
        mine = Handshake(role, COOKIE)
        mine.receive(one(other.receive(one(mine.receive(one(other.begin()))))))
    assert mine.state is MOVES[move]


def test_the_table_has_no_way_out_of_an_end() -> None:
    assert not [move for move in MOVES if move[1] in (State.READY, State.FAILED)]
    assert set(MOVES.values()) == {State.CHALLENGED, State.READY, State.FAILED}


# ------------------------------------------------------------------------------------------------------------ intruders


def test_a_secret_is_veiled() -> None:
    connector, acceptor = pair()
    acceptor.receive(one(connector.receive(one(acceptor.receive(one(connector.begin()))))))
    for secret in (b"", b"k", os.urandom(32), os.urandom(100)):
        veiled = connector.veil(secret)
        assert acceptor.veil(veiled) == secret and (veiled != secret or len(secret) < 2)
    other, _ = pair()
    assert other.veil(b"x" * 32) != connector.veil(b"x" * 32)


def test_wrong_cookie_is_seen_by_the_connector() -> None:
    connector, acceptor = pair("right", "wrong")
    challenge = one(acceptor.receive(one(connector.begin())))
    with pytest.raises(AuthenticationError, match="cookies differ"):
        connector.receive(challenge)
    assert connector.state is State.FAILED


def test_wrong_cookie_is_seen_by_the_acceptor() -> None:
    """A connector that goes on although the acceptor's proof is none to it."""
    connector, acceptor = pair("wrong", "right")
    challenge = one(acceptor.receive(one(connector.begin())))
    connector._theirs = challenge.control[:NONCE]
    forged = connector._proof(b"connector", connector._theirs, connector._mine)
    with pytest.raises(AuthenticationError):
        acceptor.receive(frame(Kind.PROOF, forged))
    assert acceptor.state is State.FAILED


def test_replayed_proof() -> None:
    connector, acceptor = pair()
    proof = one(connector.receive(one(acceptor.receive(one(connector.begin())))))
    acceptor.receive(proof)
    again = Handshake(Role.ACCEPTOR, COOKIE)
    again.receive(one(Handshake(Role.CONNECTOR, COOKIE).begin()))
    with pytest.raises(AuthenticationError):
        again.receive(proof)


def test_replayed_conversation() -> None:
    """The whole of the connector's side, recorded and sent again."""
    connector, acceptor = pair()
    hello = one(connector.begin())
    proof = one(connector.receive(one(acceptor.receive(hello))))
    again = Handshake(Role.ACCEPTOR, COOKIE)
    again.receive(hello)
    with pytest.raises(AuthenticationError):
        again.receive(proof)


def test_replayed_challenge() -> None:
    connector, acceptor = pair()
    challenge = one(acceptor.receive(one(connector.begin())))
    connector.receive(challenge)
    other = Handshake(Role.CONNECTOR, COOKIE)
    other.begin()
    with pytest.raises(AuthenticationError):
        other.receive(challenge)


def test_reflected_proof() -> None:
    """The acceptor's own proof, sent back to it."""
    acceptor = Handshake(Role.ACCEPTOR, COOKIE)
    challenge = one(acceptor.receive(frame(Kind.HELLO, MAGIC + os.urandom(NONCE))))
    with pytest.raises(AuthenticationError):
        acceptor.receive(frame(Kind.PROOF, challenge.control[NONCE:]))


def test_reflected_nonce() -> None:
    """An intruder that uses a second connection to the same worker as an oracle, with the same nonce."""
    first, second = Handshake(Role.ACCEPTOR, COOKIE), Handshake(Role.ACCEPTOR, COOKIE)
    challenge = one(first.receive(frame(Kind.HELLO, MAGIC + os.urandom(NONCE))))
    oracle = one(second.receive(frame(Kind.HELLO, MAGIC + challenge.control[:NONCE])))
    with pytest.raises(AuthenticationError):
        first.receive(frame(Kind.PROOF, oracle.control[NONCE:]))


@pytest.mark.parametrize(
    "control",
    [
        b"",
        MAGIC,
        MAGIC + b"x" * (NONCE - 1),
        MAGIC + b"x" * (NONCE + 1),
        b"distpool/2\n" + b"x" * NONCE,
        b"x" * (len(MAGIC) + NONCE),
    ],
)
def test_malformed_hello(control: bytes) -> None:
    acceptor = Handshake(Role.ACCEPTOR, COOKIE)
    with pytest.raises(ProtocolError, match="Invalid connection credentials"):
        acceptor.receive(frame(Kind.HELLO, control))
    assert acceptor.state is State.FAILED


@pytest.mark.parametrize("kind, role", [(Kind.CHALLENGE, Role.CONNECTOR), (Kind.PROOF, Role.ACCEPTOR)])
def test_truncated_proofs(kind: Kind, role: Role) -> None:
    for length in (0, 1, NONCE - 1, NONCE, NONCE + 1, 2 * NONCE - 1, 2 * NONCE + 1, 200):
        handshake = brought_to(role, State.FRESH if role is Role.CONNECTOR else State.CHALLENGED)
        with pytest.raises(AuthenticationError):
            handshake.receive(frame(kind, b"\0" * length))
        assert handshake.state is State.FAILED


def test_a_body_is_no_part_of_a_handshake() -> None:
    acceptor, connector = Handshake(Role.ACCEPTOR, COOKIE), Handshake(Role.CONNECTOR, COOKIE)
    hello = one(connector.begin())
    with pytest.raises(ProtocolError):
        acceptor.receive(frame(hello.kind, hello.control, b"extra"))
    assert acceptor.state is State.FAILED


def test_after_a_failure_the_right_thing_comes_too_late() -> None:
    connector, acceptor = pair()
    hello = one(connector.begin())
    challenge = one(acceptor.receive(hello))
    with pytest.raises(AuthenticationError):
        acceptor.receive(frame(Kind.PROOF, b"\0" * 32))
    with pytest.raises(ProtocolError):
        acceptor.receive(one(connector.receive(challenge)))


def test_handshake_frames_fit_the_limit_before_authentication() -> None:
    """All of them pass through a reader that is not unlocked."""
    connector, acceptor = pair("c" * 64, "c" * 64)
    parts: Any = connector.begin()
    for side in (acceptor, connector, acceptor):
        parts = side.receive(one(parts))
    assert acceptor.ready and connector.ready
