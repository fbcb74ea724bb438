"""Big functions on their way to many hosts: the master sends each at most twice, the workers pass it on (layer 3).

    master   Spreading.send(function, pid): to the first two in pieces; of each later one, some earlier one is the
             parent, and gets FORWARD
    worker   PIECE from the master or the parent -> kept, and passed on at once to whoever is to get them from here
             FORWARD: that worker, too: what is there already, and all that comes
             a task that needs the function waits for the last piece (`wait`)
    lost     no piece for `PATIENCE` seconds (a parent died, or cannot reach its child) -> WANTED: all of it once more,
             from the master

Pieces are passed on while later ones are still coming, so that the whole takes little longer than two copies out of
the master, however many hosts there are. Workers on the master's own machine map shared memory instead, and small
functions are not worth it. Everything runs on the leader unless it says otherwise.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterable
from functools import partial

from distpool.errors import ProtocolError
from distpool.hints import TYPE_CHECKING, Any
from distpool.transport.link import Link
from distpool.wire import pieces
from distpool.wire.frames import Frame, Kind

if TYPE_CHECKING:
    from distpool.node.node import Node
    from distpool.wire.functions import EncodedFunction

WORTH = 1 << 20
"""Bytes in the buffers of a function, from which on it travels like this."""
SIZE = 1 << 20
"""Bytes of a piece."""
CHILDREN = 2
PATIENCE = 10.0
KEPT = 60.0
"""Seconds that a worker which has used a function keeps it for others who get it from there."""


class _Going:
    """A function that is being spread: who has been told of it, in order. The buffers are the function's."""

    def __init__(self, function: EncodedFunction) -> None:
        self.function = weakref.ref(function)
        self.pids: list[int] = []
        self.last = 0.0  # when the last of them was


class Spreading:
    """The master's side."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._lock = threading.Lock()  # protects _going
        self._going: dict[int, _Going] = {}
        self.copies = 0  # sent by this process itself
        node.handlers[Kind.WANTED] = self._on_wanted

    def is_worth_it(self) -> bool:
        """Whether there are enough workers on other hosts. Any thread."""
        group = self._node.group
        far = [m for m in list(group.members.values()) if m.link is not None and not m.link.shares_memory]
        return len(far) > CHILDREN

    def send(self, function: EncodedFunction, pid: int, link: Link) -> None:
        """Let this worker have the buffers. Any thread."""
        number, now = function.number, time.monotonic()
        with self._lock:
            for old in [each for each, going in self._going.items() if going.function() is None]:
                del self._going[old]
            going = self._going.setdefault(number, _Going(function))
            if now - going.last > KEPT / 2:
                going.pids = []  # those who had it may have dropped it: begin anew
            going.last = now
            place = len(going.pids)
            parent = going.pids[place // CHILDREN - 1] if place >= CHILDREN else 1
            going.pids.append(pid)
        passing = self._node.peers.link(parent) if parent != 1 else None
        if passing is None or passing.closed or not self._node.group.may_connect(parent, pid):
            self._begin(function, link)
        else:
            passing.send(Kind.FORWARD, pieces.Forward(number, pid).pack())

    def forgotten(self, numbers: Iterable[int], pid: int) -> None:
        """This worker has been told to drop these functions: it cannot pass them on, and may be sent them again. Any
        thread."""
        with self._lock:
            for number in numbers:
                going = self._going.get(number)
                if going is not None and pid in going.pids:
                    going.pids.remove(pid)

    def _begin(self, function: EncodedFunction, link: Link) -> None:
        self.copies += 1
        self._node.deliver(lambda: self._send_pieces(function, link))

    def _send_pieces(self, function: EncodedFunction, link: Link) -> None:
        """On a library thread: one piece after the other is given to the kernel. All at once, they would lie in the
        link's outbox before every FORWARD, so that nobody passed anything on before he had all of it himself."""
        sizes = [len(buffer) for buffer in function.buffers]
        for index, buffer in enumerate(function.buffers):
            view = memoryview(buffer)
            for offset in range(0, len(view), SIZE):
                control = pieces.Piece(function.number, index, offset, sizes).pack()
                if not link.send(Kind.PIECE, control, view[offset : offset + SIZE]):
                    return
                link.drain()

    def _on_wanted(self, link: Link, frame: Frame) -> None:
        going = self._going.get(pieces.Wanted.unpack(frame.control).number)
        function = going.function() if going is not None else None
        if function is not None:
            self._begin(function, link)


