"""Frames: how bytes on a stream are cut into messages (layer 1: no I/O, no thread, no clock).

    frame = header (16 bytes) | control | buffer table (8 bytes each) | body | buffers

`control` is the typed part (`wire/messages.py`), small and never pickled; `body` holds pickles, opaque here; `buffers`
are out-of-band data. A body that cannot be decoded therefore fails one call and not the link. Every length stands
before what it measures and is checked against a limit before memory is taken.

A table entry with the top bit set is not the data itself but a descriptor of a shared memory segment of the same host
(`SegmentRef`). One `FrameReader` belongs to one stream and is used by the thread that leads the I/O loop.
"""

from __future__ import annotations

import enum
import struct
import sys

from distpool import config
from distpool.errors import ProtocolError
from distpool.hints import Any, NamedTuple

HEADER = struct.Struct("<BBHIQ")  # kind, flags (0), number of buffers, bytes of control, bytes of body
_LENGTH = struct.Struct("<Q")
_SEGMENT = struct.Struct("<QQQ")  # segment id, size of the segment, bytes used; then the path
_IS_SEGMENT = 1 << 63
_SPARE = 1 << 20  # bytes of a frame whose memory is worth keeping for the next one
_SMALL = 32 * 1024  # parts up to this size are joined into one write


class Kind(enum.IntEnum):
    """What a frame is. One kind, one message, one handler."""

    HELLO = 1
    CHALLENGE = 2
    PROOF = 3
    REFUSED = 4
    JOIN = 5
    JOINED = 6
    FUNCTION = 10
    FORGET = 11
    CALLS = 12
    RESULTS = 13
    RECALL = 14
    RECALLED = 15
    INITIALIZE = 16
    INITIALIZED = 17
    SHUTDOWN = 18
    SEGMENTS_FREE = 19
    BLOCKED = 20
    SUBMIT = 21
    OUTCOME = 22
    CANCEL = 23
    CANCELLED = 24
    LOST = 25
    INTERRUPT = 26
    STACKS = 27
    STACKS_ARE = 28
    USAGE = 29
    USAGE_IS = 30
    TRACE = 31
    TRACED = 32
    CONNECT = 33
    CONNECTED = 34
    LAUNCH = 35
    LAUNCHED = 36
    NAMED = 37
    BUSY = 38
    # 40 and above: between any two processes (`node.dispatch`): links, remote calls, references, channels.
    PEER = 40
    WHERE = 41
    ADDRESS = 42
    DIAL = 43
    DEAD = 44
    RELAY = 45
    REQUEST = 46
    REPLY = 47
    NOTICE = 48
    CLIENTS = 49
    REFERENCE = 50
    CHANNEL = 51
    CANCEL_REQUEST = 52
    UNDIALLED = 53
    IDENTITY = 54
    PIECE = 55
    FORWARD = 56
    WANTED = 57
    PUTS = 58
    REVOKE = 59


class SegmentRef(NamedTuple):
    """A buffer that lies in a shared memory segment of the sender."""

    segment_id: int
    path: str
    size: int
    nbytes: int


class Frame(NamedTuple):
    """One message as it came: `kind`, packed `control`, `body`, and `buffers` (bytes-like or `SegmentRef`)."""

    kind: int
    control: bytes
    body: Any
    buffers: list[Any]


_new: Any = tuple.__new__  # the class's own is a Python function round it


