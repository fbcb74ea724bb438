"""Frames: what is packed comes out, in whatever pieces it arrives; what no peer of ours sends is refused early."""

from __future__ import annotations

import os
import random
import struct
from typing import Any

import pytest

from distpool import config
from distpool.errors import ProtocolError
from distpool.wire.frames import HEADER, Frame, FrameReader, Kind, SegmentRef, pack_frame, unpack_segment


def joined(parts: list[Any]) -> bytes:
    return b"".join(bytes(part) for part in parts)


def unlocked() -> FrameReader:
    reader = FrameReader()
    reader.unlock()
    return reader


def plain(frame: Frame) -> tuple[Any, ...]:
    buffers = [part if isinstance(part, SegmentRef) else bytes(part) for part in frame.buffers]
    return frame.kind, bytes(frame.control), bytes(frame.body), buffers


FRAMES: list[tuple[Any, ...]] = [
    (Kind.CALLS, b"", b"", []),
    (Kind.CALLS, b"control", b"", []),
    (Kind.CALLS, b"", b"body", []),
    (Kind.RESULTS, b"c" * 300, b"b" * 5000, [b"", b"1", b"22"]),
    (Kind.RESULTS, b"", os.urandom(40_000), []),
    (Kind.RESULTS, b"x", os.urandom(65_536), [os.urandom(300_000), b""]),
    (Kind.RESULTS, b"", b"", [os.urandom(65_536)] * 3),
    (Kind.CALLS, b"s", b"p", [SegmentRef(1, "/proc/1/fd/3", 4096, 4096), b"inline", SegmentRef(2**63, "/ä", 2**40, 0)]),
]


@pytest.mark.parametrize("frame", FRAMES, ids=range(len(FRAMES)))
def test_round_trip(frame: tuple[Any, ...]) -> None:
    assert [plain(got) for got in unlocked().feed(joined(pack_frame(*frame)))] == [frame]


@pytest.mark.parametrize("piece", [1, 7, 16, 17, 4096, 65_536])
def test_in_pieces(piece: int) -> None:
    frames = FRAMES[:5] if piece == 1 else FRAMES
    data = b"".join(joined(pack_frame(*frame)) for frame in frames)
    reader, got = unlocked(), []
    for place in range(0, len(data), piece):
        got += reader.feed(data[place : place + piece])
    assert [plain(frame) for frame in got] == frames


def test_read_straight_into_the_target() -> None:
    """As the link does it: big frames are read into their own memory."""
    chance = random.Random(3)
    data = b"".join(joined(pack_frame(*frame)) for frame in FRAMES * 3)
    reader, got, place, targets = unlocked(), [], 0, 0
    while place < len(data):
        target = reader.target()
        if target is None:
            size = chance.randint(1, 70_000)
            got += reader.feed(data[place : place + size])
            place += size
        else:
            targets += 1
            size = min(len(target), chance.randint(1, 70_000), len(data) - place)
            target[:size] = data[place : place + size]
            place += size
            got += reader.filled(size)
    assert [plain(frame) for frame in got] == FRAMES * 3
    assert targets > 3


@pytest.mark.parametrize("count", [8191, 8192, 20_000, 65_535])
@pytest.mark.parametrize("piece", [1000, 65_536])
def test_many_buffers(count: int, piece: int) -> None:
    """The table alone is more than one read brings."""
    data = joined(pack_frame(Kind.CALLS, b"c", b"b", [b"%d" % n for n in range(count)]))
    reader, got = unlocked(), []
    for place in range(0, len(data), piece):
        got += reader.feed(data[place : place + piece])
    assert len(got) == 1 and [bytes(part) for part in got[0].buffers] == [b"%d" % n for n in range(count)]


def test_big_control_part_with_buffers() -> None:
    frame = (Kind.CALLS, os.urandom(300_000), b"body", [b"1", b"2"])
    data = joined(pack_frame(*frame))
    reader, got = unlocked(), []
    for place in range(0, len(data), 50_000):
        got += reader.feed(data[place : place + 50_000])
    assert [plain(one) for one in got] == [frame]


def test_big_parts_are_not_copied_and_small_ones_joined() -> None:
    big = bytearray(1 << 20)
    parts = pack_frame(Kind.CALLS, b"c", b"b", [big, b"small"])
    assert any(isinstance(part, memoryview) and part.obj is big for part in parts)
    assert len(pack_frame(Kind.CALLS, b"c", b"b" * 100)) == 1
    assert len(pack_frame(Kind.CALLS, b"c", b"b", [b"x"] * 50)) == 1


def test_arrays_of_any_item_are_bytes() -> None:
    array = memoryview(struct.pack("<4d", 1, 2, 3, 4)).cast("d")
    (frame,) = unlocked().feed(joined(pack_frame(Kind.CALLS, b"", b"", [array])))
    assert bytes(frame.buffers[0]) == array.tobytes()


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "header",
    [
        (Kind.CALLS, 1, 0, 0, 0),
        (Kind.CALLS, 0xFF, 0, 0, 0),
        (Kind.CALLS, 0, 0, config.MAX_CONTROL + 1, 0),
        (Kind.CALLS, 0, 0, 0, config.MAX_BODY + 1),
        (Kind.CALLS, 0, 3, config.MAX_CONTROL + 1, 0),
    ],
)
def test_headers_over_the_limits_take_no_memory(header: tuple[int, ...]) -> None:
    for extra in (b"", b"x" * 100):
        with pytest.raises(ProtocolError):
            unlocked().feed(HEADER.pack(*header) + extra)


