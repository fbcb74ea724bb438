"""Control messages of big functions that workers pass on to each other (layer 1; `node.bulk`)."""

from __future__ import annotations

from distpool.hints import ClassVar
from distpool.wire.frames import Kind
from distpool.wire.messages import Message


class Piece(Message):
    """Master or worker -> worker: part of buffer `index` of the function `number` (body); `sizes` of its buffers."""

    kind: ClassVar[Kind] = Kind.PIECE
    number: int
    index: int
    offset: int
    sizes: list[int]


class Forward(Message):
    """Master -> worker: pass the pieces of the function `number` on to the worker `pid`."""

    kind: ClassVar[Kind] = Kind.FORWARD
    number: int
    pid: int


class Wanted(Message):
    """Worker -> master: no pieces of the function `number` come to me."""

    kind: ClassVar[Kind] = Kind.WANTED
    number: int


MESSAGES: dict[int, type[Message]] = {int(cls.kind): cls for cls in (Piece, Forward, Wanted)}