def pack_frame(kind: int, control: bytes = b"", body: Any = b"", buffers: Any = ()) -> list[Any]:
    """The frame as a list of bytes-like parts; small parts are joined, big ones are not copied."""
    if not buffers:
        head = HEADER.pack(kind, 0, 0, len(control), len(body))
        if len(body) <= _SMALL:
            return [b"".join((head, control, body))]
        return [head + control, body]
    table = []
    blobs: list[Any] = []
    for buffer in buffers:
        if isinstance(buffer, SegmentRef):
            blob = _SEGMENT.pack(buffer.segment_id, buffer.size, buffer.nbytes) + buffer.path.encode()
            table.append(_LENGTH.pack(len(blob) | _IS_SEGMENT))
            blobs.append(blob)
        else:
            view = memoryview(buffer).cast("B")
            table.append(_LENGTH.pack(view.nbytes))
            blobs.append(view)
    head = HEADER.pack(kind, 0, len(buffers), len(control), len(body)) + control + b"".join(table)
    parts: list[Any] = []
    for part in (head, body, *blobs):
        if parts and type(parts[-1]) is bytes and len(parts[-1]) + len(part) <= _SMALL:
            parts[-1] = parts[-1] + bytes(part)
        elif len(part):
            parts.append(part)
    return parts


def unpack_segment(blob: Any) -> SegmentRef:
    """The descriptor that `pack_frame` made; `ProtocolError` if it is malformed."""
    if len(blob) < _SEGMENT.size:
        raise ProtocolError("segment descriptor is too short")
    segment_id, size, nbytes = _SEGMENT.unpack_from(blob)
    if nbytes > size:
        raise ProtocolError("segment descriptor exceeds its segment")
    return SegmentRef(segment_id, bytes(blob[_SEGMENT.size :]).decode("utf-8", "surrogateescape"), size, nbytes)


