"""The owner's side of futures: REFERENCE, NOTICE and REPLY frames (layer 4).

Frames are handled on the leader; serialising a value is user code, so that happens on a library thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from distpool.refs import gc
from distpool.refs.ahead import settle_puts
from distpool.refs.gc import Refs
from distpool.refs.lent import Stored, carries_references, decode_lent, received
from distpool.refs.owner import RRID, Entry
from distpool.refs.refs import LOCAL_VALUE, RAISED_HERE, Outcome, open_outcome
from distpool.refs.remote import SET_TWICE, stable
from distpool.refs.travel import dead_future, new_future
from distpool.wire import codec, structs
from distpool.wire.codec import SCALARS
from distpool.wire.failures import encode_exception
from distpool.wire.frames import Frame, Kind
from distpool.wire.messages import ERROR, UNSENDABLE, VALUE
from distpool.wire.records import ENTRUSTED, pack_entrusted, split_entrusted
from distpool.wire.structs import REPLY, unpack_reply

if TYPE_CHECKING:
    from distpool.transport.link import Link


class Serving:
    """Answers REFERENCE and NOTICE frames."""

    def __init__(self, refs: Refs) -> None:
        self._refs = refs
        refs.new_future = new_future
        refs.dead_future = dead_future
        refs.node.handlers[Kind.REFERENCE] = self._on_reference
        refs.node.handlers[Kind.NOTICE] = self._on_notice
        refs.node.handlers[Kind.REPLY] = self._on_reply

    def _on_notice(self, link: Link, frame: Frame) -> None:
        message = structs.Notice.unpack(frame.control)
        future = self._refs.live.get(RRID(message.whence, message.ident))
        if future is not None:
            future._noticed(message.ok)

    def _on_reply(self, link: Link, frame: Frame) -> None:
        request, status = unpack_reply(frame.control)
        buffers = [link.segments.open(buffer) for buffer in frame.buffers] if frame.buffers else []
        body = bytes(frame.body)
        if status & ENTRUSTED:  # by whom we cannot have told of its death
            rows, body = split_entrusted(body)
            status &= ~ENTRUSTED
            self._refs.take_over(int(link.peer), rows)
        if not self._refs.node.peers.requests.settle(request, status, body, buffers):
            received(status, body, buffers, int(link.peer))  # nobody waits any more: not opened

    def _on_reference(self, link: Link, frame: Frame) -> None:
        message = structs.Reference.unpack(frame.control)
        refs, pid = self._refs, int(link.peer)
        entry = refs.owner.touch(RRID(message.whence, message.ident))
        if message.op == "watch":
            refs.owner.watch(entry, lambda outcome: self.notify(pid, entry.rrid, outcome))
            self.reply(pid, message.request, VALUE, b"")
        elif message.op == "isready":
            self.reply(pid, message.request, VALUE, codec.encode(entry.outcome is not None)[0])
        elif message.op == "put":
            buffers = [link.segments.open(buffer) for buffer in frame.buffers]
            outcome = Outcome(VALUE, bytes(frame.body), buffers, pid)
            if carries_references(outcome.data):
                refs.node.deliver(lambda: self._put_opened(entry, pid, message.request, outcome))
            else:
                self._put(entry, pid, message.request, outcome)
        elif message.op == "fail":
            body = bytes(frame.body)
            refs.node.deliver(lambda: self._fail(entry, pid, message.request, body))
        elif message.op == "fetch":
            refs.owner.watch(entry, lambda outcome: self.send_outcome(pid, message.request, outcome))

    def _put(self, entry: Entry, pid: int, request: int, outcome: Outcome) -> None:
        if self._refs.owner.settle(entry, outcome):
            self.reply(pid, request, VALUE, b"")
        else:
            error = RuntimeError(SET_TWICE)
            self._refs.node.deliver(lambda: self.reply_error(pid, request, error))

    def _fail(self, entry: Entry, pid: int, request: int, data: bytes) -> None:
        """On a library thread: `pid` has given a future an error."""
        try:
            error = open_outcome(received(ERROR, data, (), pid))[1]
        except BaseException as failure:
            self.reply_error(pid, request, failure)
            return
        self._put(entry, pid, request, Outcome(RAISED_HERE, error, (), pid))

    def _put_opened(self, entry: Entry, pid: int, request: int, outcome: Outcome) -> None:
        """On a library thread: references in a value live here as objects, so that each taker is lent its own."""
        try:
            value = decode_lent(codec.decode, outcome.data, outcome.buffers)
        except BaseException as error:
            self.reply_error(pid, request, error)
            return
        self._put(entry, pid, request, Outcome(LOCAL_VALUE, value, (), pid))

    def notify(self, pid: int, rrid: RRID, outcome: Outcome) -> None:
        """Tell `pid` that the value is there, without the value."""
        ok = outcome.status in (VALUE, LOCAL_VALUE)
        self._refs.node.peers.send(pid, Kind.NOTICE, structs.Notice(*rrid, ok).pack())

    def send_outcome(self, pid: int, request: int, outcome: Outcome) -> None:
        """Send the value; serialising it is user code, so that happens on a library thread."""
        try:
            plain = outcome.status == LOCAL_VALUE and type(outcome.data) in SCALARS
        except TypeError:  # a type without a hash
            plain = False
        if plain:
            self.reply(pid, request, VALUE, codec.encode(outcome.data)[0])  # runs no code of the user's
        elif outcome.status == LOCAL_VALUE:
            self._refs.node.deliver(lambda: self.reply_value(pid, request, outcome.data))
        elif outcome.status == RAISED_HERE:
            self._refs.node.deliver(lambda: self.reply_error(pid, request, outcome.data))
        else:
            references = outcome.references if isinstance(outcome, Stored) else []

            def send() -> None:
                self.reply(pid, request, outcome.status, outcome.data, outcome.buffers, self.near(references, pid))

            if references:
                self._refs.node.deliver(send)
            else:
                send()

    def reply(
        self, pid: int, request: int, status: int, data: bytes, buffers: Any = (), lent: Sequence[Any] = ()
    ) -> None:
        """Send an answer as it is. `lent`: the references in it; those of third processes go to the master as they do
        with results of executors (`Refs.entrust`), because what we tell their owners may go with us."""
        if lent and pid == 1:
            rows = self._refs.entrust(lent)
            if rows:
                status, data = status | ENTRUSTED, pack_entrusted(rows) + data
        elif lent:
            self._refs.lend(lent, pid)
        self._refs.node.peers.send(pid, Kind.REPLY, REPLY.pack(request, status), data, list(buffers))

    def near(self, references: list[Any], pid: int) -> list[Any]:
        """These, when what `reply` tells their owners can go at once. Not on the leader."""
        if pid != 1:
            self._refs.reach_owners(references, pid)
        return references

    def reply_value(self, pid: int, request: int, value: Any) -> None:
        """Serialise and send a value; references in it are lent to `pid` first. Not on the leader."""
        seen: list[Any] = []
        try:
            data, buffers = codec.encode(value, pid, seen)
        except BaseException as error:
            error = codec.about(error, value, f"a value on worker {self._refs.node.pid}")
            self.reply_error(pid, request, error, UNSENDABLE)
            return
        settle_puts(pid)
        self.reply(pid, request, VALUE, data, stable(buffers), self.near(seen, pid))

    def reply_error(self, pid: int, request: int, error: BaseException, status: int = ERROR) -> None:
        """Serialise and send an error. Not on the leader."""
        seen: list[Any] = []
        data = encode_exception(error, pid, seen=seen)
        settle_puts(pid)
        self.reply(pid, request, status, data, (), self.near(seen, pid))


def serving(node: Any) -> Serving:
    """The owner's side of `node`, made on first use."""
    if node.serving is None:
        node.serving = Serving(gc.of(node))
    made: Serving = node.serving
    return made
