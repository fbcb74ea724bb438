"""The owner's side of RemoteChannels: CHANNEL frames (layer 4).

Operations on our own `Channel`, and what a subclass of it has left as it was, are done by the leader, with callbacks; a
channel class of the user's own and factories run on library threads, and what is put into typed channels is looked at
there. A `take` that blocks there cannot be ended: the item that it gets when nobody waits for it any more goes back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distpool.errors import ChannelClosedError, ProcessExitedException
from distpool.logs import Log
from distpool.refs import gc
from distpool.refs.ahead import is_open, on_revoke, settle_puts
from distpool.refs.channel import Channel, by_callbacks, is_of_channel
from distpool.refs.channelcore import Handed, Waiter
from distpool.refs.channels import declared, run_here
from distpool.refs.lent import carries_references, decode_lent
from distpool.refs.owner import RRID
from distpool.refs.refs import LOCAL_VALUE, RAISED_HERE, Outcome
from distpool.refs.room import HOLD, PATIENCE
from distpool.refs.serving import Serving, serving
from distpool.wire import codec, structs
from distpool.wire.frames import Frame, Kind
from distpool.wire.messages import VALUE
from distpool.wire.records import PLAIN_ERROR
from distpool.wire.structs import CREDIT, REPLY

if TYPE_CHECKING:
    from collections.abc import Callable

    from distpool.node.node import Node
    from distpool.transport.ioloop import Timer
    from distpool.transport.link import Link


log = Log("channels")
_NONE = codec.encode(None)[0]
_GONE = "this channel does not exist any more"


class _Requests:
    """CHANNEL frames. Operations on our own Channel are done by the leader; the rest on library threads."""

    def __init__(self, node: Node, answers: Serving) -> None:
        self._node = node
        self._refs = gc.of(node)
        self._answers = answers
        #: (pid, request) -> who waits, and the timer that ends it; dict operations are atomic.
        self._waiters: dict[tuple[int, int], tuple[Channel, Waiter, Timer | None]] = {}
        #: The same for takes that block on library threads: filled when nobody waits for the item any more.
        self._blocking: dict[tuple[int, int], list[None]] = {}
        node.peers.on_lost.append(self._on_lost)
        node.peers.on_unlinked.append(self._on_unlinked)
        node.handlers[Kind.CHANNEL] = self._on_channel
        node.handlers[Kind.CANCEL_REQUEST] = self._on_cancel
        node.handlers[Kind.PUTS] = self._on_puts
        node.handlers[Kind.REVOKE] = lambda link, frame: on_revoke(node, link, frame)

    def _on_lost(self, pid: int) -> None:
        """Leader: its channels have forgotten its waiters already."""
        for key in list(self._waiters):
            if key[0] == pid:
                self._served(key)
        self._unwanted(pid)

    def _unwanted(self, pid: int) -> None:
        for (asker, _), given_up in list(self._blocking.items()):
            if asker == pid:
                given_up.append(None)

    def _on_unlinked(self, pid: int) -> None:
        """Leader: what it waited for has failed there with the link; an item for it would be lost, and one of its own
        come late. Where that was not noticed, the answer says so."""
        text = f"its connection to process {pid} was lost"
        for key, (channel, waiter, _) in list(self._waiters.items()):
            if key[0] == pid:
                channel.withdraw(waiter, ProcessExitedException(self._node.pid, None, True, "", text))
        self._unwanted(pid)

    def _served(self, key: tuple[int, int]) -> tuple[Channel, Waiter] | None:
        """Any thread: nobody waits there any more; who did."""
        found = self._waiters.pop(key, None)
        if found is None:
            return None
        channel, waiter, timer = found
        if timer is not None:
            timer.cancel()
        return channel, waiter

    def _on_cancel(self, link: Link, frame: Frame) -> None:
        key = int(link.peer), structs.CancelRequest.unpack(frame.control).request
        found, given_up = self._waiters.get(key), self._blocking.get(key)
        if found is not None:
            found[0].withdraw(found[1])  # TimeoutError then ends the asker's request
        elif given_up is not None:
            given_up.append(None)

    def _on_channel(self, link: Link, frame: Frame) -> None:
        message = structs.ChannelOp.unpack(frame.control)
        pid = int(link.peer)
        buffers = [link.segments.open(buffer) for buffer in frame.buffers]
        body = bytes(frame.body)
        entry = self._refs.owner.get(RRID(message.whence, message.ident))
        channel: Any = entry.channel if entry is not None else None
        plain = channel is not None and by_callbacks(channel, message.op)
        if plain and message.op in ("take", "fetch", "wait") and not message.arguments:
            self._wait_for(channel, message, pid)
        elif plain and (message.op == "restore" or (message.op == "put" and message.arguments == 1)):
            use = self._put if message.op == "put" else self._restore
            item = Outcome(VALUE, body, buffers, pid)
            if carries_references(body) or channel.type is not object:
                self._node.deliver(
                    lambda: self._open(channel, item, message, lambda opened: use(channel, message, pid, opened))
                )
            else:
                use(channel, message, pid, item)
        else:
            if message.op == "take":
                self._blocking[pid, message.request] = []
            self._node.deliver(lambda: self._run(message, pid, body, buffers, channel))

    def _wait_for(self, channel: Channel, message: Any, pid: int) -> None:
        key = (pid, message.request)

        def served(outcome: Outcome) -> None:
            self._served(key)
            if message.op == "wait" and outcome.status == LOCAL_VALUE:
                self._show(channel, lambda: self._answers.reply(pid, message.request, VALUE, _NONE))
            else:
                self._show(channel, lambda: self._send(pid, message.request, outcome))

        waiter = channel.request(message.op, served, pid)
        self._keep(key, channel, waiter, message.timeout)

    def _open(self, channel: Channel, item: Outcome, message: Any, use: Callable[[Outcome], object]) -> None:
        """On a library thread: references in an item live here as objects, so that each taker is lent its own; and the
        type is asked for, which may be the user's code."""
        try:
            opened = Outcome(LOCAL_VALUE, decode_lent(codec.decode, item.data, item.buffers), (), item.pid)
        except BaseException as error:
            self._answers.reply_error(item.pid, message.request, error)
            return
        try:
            if message.op == "put":
                channel.check_type(opened.data)
        except TypeError as error:
            self._reply_plain(item.pid, message.request, error)
        except BaseException as error:
            self._answers.reply_error(item.pid, message.request, error)
        else:
            self._node.loop.call_soon(lambda: use(opened))

    def _restore(self, channel: Channel, message: Any, pid: int, item: Outcome) -> None:
        channel.restore(item)
        self._answers.reply(pid, message.request, VALUE, _NONE)

    def _put(self, channel: Channel, message: Any, pid: int, item: Outcome) -> None:
        key, rrid = (pid, message.request), RRID(message.whence, message.ident)
        waited = False

        def answer() -> None:
            self._show(channel, lambda: self._accept(channel, rrid, pid, message.request))

        def accepted(outcome: Outcome) -> None:
            self._served(key)
            if outcome.status == RAISED_HERE:
                self._plain_error(pid, message.request, outcome.data)
            elif not waited or pid == 1:
                answer()
            else:
                channel.hold(answer, lambda: self._node.loop.call_later(HOLD, channel.let_go))

        waiter = channel.offer(item, accepted, pid)
        waited = True
        self._keep(key, channel, waiter, message.timeout)

    def _show(self, channel: Channel, send: Callable[[], object]) -> None:
        """Any thread: `send()` tells somebody what this channel is like."""
        tied, ahead = channel.tied, self._node.ahead
        if tied and ahead is not None:
            ahead.after(tied, send)
        else:
            send()

    # -- items that are put ahead (`refs.room`) ------------------------------------------------------------------

    def _accept(self, channel: Channel, rrid: RRID, pid: int, request: int) -> None:
        """Any thread: what `pid` has put is in; it may put some more without asking."""

        def answer(credit: int, epoch: int) -> None:
            self._node.peers.send(pid, Kind.REPLY, REPLY.pack(request, VALUE), CREDIT.pack(credit, epoch))

        if pid != 1 and type(channel) is Channel and not is_open(channel.tied):  # the master asks for each
            channel.reserve(pid, lambda whom, epoch: self._revoke(channel, rrid, whom, epoch), answer)
        else:
            answer(0, 0)

    def _on_puts(self, link: Link, frame: Frame) -> None:
        message, pid = structs.Puts.unpack(frame.control), int(link.peer)
        if not message.count:
            self._give_back(RRID(message.whence, message.ident), pid, *CREDIT.unpack(bytes(frame.body)))
            return
        items = [Outcome(VALUE, data, (), pid) for data in structs.unpack_items(bytes(frame.body), message.count)]
        rrid = RRID(message.whence, message.ident)
        entry = self._refs.owner.get(rrid)
        channel: Any = entry.channel if entry is not None else None
        if type(channel) is not Channel:
            error = RuntimeError(_GONE)
            self._node.deliver(lambda: self._answers.reply_error(pid, message.request, error))
        else:
            channel.arrive(pid, items, lambda taken: self._arrived(channel, rrid, pid, message.request, taken))

    def _arrived(self, channel: Channel, rrid: RRID, pid: int, request: int, taken: bool) -> None:
        if taken:
            self._accept(channel, rrid, pid, request)
        else:
            self._plain_error(pid, request, ChannelClosedError("Channel is closed."))

    def _give_back(self, rrid: RRID, pid: int, credit: int, epoch: int) -> None:
        """`pid` will not use this credit: its object of the channel is gone."""
        entry = self._refs.owner.get(rrid)
        if entry is not None and type(entry.channel) is Channel:
            entry.channel.give_back(pid, credit, epoch)

    def _revoke(self, channel: Channel, rrid: RRID, pid: int, epoch: int) -> None:
        """Any thread: call the credit of `pid` back."""
        peers = self._node.peers
        number = peers.requests.new(
            pid, lambda status, data, buffers: channel.answered(pid), lambda error: channel.answered(pid)
        )
        peers.send(pid, Kind.REVOKE, structs.Revoke(number, *rrid, epoch).pack())
        self._node.loop.call_later(PATIENCE, lambda: channel.overdue(pid, epoch))
        if pid in peers.dead:
            peers.requests.fail(pid, peers.dead[pid])

    def _keep(self, key: tuple[int, int], channel: Channel, waiter: Waiter, timeout: float | None) -> None:
        if not waiter.live:
            return

        def expire() -> None:
            channel.expire(waiter)

        timer = None if timeout is None else self._node.loop.call_later(timeout, expire)
        self._waiters[key] = channel, waiter, timer
        if not waiter.live or key[0] in self._node.peers.dead:  # meanwhile: nobody else would look for it here
            self._served(key)
            channel.withdraw(waiter)

    def _send(self, pid: int, request: int, outcome: Outcome) -> None:
        if outcome.status == RAISED_HERE:
            self._plain_error(pid, request, outcome.data)
        elif isinstance(outcome, Handed):
            self._node.deliver(lambda: self._hand_over(pid, request, outcome))
        else:
            self._answers.send_outcome(pid, request, outcome)

    def _hand_over(self, pid: int, request: int, item: Handed) -> None:
        try:
            self._answers.reply_value(pid, request, item.data)
        finally:
            item.then()

    def _plain_error(self, pid: int, request: int, error: BaseException) -> None:
        self._node.deliver(lambda: self._reply_plain(pid, request, error))

    def _reply_plain(self, pid: int, request: int, error: BaseException) -> None:
        """On a library thread. The error may be the user's own (`Channel.close`), so that it cannot be sent at all:
        whoever waits for the answer has to hear of that as well."""
        seen: list[Any] = []
        try:
            data = codec.dump(error, pid, seen, None)
        except BaseException:
            self._answers.reply_error(pid, request, error)
            return
        self._answers.reply(pid, request, PLAIN_ERROR, data, (), self._answers.near(seen, pid))

    def _run(self, message: Any, pid: int, body: bytes, buffers: list[Any], channel: Any) -> None:
        """On a library thread: whatever may run user code or block."""
        try:
            if message.op == "make":
                made = decode_lent(codec.decode, body, buffers)()
                self._refs.owner.touch(RRID(message.whence, message.ident), pid).channel = made
                value: Any = declared(made)
            else:
                if channel is None:
                    raise RuntimeError(_GONE)
                arguments = decode_lent(codec.decode, body, buffers) if message.arguments else ()
                if message.op == "restore":
                    _put_back(self._node, channel, arguments, pid, message.arguments == 1)
                    value = None
                else:
                    if message.op == "put" and message.arguments == 1:
                        arguments = (arguments,)
                    value = run_here(self._node, channel, message.op, tuple(arguments), message.timeout)
                settle_puts()  # the class is the user's own, or his code may have done something meanwhile
                if message.op in ("put", "wait", "close"):
                    value = None
                elif message.op == "take" and self._is_unwanted(pid, message.request):
                    _put_back(self._node, channel, value, pid, not message.arguments)
                    raise TimeoutError  # ends the asker's request
        except BaseException as error:
            if is_of_channel(channel, error) or (message.op == "bind" and isinstance(error, ValueError)):
                self._plain_error(pid, message.request, error)
            else:
                self._answers.reply_error(pid, message.request, error)
        else:
            self._answers.reply_value(pid, message.request, value)
        finally:
            self._blocking.pop((pid, message.request), None)

    def _is_unwanted(self, pid: int, request: int) -> bool:
        """Whether nobody waits for this item. Who gives up from now on sends it back (`channels._give_back`)."""
        return bool(self._blocking.pop((pid, request), None)) or pid in self._node.peers.dead


def _put_back(node: Node, channel: Any, item: Any, pid: int, plain: bool) -> None:
    """An item of a take that had been given up: to the head of a Channel, behind the others in a class of the user's
    own, which knows no other way. `plain`: the take had no arguments; where it had, nobody knows what its `put` wants.
    """
    if isinstance(channel, Channel):
        channel.restore(Outcome(LOCAL_VALUE, item, (), pid))
        return
    try:
        if not plain:
            raise TypeError("its take had arguments")
        run_here(node, channel, "put", (item,), None)
    except Exception as error:
        kind = type(channel).__name__
        log.warning("an item of %s is lost: whoever took it has given up, and it cannot be put back (%s)", kind, error)


def install(node: Node) -> None:
    """Register the channel kinds with `node`."""
    _Requests(node, serving(node))