class FrameReader:
    """Cuts a byte stream into frames.

    `feed(data)` returns the frames that `data` completed. A frame of more than `config.READ_SIZE` bytes is collected
    in memory of its own: while `target()` is not `None` the caller may read straight into it and then call
    `filled(n)`, which avoids one copy (appending chunk to chunk would even be quadratic).
    """

    def __init__(self) -> None:
        self.limit = config.MAX_BEFORE_AUTH  # raised by `unlock` once the peer has proved who it is
        self._rest = b""
        self._big: bytearray | None = None
        self._size = 0  # of the frame that is collected there
        self._have = 0
        # The memory of the last big frame, to be used again when nobody looks at it any more: fresh pages cost the
        # system several times what it costs to fill them.
        self._spare: bytearray | None = None

    def unlock(self) -> None:
        """The peer is authenticated: frames may now be as large as config allows."""
        self.limit = 0

    def target(self) -> memoryview | None:
        """Where the next bytes of a big frame belong, or `None`."""
        return None if self._big is None else memoryview(self._big)[self._have : self._size]

    def filled(self, count: int) -> list[Frame]:
        """`count` bytes were read into `target()`."""
        assert self._big is not None
        self._have += count
        if self._have < self._size:
            return []
        data, self._big = self._big, None
        if self._size >= _SPARE:
            self._spare = data
        frames, rest = self._cut(memoryview(data)[: self._size])
        if len(rest):
            self._keep(bytes(rest))  # it was as much as could be known before its buffer table had come
        return frames

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that these bytes complete, in order; `ProtocolError` for what no peer of ours sends."""
        if self._big is not None:
            room = self._size - self._have
            self._big[self._have : self._have + min(room, len(data))] = data[:room]
            frames = self.filled(min(room, len(data)))
            return frames + self.feed(data[room:]) if len(data) > room else frames
        if self._rest:
            data = self._rest + data
        elif not self.limit and len(data) >= 16:
            # As a rule: one whole frame and nothing else.
            kind, flags, count, control, body = HEADER.unpack_from(data)
            if 16 + control + body == len(data) and not (flags or count):
                middle = 16 + control
                return [_new(Frame, (kind, data[16:middle], data[middle:], []))]
        frames, rest = self._cut(data)
        self._keep(rest if isinstance(rest, bytes) else bytes(rest))
        return frames

    def _keep(self, rest: bytes) -> None:
        """Keep the beginning of a frame, in memory of its own if the frame is big."""
        self._rest = rest
        # Before authentication nothing is big, and what is behind the first frame is not looked at: see `again`.
        if len(rest) >= HEADER.size and not self.limit:
            total = self._total(rest, 0)
            if total > config.READ_SIZE and total > len(rest):
                self._big = self._memory(total)
                self._size = total
                self._have = len(rest)
                self._big[: self._have] = rest
                self._rest = b""

    def _memory(self, size: int) -> bytearray:
        """Room for a big frame."""
        spare, self._spare = [self._spare], None
        # Whoever still reads the last frame, or has an array on it, holds a reference.
        if spare[0] is not None and size <= len(spare[0]) <= 2 * size and _references(spare) == _ALONE:
            return spare[0]
        return bytearray(size)

    @property
    def has_spare(self) -> bool:
        """Whether memory is kept for the next big frame."""
        return self._spare is not None

    def drop_spare(self) -> None:
        """Nothing big has come for a while."""
        self._spare = None

    def _total(self, data: Any, offset: int) -> int:
        """Bytes of the frame at `offset`, or more than there are when its table has not come yet."""
        _, flags, count, control, body = HEADER.unpack_from(data, offset)
        self._check(flags, count, control, body)
        total = HEADER.size + control + 8 * count + body
        if count:
            start = offset + HEADER.size + control
            if len(data) < start + 8 * count:
                return int(start + 8 * count - offset)
            for index in range(count):
                (length,) = _LENGTH.unpack_from(data, start + 8 * index)
                length &= ~_IS_SEGMENT
                if length > config.MAX_BODY:
                    raise ProtocolError(f"buffer of {length} bytes is over the limit")
                total += length
        return int(total)

    def _check(self, flags: int, count: int, control: int, body: int) -> None:
        if flags:
            raise ProtocolError("unknown frame flags: not a distpool peer")
        if self.limit and (count or control + body > self.limit):
            raise ProtocolError("Invalid connection credentials: frame too large before authentication")
        if control > config.MAX_CONTROL or body > config.MAX_BODY:
            raise ProtocolError("frame length is over the limit")

    def _cut(self, data: Any) -> tuple[list[Frame], Any]:
        frames: list[Frame] = []
        offset, end = 0, len(data)
        while end - offset >= 16:
            kind, flags, count, control, body = HEADER.unpack_from(data, offset)
            if flags or self.limit or control > config.MAX_CONTROL or body > config.MAX_BODY:
                self._check(flags, count, control, body)
            if count:
                total = self._total(data, offset)
                if end - offset < total or end - offset < HEADER.size + control + 8 * count:
                    break
                frames.append(self._cut_buffers(data, offset, kind, count, control, body))
                offset += total
                continue
            start = offset + 16
            stop = start + control + body
            if stop > end:
                break
            middle = start + control
            frames.append(Frame(kind, bytes(data[start:middle]), data[middle:stop], []))
            offset = stop
            if self.limit:
                break  # what follows may have another limit: the caller feeds b"" again after `unlock`
        return frames, data[offset:] if offset else data

    @property
    def again(self) -> bool:
        """Whether `feed(b"")` may find more frames: one frame at a time is cut before authentication."""
        return len(self._rest) >= HEADER.size and self._big is None

    @staticmethod
    def _cut_buffers(data: Any, offset: int, kind: int, count: int, control: int, body: int) -> Frame:
        view = memoryview(data)
        start = offset + HEADER.size
        table = start + control
        place = table + 8 * count
        content = view[place : place + body]
        place += body
        buffers: list[Any] = []
        for index in range(count):
            (length,) = _LENGTH.unpack_from(data, table + 8 * index)
            size = length & ~_IS_SEGMENT
            piece = view[place : place + size]
            buffers.append(unpack_segment(piece) if length & _IS_SEGMENT else piece)
            place += size
        return Frame(kind, bytes(view[start:table]), content, buffers)


def _references(holder: list[Any]) -> int:
    return sys.getrefcount(holder[0])


_ALONE = _references([bytearray(1)])  # how many that are if there is none but the holder's: it depends on the Python
