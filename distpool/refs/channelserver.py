"""The owner's side of RemoteChannels: CHANNEL frames (layer 4).

Operations on our own `Channel` are done by the leader, with callbacks; a channel class of the user's own, typed
channels and factories run on library threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distpool.errors import ChannelClosedError
from distpool.refs import gc
from distpool.refs.channel import PLAIN_ERROR, Channel, Handed, Waiter
from distpool.refs.channels import run_here
from distpool.refs.owner import RRID, carries_references
from distpool.refs.refs import LOCAL_VALUE, RAISED_HERE, Outcome
from distpool.refs.serving import Serving, serving
from distpool.wire import codec, messages
from distpool.wire.frames import Frame, Kind
from distpool.wire.messages import VALUE

if TYPE_CHECKING:
    from collections.abc import Callable

    from distpool.node.node import Node
    from distpool.transport.link import Link


class _Requests:
    """CHANNEL frames. Operations on our own Channel are done by the leader; the rest on library threads."""

    def __init__(self, node: Node, answers: Serving) -> None:
        self._node = node
        self._refs = gc.of(node)
        self._answers = answers
        self._waiters: dict[tuple[int, int], tuple[Channel, Waiter]] = {}  # (pid, request) -> who waits
        node.handlers[Kind.CHANNEL] = self._on_channel
        node.handlers[Kind.CANCEL_REQUEST] = self._on_cancel

    def _on_cancel(self, link: Link, frame: Frame) -> None:
        number = messages.CancelRequest.unpack(frame.control).request
        found = self._waiters.pop((int(link.peer), number), None)
        if found is not None and found[0].withdraw(found[1]):
            self._plain_error(int(link.peer), number, TimeoutError())  # ends the asker's request

    def _on_channel(self, link: Link, frame: Frame) -> None:
        message = messages.ChannelOp.unpack(frame.control)
        pid = int(link.peer)
        buffers = [link.segments.open(buffer) for buffer in frame.buffers]
        body = bytes(frame.body)
        entry = self._refs.owner.get(RRID(message.whence, message.ident))
        channel: Any = entry.channel if entry is not None else None
        # Its own dict: a user's subclass may have overridden anything.
        plain = "by_callbacks" in vars(type(channel))
        if plain and message.op in ("take", "fetch", "wait") and not message.arguments:
            self._wait_for(channel, message, pid)
        elif plain and (
            message.op == "restore" or (message.op == "put" and message.arguments == 1 and channel.type is object)
        ):
            use = self._put if message.op == "put" else self._restore
            item = Outcome(VALUE, body, buffers, pid)
            if carries_references(body):
                self._node.deliver(lambda: self._open(item, message, lambda opened: use(channel, message, pid, opened)))
            else:
                use(channel, message, pid, item)
        else:
            self._node.deliver(lambda: self._run(message, pid, body, buffers, channel))

    def _wait_for(self, channel: Channel, message: Any, pid: int) -> None:
        key = (pid, message.request)

        def served(outcome: Outcome) -> None:
            self._waiters.pop(key, None)
            if message.op == "wait" and outcome.status == LOCAL_VALUE:
                self._answers.reply(pid, message.request, VALUE, codec.encode(None)[0])
            else:
                self._send(pid, message.request, outcome)

        waiter = channel.request(message.op, served, pid)
        self._keep(key, channel, waiter, message.timeout)

    def _open(self, item: Outcome, message: Any, use: Callable[[Outcome], object]) -> None:
        """On a library thread: references in an item live here as objects, so that each taker is lent its own."""
        try:
            opened = Outcome(LOCAL_VALUE, codec.decode(item.data, item.buffers), (), item.pid)
        except BaseException as error:
            self._answers.reply_error(item.pid, message.request, error)
        else:
            self._node.loop.call_soon(lambda: use(opened))

    def _restore(self, channel: Channel, message: Any, pid: int, item: Outcome) -> None:
        channel.restore(item)
        self._answers.reply(pid, message.request, VALUE, codec.encode(None)[0])

    def _put(self, channel: Channel, message: Any, pid: int, item: Outcome) -> None:
        key = (pid, message.request)

        def accepted(outcome: Outcome) -> None:
            self._waiters.pop(key, None)
            self._send(pid, message.request, outcome)

        self._keep(key, channel, channel.offer(item, accepted, pid), message.timeout)

    def _keep(self, key: tuple[int, int], channel: Channel, waiter: Waiter, timeout: float | None) -> None:
        if not waiter.live:
            return
        self._waiters[key] = channel, waiter
        if timeout is not None:

            def expire() -> None:
                if self._waiters.pop(key, None) is not None and channel.withdraw(waiter):
                    self._plain_error(*key, TimeoutError())

            self._node.loop.call_later(timeout, expire)

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
        self._node.deliver(lambda: self._answers.reply(pid, request, PLAIN_ERROR, codec.encode(error)[0]))

    def _run(self, message: Any, pid: int, body: bytes, buffers: list[Any], channel: Any) -> None:
        """On a library thread: whatever may run user code or block."""
        try:
            if message.op == "make":
                made = codec.decode(body, buffers)()
                self._refs.owner.touch(RRID(message.whence, message.ident), pid).channel = made
                value: Any = None
            else:
                if channel is None:
                    raise RuntimeError("this channel does not exist any more")
                arguments = codec.decode(body, buffers) if message.arguments else ()
                if message.op == "put" and message.arguments == 1:
                    arguments = (arguments,)
                value = run_here(self._node, channel, message.op, tuple(arguments), message.timeout)
                if message.op in ("put", "wait", "close"):
                    value = None
        except (ChannelClosedError, TimeoutError, TypeError) as error:
            if "by_callbacks" in vars(type(channel)):
                self._plain_error(pid, message.request, error)
            else:
                self._answers.reply_error(pid, message.request, error)
        except BaseException as error:
            self._answers.reply_error(pid, message.request, error)
        else:
            self._answers.reply_value(pid, message.request, value)


def install(node: Node) -> None:
    """Register the channel kinds with `node`."""
    _Requests(node, serving(node))