class _Blob:
    """The buffers of one function, as far as they have come."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes
        self.buffers = [bytearray(size) for size in sizes]
        self.missing = sum(sizes)
        self.there: set[tuple[int, int]] = set()
        self.children: list[int] = []
        self.moved = time.monotonic()  # when the last piece came
        self.complete = threading.Event()

    def take(self, index: int, offset: int, data: Any) -> bool:
        """False if it was there already."""
        if not 0 <= index < len(self.buffers) or not 0 <= offset <= len(self.buffers[index]) - len(data):
            raise ProtocolError("a piece of a function that does not fit it")
        self.moved = time.monotonic()
        if (index, offset) in self.there:
            return False
        self.there.add((index, offset))
        self.buffers[index][offset : offset + len(data)] = data
        self.missing -= len(data)
        if not self.missing:
            self.complete.set()
        return True


class Store:
    """A worker's side."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._blobs: dict[int, _Blob] = {}  # changed on the leader, read anywhere
        self._to_pass: dict[int, list[int]] = {}  # number -> children of a function of which nothing has come yet
        self._begun: dict[int, threading.Event] = {}  # number -> set when its blob is there; dict operations are atomic
        node.handlers[Kind.PIECE] = self._on_piece
        node.handlers[Kind.FORWARD] = self._on_forward

    def _on_piece(self, link: Link, frame: Frame) -> None:
        message = pieces.Piece.unpack(frame.control)
        blob = self._blobs.get(message.number)
        if blob is None:
            blob = self._blobs[message.number] = _Blob(message.sizes)
            blob.children += self._to_pass.pop(message.number, [])
            begun = self._begun.pop(message.number, None)
            if begun is not None:
                begun.set()
        if blob.take(message.index, message.offset, frame.body):
            data = bytes(frame.body) if blob.children else b""
            for child in blob.children:
                self._node.peers.send(child, Kind.PIECE, frame.control, data)

    def _on_forward(self, link: Link, frame: Frame) -> None:
        message = pieces.Forward.unpack(frame.control)
        blob = self._blobs.get(message.number)
        if blob is None:
            self._to_pass.setdefault(message.number, []).append(message.pid)
            return
        blob.children.append(message.pid)
        for index, offset in sorted(blob.there):
            control = pieces.Piece(message.number, index, offset, blob.sizes).pack()
            data = bytes(memoryview(blob.buffers[index])[offset : offset + SIZE])
            self._node.peers.send(message.pid, Kind.PIECE, control, data)

    def drop(self, number: int) -> None:
        """It is not needed any more, or the task that needed it has its buffers."""
        self._blobs.pop(number, None)
        self._to_pass.pop(number, None)
        self._begun.pop(number, None)

    def _end(self, number: int, blob: _Blob) -> None:
        if self._blobs.get(number) is blob:  # else it was dropped, and may be on its way again
            self.drop(number)

    def wait(self, number: int) -> list[Any]:
        """The buffers, once they are all there. On a task's thread.

        ConnectionError: they do not come, neither by way of another worker nor from the master.
        """
        began, asked = time.monotonic(), 0
        while True:
            begun = self._begun.setdefault(number, threading.Event())  # before the look: nothing comes between the two
            blob = self._blobs.get(number)
            if blob is not None and blob.complete.wait(0.25):
                self._node.loop.call_later(KEPT, partial(self._end, number, blob))  # until then others may get it here
                return list(blob.buffers)
            if blob is None:
                begun.wait(0.25)  # its first piece is on its way behind the function itself
            quiet = time.monotonic() - max(began, blob.moved if blob is not None else 0.0)
            if quiet > PATIENCE:
                if asked == 2:
                    raise ConnectionError("what the function captured has not come: the links are too slow, or cut")
                asked, began = asked + 1, time.monotonic()
                link = self._node.master_link
                if link is not None:
                    link.send(Kind.WANTED, pieces.Wanted(number).pack())


__all__ = ["Spreading", "Store", "WORTH"]