def test_a_buffer_over_the_limit() -> None:
    with pytest.raises(ProtocolError, match="limit"):
        unlocked().feed(HEADER.pack(Kind.CALLS, 0, 1, 0, 0) + struct.pack("<Q", config.MAX_BODY + 1))


@pytest.mark.parametrize(
    "header",
    [
        (Kind.HELLO, 0, 0, config.MAX_BEFORE_AUTH + 1, 0),
        (Kind.HELLO, 0, 0, 10, config.MAX_BEFORE_AUTH),
        (Kind.HELLO, 0, 1, 0, 0),
        (Kind.HELLO, 0, 0, 0, 1 << 30),
    ],
)
def test_before_authentication_frames_are_small(header: tuple[int, ...]) -> None:
    with pytest.raises(ProtocolError, match="before authentication"):
        FrameReader().feed(HEADER.pack(*header))


def test_before_authentication_one_frame_at_a_time() -> None:
    """What follows the last frame of the handshake is judged by the limits that hold then."""
    reader = FrameReader()
    big = (Kind.CALLS, b"c" * 1000, b"b" * 100_000, [b"1"])
    data = joined(pack_frame(Kind.PROOF, b"p")) + joined(pack_frame(*big)) + joined(pack_frame(Kind.RESULTS, b"r"))
    got = reader.feed(data)
    assert [frame.kind for frame in got] == [Kind.PROOF]
    assert reader.again
    reader.unlock()
    assert [plain(frame) for frame in reader.feed(b"")] == [big, (Kind.RESULTS, b"r", b"", [])]
    assert not reader.again


def test_a_big_frame_cut_off_behind_the_handshake() -> None:
    reader = FrameReader()
    big = joined(pack_frame(Kind.CALLS, b"", os.urandom(200_000)))
    assert [frame.kind for frame in reader.feed(joined(pack_frame(Kind.PROOF, b"p")) + big[:50])] == [Kind.PROOF]
    reader.unlock()
    got = reader.feed(b"") if reader.again else []
    got += reader.feed(big[50:])
    assert [bytes(frame.body) for frame in got] == [big[16:]]


def test_without_authentication_nothing_else_is_looked_at() -> None:
    reader = FrameReader()
    reader.feed(joined(pack_frame(Kind.HELLO, b"h")) + HEADER.pack(Kind.CALLS, 0, 0, 0, 1 << 30))
    with pytest.raises(ProtocolError):
        reader.feed(b"")


@pytest.mark.parametrize("blob", [b"", b"x" * 23, struct.pack("<QQQ", 1, 10, 11) + b"/p"])
def test_malformed_segments(blob: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpack_segment(blob)
    frame = HEADER.pack(Kind.CALLS, 0, 1, 0, 0) + struct.pack("<Q", len(blob) | 1 << 63) + blob
    with pytest.raises(ProtocolError):
        unlocked().feed(frame)


def test_noise_gives_frames_or_a_protocol_error() -> None:
    chance = random.Random(1)
    for _ in range(3000):
        noise = bytearray(chance.randbytes(chance.randint(0, 80)))
        if chance.random() < 0.7 and len(noise) > 16:
            noise[1] = 0
            noise[2:16] = struct.pack("<HIQ", chance.randint(0, 3), chance.randint(0, 30), chance.randint(0, 30))
        for reader in (unlocked(), FrameReader()):
            try:
                reader.feed(bytes(noise))
            except ProtocolError:
                pass


def test_kinds_are_distinct_bytes() -> None:
    assert len({int(kind) for kind in Kind}) == len(Kind) and all(0 < kind < 256 for kind in Kind)


def big(byte: bytes, size: int = 3 << 20) -> bytes:
    return b"".join(bytes(part) for part in pack_frame(Kind.RESULTS, b"c", byte * size))


def test_the_memory_of_a_big_frame_is_used_again_when_nobody_reads_it() -> None:
    reader = FrameReader()
    reader.unlock()
    places = []
    for byte in (b"a", b"b", b"c"):
        data = big(byte)
        assert reader.feed(data[:100]) == []
        places.append(id(reader._big))
        (frame,) = reader.feed(data[100:])
        assert bytes(frame.body) == byte * (3 << 20) and reader.has_spare
        del frame
    assert len(set(places)) == 1
    reader.drop_spare()
    assert not reader.has_spare


def test_the_memory_of_a_big_frame_is_left_to_who_reads_it() -> None:
    reader = FrameReader()
    reader.unlock()
    kept = []
    for byte in (b"a", b"b", b"c"):
        data = big(byte)
        reader.feed(data[:100])
        (frame,) = reader.feed(data[100:])
        kept.append(memoryview(frame.body)[5:10])  # a piece is enough
    assert [bytes(piece) for piece in kept] == [b"aaaaa", b"bbbbb", b"ccccc"]


def test_smaller_and_much_smaller_frames_in_memory_that_was_kept() -> None:
    reader = FrameReader()
    reader.unlock()
    for size in (3 << 20, 2 << 20, 3 << 20, 1 << 17, 4 << 20):
        data = big(b"z", size) + big(b"y", 7)
        reader.feed(data[:100])
        found = reader.feed(data[100:])
        assert [len(frame.body) for frame in found] == [size, 7]
        assert bytes(found[0].body) == b"z" * size
        del found
