"""Control messages of remote calls, references and channels: fixed structs, packed by hand (layer 1).

They are as frequent as the calls themselves. As JSON (`messages`) the four that a remote call and its answer need took
25 us of the 150 that such a call takes; as structs they take 5.
"""

from __future__ import annotations

import math
import struct

from distpool.errors import ProtocolError
from distpool.hints import ClassVar, Self
from distpool.wire.frames import Kind
from distpool.wire.messages import Message

MODES = ("fetch", "future", "do")
REFERENCE_OPS = ("fetch", "watch", "isready", "put", "fail")
CHANNEL_OPS = ("put", "take", "fetch", "wait", "isready", "isopen", "close", "bind", "make", "restore")
_CODES = {op: code for code, op in enumerate(CHANNEL_OPS)}
_NAMED = 255  # instead of a code: the pools' queues have operations of their own

_REQUEST = struct.Struct("<QBQQQI?")  # then the name
REPLY = struct.Struct("<QB")  # request, status
_NOTICE = struct.Struct("<QQ?")
_CLIENT = struct.Struct("<QQQq")
_REFERENCE = struct.Struct("<QBQQ")
_CHANNEL = struct.Struct("<QBQQdI")  # then the name of an operation that is not in CHANNEL_OPS
_NUMBER = struct.Struct("<Q")
_PUTS = struct.Struct("<QQQI")
_REVOKE = struct.Struct("<QQQI")
CREDIT = struct.Struct("<II")
"""Body of the answer to a `put` and to PUTS: how many items more may be put ahead, and of which epoch that is."""


class Packed(Message):
    """Base of these messages: `LAYOUT` holds one value for each field, unless the class says otherwise."""

    LAYOUT: ClassVar[struct.Struct]

    def pack(self) -> bytes:
        """The control part of the frame."""
        return self.LAYOUT.pack(*[getattr(self, name) for name in self.FIELDS])

    @classmethod
    def unpack(cls, control: bytes) -> Self:
        """The message; `ProtocolError` when the control part does not fit it."""
        try:
            return cls._read(control)
        except (struct.error, IndexError, ValueError, TypeError) as error:
            raise ProtocolError(f"malformed {cls.__name__}: {error}") from None

    @classmethod
    def _read(cls, control: bytes) -> Self:
        return cls(*cls.LAYOUT.unpack(control))


def pack_request(
    request: int, mode: str, whence: int, ident: int, name: str, size: int, buffers: int, reusable: bool
) -> bytes:
    """`Request(...).pack()`, without the object."""
    head = _REQUEST.pack(request, MODES.index(mode), whence, ident, size, buffers, reusable)
    return head + name.encode("utf-8", "surrogatepass")


def unpack_reply(control: bytes) -> tuple[int, int]:
    """`request` and `status` of a `Reply`, without the object."""
    try:
        request, status = REPLY.unpack(control)
    except struct.error as error:
        raise ProtocolError(f"malformed Reply: {error}") from None
    return request, status


class Request(Packed):
    """Any -> any: run a call (body: function, then arguments). `mode` is "fetch", "future" or "do"."""

    kind: ClassVar[Kind] = Kind.REQUEST
    request: int
    mode: str
    whence: int  # of the reference that will hold the value (mode "future")
    ident: int
    name: str
    function_bytes: int
    function_buffers: int
    reusable: bool

    def pack(self) -> bytes:
        return pack_request(*[getattr(self, name) for name in self.FIELDS])

    @classmethod
    def _read(cls, control: bytes) -> Self:
        number, mode, whence, ident, size, buffers, reusable = _REQUEST.unpack_from(control)
        message = cls.__new__(cls)
        message.__dict__ = {  # a third of the time that `cls(...)` takes
            "request": number,
            "mode": MODES[mode],
            "whence": whence,
            "ident": ident,
            "name": control[_REQUEST.size :].decode("utf-8", "surrogatepass"),
            "function_bytes": size,
            "function_buffers": buffers,
            "reusable": reusable,
        }
        return message


class Reply(Packed):
    """Any -> any: how request `request` ended (body: value or exception; `status` as in RESULT)."""

    kind: ClassVar[Kind] = Kind.REPLY
    LAYOUT: ClassVar[struct.Struct] = REPLY
    request: int
    status: int


