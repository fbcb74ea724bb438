"""Messages that are structs: each one travels and comes back equal; what does not fit is a ProtocolError."""

from __future__ import annotations

import random

import pytest

from distpool.errors import ProtocolError
from distpool.wire import structs
from distpool.wire.structs import (
    CancelRequest,
    ChannelOp,
    Clients,
    Notice,
    Packed,
    Puts,
    Reference,
    Reply,
    Request,
    Revoke,
)

BIG = 2**60
SAMPLES: list[Packed] = [
    *(Request(BIG, mode, 2, BIG, "module.name ä\udc80", 70_000, 3, mode == "fetch") for mode in structs.MODES),
    Request(0, "do", 0, 0, "", 0, 0, False),
    Reply(BIG, 255),
    Notice(2, BIG, True),
    Notice(2, 1, False),
    Clients([]),
    Clients([[1, BIG, 3, -5], [2, 7, 4, 1]]),
    *(Reference(BIG, op, 1, 2) for op in structs.REFERENCE_OPS),
    *(ChannelOp(BIG, op, 1, 2, 0.25, 1) for op in structs.CHANNEL_OPS),
    ChannelOp(1, "take", 1, 2, None, 0),
    ChannelOp(1, "take", 1, 2, float("inf"), 0),
    ChannelOp(1, "everybody", 1, 2, 0.5, 0),
    CancelRequest(BIG),
    Puts(BIG, 1, 2, 128),
    Revoke(BIG, 1, 2, 9),
]


@pytest.mark.parametrize("message", SAMPLES, ids=repr)
def test_round_trip(message: Packed) -> None:
    assert type(message).unpack(message.pack()) == message


def test_every_message_is_sampled() -> None:
    assert {type(message) for message in SAMPLES} == set(structs.MESSAGES.values())


@pytest.mark.parametrize("message", SAMPLES, ids=repr)
def test_what_does_not_fit(message: Packed) -> None:
    cls, good = type(message), message.pack()
    bad = [b"\0"]
    if isinstance(message, Request):
        bad.append(good[:-1] if not message.name else good[: -len(message.name.encode("utf-8", "surrogatepass")) - 1])
    elif isinstance(message, ChannelOp):
        bad.extend((good[: -len(message.op) - 1], good[: -len(message.op)]))
        if message.op in structs.CHANNEL_OPS:
            bad.append(good + b"x")
    else:
        bad.append(good + b"\0")
        if good:
            bad.append(good[:-1])
    for control in bad:
        with pytest.raises(ProtocolError):
            cls.unpack(control)


def test_without_objects() -> None:
    request = Request(7, "do", 2, 3, "name", 4, 5, True)
    assert structs.pack_request(7, "do", 2, 3, "name", 4, 5, True) == request.pack()
    assert structs.unpack_reply(Reply(9, 3).pack()) == (9, 3)
    with pytest.raises(ProtocolError):
        structs.unpack_reply(b"short")


def test_unknown_codes() -> None:
    for good in (Request(1, "do", 0, 0, "", 0, 0, False), Reference(1, "put", 1, 2), ChannelOp(1, "put", 1, 2, 0.5, 1)):
        packed = bytearray(good.pack())
        packed[8] = 200
        with pytest.raises(ProtocolError):
            type(good).unpack(bytes(packed))


def test_nothing_but_protocol_errors() -> None:
    chance = random.Random(4)
    for message in SAMPLES:
        for _ in range(50):
            packed = bytearray(message.pack())
            if packed:
                packed[chance.randrange(len(packed))] = chance.randrange(256)
            try:
                type(message).unpack(bytes(packed[: chance.randrange(len(packed) + 1)]))
            except ProtocolError:
                continue


def test_items() -> None:
    for items in ([b""], [b"a"], [b"", b"bc" * 1000, b"", b"d"], [b"%d" % number for number in range(500)]):
        assert structs.unpack_items(structs.pack_items(items), len(items)) == items
    packed = structs.pack_items([b"abc", b"d"])
    for body, count in ((packed[:-1], 2), (packed + b"x", 2), (packed, 1), (packed, 3), (b"", 1)):
        with pytest.raises(ProtocolError):
            structs.unpack_items(body, count)