class Notice(Packed):
    """Owner -> whoever watches: this value is there (`ok`), or the call failed. Without the value."""

    kind: ClassVar[Kind] = Kind.NOTICE
    LAYOUT: ClassVar[struct.Struct] = _NOTICE
    whence: int
    ident: int
    ok: bool


class Clients(Packed):
    """Any -> owner: changes of client counts: rows (whence, id, client pid, change)."""

    kind: ClassVar[Kind] = Kind.CLIENTS
    changes: list[list[int]]

    def pack(self) -> bytes:
        return b"".join([_CLIENT.pack(*row) for row in self.changes])

    @classmethod
    def _read(cls, control: bytes) -> Self:
        return cls([list(row) for row in _CLIENT.iter_unpack(control)])


class Reference(Packed):
    """Any -> owner of a value: `op` is "fetch", "watch", "isready" or "put" (body: value)."""

    kind: ClassVar[Kind] = Kind.REFERENCE
    request: int
    op: str
    whence: int
    ident: int

    def pack(self) -> bytes:
        return _REFERENCE.pack(self.request, REFERENCE_OPS.index(self.op), self.whence, self.ident)

    @classmethod
    def _read(cls, control: bytes) -> Self:
        number, op, whence, ident = _REFERENCE.unpack(control)
        return cls(number, REFERENCE_OPS[op], whence, ident)


class ChannelOp(Packed):
    """Any -> owner of a channel: `op` of it, or of its class; body: the arguments. `timeout` in seconds."""

    kind: ClassVar[Kind] = Kind.CHANNEL
    request: int
    op: str
    whence: int
    ident: int
    timeout: float | None
    arguments: int

    def pack(self) -> bytes:
        timeout = math.nan if self.timeout is None else self.timeout
        op = _CODES.get(self.op, _NAMED)
        head = _CHANNEL.pack(self.request, op, self.whence, self.ident, timeout, self.arguments)
        return head if op != _NAMED else head + self.op.encode()

    @classmethod
    def _read(cls, control: bytes) -> Self:
        number, code, whence, ident, timeout, arguments = _CHANNEL.unpack_from(control)
        rest = control[_CHANNEL.size :]
        op = rest.decode() if code == _NAMED else CHANNEL_OPS[code]
        if bool(rest) != (code == _NAMED):
            raise ValueError("an operation without its name, or with two")
        return cls(number, op, whence, ident, None if math.isnan(timeout) else timeout, arguments)


class CancelRequest(Packed):
    """Any -> any: I no longer wait for the answer of `request`."""

    kind: ClassVar[Kind] = Kind.CANCEL_REQUEST
    LAYOUT: ClassVar[struct.Struct] = _NUMBER
    request: int


class Puts(Packed):
    """Any -> owner of a channel: `count` items that were put ahead on reserved room (body: their lengths, then they).

    Answered by REPLY with `CREDIT`, or with the error if they could not be taken. Without items: so much of the credit
    is given back (body: `CREDIT`); there is no answer.
    """

    kind: ClassVar[Kind] = Kind.PUTS
    LAYOUT: ClassVar[struct.Struct] = _PUTS
    request: int
    whence: int
    ident: int
    count: int


class Revoke(Packed):
    """Owner of a channel -> who may put ahead: send what you have put, and then nothing more but with a credit of
    `epoch`. Answered by REPLY, after what had been put."""

    kind: ClassVar[Kind] = Kind.REVOKE
    LAYOUT: ClassVar[struct.Struct] = _REVOKE
    request: int
    whence: int
    ident: int
    epoch: int


def pack_items(items: list[bytes]) -> bytes:
    """The body of PUTS."""
    return b"".join((struct.pack(f"<{len(items)}I", *map(len, items)), *items))


def unpack_items(body: bytes, count: int) -> list[bytes]:
    """The items of PUTS; `ProtocolError` if they are not what the body holds."""
    try:
        lengths = struct.unpack_from(f"<{count}I", body)
    except struct.error as error:
        raise ProtocolError(f"malformed Puts: {error}") from None
    offset = 4 * count
    if offset + sum(lengths) != len(body):
        raise ProtocolError("malformed Puts: the items are not as long as it says")
    items = []
    for length in lengths:
        items.append(body[offset : offset + length])
        offset += length
    return items


MESSAGES: dict[int, type[Message]] = {
    int(cls.kind): cls for cls in (Request, Reply, Notice, Clients, Reference, ChannelOp, CancelRequest, Puts, Revoke)
}
