"""Executors inside tasks: a handle that submits to the same workers (layer 10).

    worker: handle.submit -> SUBMIT --> owner: Call in the executor's queue -> some worker -> OUTCOME --> Future

An executor that travels in a message becomes an `ExecutorHandle`; one that comes home becomes the executor itself.
Values and exceptions pass through the owner without being decoded, unless they carry references: those are lent to
whom a message goes to, so they have to be received and lent again. A task that waits for such a future gives its slot
away (`TaskRunner.slot_given_away`), so recursion finishes on any number of workers: in `result` and its like, in
`concurrent.futures.wait` and `as_completed`, in `await`. A task that sleeps on an event of its own until a callback
sets it cannot be told from one that is busy, and keeps its slot.

On the worker, frames are handled by the leader and callbacks run on library threads. On the owner, SUBMIT is handled
by the leader (it decodes nothing); errors made there are serialised on a library thread.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from distpool.errors import SerializationError
from distpool.mapping import pmap
from distpool.mapresults import check_map, map_by_futures, unordered_futures
from distpool.mapruns import LOOK_AHEAD
from distpool.node import node as nodes
from distpool.node.node import Node
from distpool.policy import make_policy
from distpool.refs.ahead import settle_puts
from distpool.refs.lent import carries_references, decode_lent, give_back, received
from distpool.refs.refs import CANCELLED_AND_NOTIFIED, LOCAL_VALUE, RAISED_HERE, Future, Outcome
from distpool.wire import codec, messages
from distpool.wire.failures import encode_exception, pass_on
from distpool.wire.frames import Frame, Kind
from distpool.wire.functions import decode_function
from distpool.work import Call, Policy

if TYPE_CHECKING:
    from distpool.slots import Slot
    from distpool.transport.ioloop import IoLoop
    from distpool.transport.link import Link

_CANCEL_PATIENCE = 5.0  # seconds to wait for the owner's answer
_making = threading.RLock()  # protects Node.exports and Node.requests while they are made


# -- the owner's side --------------------------------------------------------------------------------------------


class _Forward(Future[Any]):
    """The owner's future of a forwarded call: when it settles, the outcome goes to the worker as it is."""

    _watched = True  # it has a `_settle` of its own
    passes_on = True  # nobody opens it here

    def __init__(self, slot: Slot, request: int) -> None:
        self._slot = slot
        self._request = request

    def _settle(self, raw: Outcome) -> bool:
        super()._settle(raw)
        if raw.status == RAISED_HERE:
            nodes.current().deliver(lambda: self._send_error(raw.data))
        elif raw.status == LOCAL_VALUE:  # a scalar, which came with others
            self._send(messages.VALUE, *codec.encode(raw.data))
        elif not carries_references(raw.data):
            self._send(raw.status, raw.data, raw.buffers)
        elif raw.status == messages.VALUE:
            nodes.current().deliver(self._send_again)
        else:
            nodes.current().deliver(lambda: self._send_failure(raw))
        return False

    def _finish(self, state: str, raw: Outcome | None = None, result: Any = None, error: Any = None) -> bool:
        ended = super()._finish(state, raw, result, error)
        if ended and state is CANCELLED_AND_NOTIFIED:  # the owner's shutdown may have done it: the task waits for news
            link = self._slot.member.link
            if link is not None:
                link.send(Kind.CANCELLED, messages.Cancelled(self._request, True).pack())
        return ended

    # -- with references, on a library thread: received here, and lent again -----------------------------------

    def _send_error(self, error: BaseException) -> None:
        seen: list[Any] = []
        data = encode_exception(error, self._slot.pid, seen=seen)
        self._lend(seen)
        self._send(messages.ERROR, data, ())

    def _send_failure(self, raw: Outcome) -> None:
        seen: list[Any] = []
        data = pass_on(raw.failure, self._slot.pid, seen)
        self._lend(seen)
        self._send(raw.status, data, ())

    def _send_again(self) -> None:
        seen: list[Any] = []
        try:
            data, buffers = codec.encode(self.result(0), self._slot.pid, seen)
        except BaseException as error:
            self._send_error(error)
            return
        self._lend(seen)
        self._send(messages.VALUE, data, [bytes(part) for part in buffers])

    def _lend(self, seen: list[Any]) -> None:
        if seen:
            nodes.current().references().lend(seen, self._slot.pid)

    def _send(self, status: int, data: Any, buffers: Any) -> None:
        member = self._slot.member
        if member.link is not None and member.segments is not None:
            staged = [member.segments.stage(buffer) for buffer in buffers]
            member.link.send(Kind.OUTCOME, messages.Outcome(self._request, status).pack(), data, staged)


def _export(executor: Any, key: str) -> None:
    """Make `executor` known under `key` to handles in its workers."""
    node = executor._crew.node
    _exports(node)[key] = executor
    # Of the node, not of the executor's scheduler: who asks may be a worker that was given back, or a remote call.
    node.handlers[Kind.SUBMIT] = lambda link, frame: _on_submit(node, _slot_of(node, link.peer), frame)
    node.handlers[Kind.CANCEL] = lambda link, frame: _on_cancel(_slot_of(node, link.peer), frame)


def _slot_of(node: Node, pid: int) -> Slot:
    member = node.group.members[pid]  # its link is open
    found: Slot | None = None if member.borrower is None else member.borrower._slots.get(pid)
    if found is None:
        from distpool.slots import Slot  # here: workers, which load this module too, do without

        found = member.slot = member.slot or Slot(member)
    return found


def _exports(node: Node) -> weakref.WeakValueDictionary[str, Any]:
    with _making:
        if node.exports is None:
            node.exports = weakref.WeakValueDictionary()
    exports: weakref.WeakValueDictionary[str, Any] = node.exports
    return exports


def _on_submit(node: Node, slot: Slot, frame: Frame) -> None:
    message = messages.Submit.unpack(frame.control)
    future = _Forward(slot, message.request)
    executor = _exports(node).get(message.executor)
    problem = _why_not(executor)
    if problem or executor is None:
        future._settle(Outcome(RAISED_HERE, RuntimeError(problem), (), 1))
        return
    scheduler = executor._crew.scheduler
    body = bytes(frame.body)
    if carries_references(body):
        buffers = slot.open(frame.buffers)
        node.deliver(lambda: _submit_again(executor, slot, message, body, buffers, future))
        return
    data = body[: message.function_bytes]
    buffers = slot.open(frame.buffers)
    split = message.function_buffers
    function = node.encoder.adopt(data, buffers[:split], message.name, message.reusable)
    arguments = body[message.function_bytes :]
    staged = scheduler.stage(buffers[split:]) if len(buffers) > split else []
    flags = messages.ONE if function.reusable else messages.ONE_FRESH
    record = messages.CALL.pack(function.number, 1, len(arguments), len(staged), flags) + arguments
    call = Call(scheduler, function, record, staged, future, _policy_of(executor, message.options))
    future._call = call
    slot.forwarded[message.request] = future
    scheduler.enqueue(call)


def _submit_again(
    executor: Any, slot: Slot, message: messages.Submit, body: bytes, buffers: list[Any], forward: _Forward
) -> None:
    """On a library thread: a call with references, as one of this process."""
    split = message.function_buffers
    try:
        arguments = body[message.function_bytes :]
        try:
            function = decode_lent(decode_function, body[: message.function_bytes], buffers[:split])
        except BaseException:
            give_back(arguments, buffers[split:])
            raise
        args, kwargs = decode_lent(codec.decode_args, arguments, buffers[split:])
        view = executor if message.options is None else executor._view(_policy_of(executor, message.options))
        inner: Future[Any] = view.submit(function, *args, **kwargs)
    except BaseException as error:
        forward._settle(Outcome(RAISED_HERE, error, (), 1))
        return
    slot.forwarded[message.request] = inner
    inner.add_done_callback(lambda done: forward.cancel() if done.cancelled() else forward._settle(done.outcome()))


def _policy_of(executor: Any, options: dict[str, Any] | None) -> Policy | None:
    """The executor's own, with what a handle has changed."""
    own: Policy | None = executor._policy
    if options is None:
        return own
    base, changes = own or Policy(), dict(options)
    if changes.get("retry_delays") is not None:
        changes["retry_delays"] = tuple(changes["retry_delays"])
        if changes.get("retries", 0) is None:
            changes["retries"] = base.retries or len(changes["retry_delays"])
    if changes.get("pids") is not None:
        changes["pids"] = frozenset(changes["pids"])
    policy = base._replace(**changes)
    return None if policy == Policy() else policy


def _why_not(executor: Any) -> str:
    if executor is None:
        return "the executor of this handle does not exist any more"
    if executor._crew.finished.is_set() or executor._crew.broken is not None:
        return "cannot schedule new futures after shutdown"
    return ""


def _on_cancel(slot: Slot, frame: Frame) -> None:
    message = messages.Cancel.unpack(frame.control)
    future = slot.forwarded.get(message.request)

    def work() -> None:
        done = future is not None and future.cancel()
        if slot.member.link is not None:
            slot.member.link.send(Kind.CANCELLED, messages.Cancelled(message.request, done).pack())

    nodes.current().deliver(work)  # it may wait for another worker's answer


# -- the worker's side -------------------------------------------------------------------------------------------


class _Requests:
    """Calls that this worker has submitted through handles. Dict operations are atomic; settling is the leader's."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.futures: dict[int, Future[Any]] = {}
        self.cancels: dict[int, tuple[threading.Event, list[bool]]] = {}
        self.numbers = itertools.count(1)
        node.handlers[Kind.OUTCOME] = self._on_outcome
        node.handlers[Kind.CANCELLED] = self._on_cancelled

    def _on_outcome(self, link: Link, frame: Frame) -> None:
        message = messages.Outcome.unpack(frame.control)
        future = self.futures.pop(message.request, None)
        segments = self.node.runner.segments
        buffers = [segments.open(buffer) for buffer in frame.buffers]
        if future is None:
            received(message.status, bytes(frame.body), buffers, 1)  # and not opened
            return
        if future._settle(received(message.status, bytes(frame.body), buffers, 1)):
            self.node.deliver(future._run_callbacks)

    def _on_cancelled(self, link: Link, frame: Frame) -> None:
        message = messages.Cancelled.unpack(frame.control)
        waiting = self.cancels.pop(message.request, None)
        if waiting is not None:
            waiting[1].append(message.done)
            waiting[0].set()
            return  # who has asked ends the future
        future = self.futures.pop(message.request, None) if message.done else None
        if future is not None and future._finish(CANCELLED_AND_NOTIFIED) and future.__dict__.get("_done_callbacks"):
            self.node.deliver(future._run_callbacks)


class _Request:
    """The call behind a future of a handle."""

    brisk = False  # others may run what it waits for on this very processor

    def __init__(self, requests: _Requests, number: int) -> None:
        self._requests = requests
        self._number = number

    @property
    def loop(self) -> IoLoop:
        """The loop whose leader settles the future."""
        return self._requests.node.loop

    def started(self) -> bool:
        """It has left this process."""
        return True

    def waiting(self) -> AbstractContextManager[object]:
        """A task that waits gives its slot away."""
        return self._requests.node.given_away()

    def cancel(self) -> bool:
        """Ask the owner. Several threads may do so at once: the first answer is for all of them."""
        node = self._requests.node
        event, answer = self._requests.cancels.setdefault(self._number, (threading.Event(), []))
        settle_puts(1)
        node.master_link.send(Kind.CANCEL, messages.Cancel(self._number).pack())  # type: ignore[union-attr]
        deadline = time.monotonic() + _CANCEL_PATIENCE
        with self.waiting():
            if not node.loop.lead(event.is_set, deadline):
                with node.loop.following():
                    event.wait(max(0.0, deadline - time.monotonic()))
        done = bool(answer and answer[0])
        if done:
            self._requests.futures.pop(self._number, None)
        return done


class ExecutorHandle(concurrent.futures.Executor):
    """An executor as a task sees it: submits to the same workers, through their owner.

    It has `submit`, `map`, `imap_unordered`, `pmap` and `options`; `shutdown` does nothing, the executor belongs to its
    owner.

    Example: `def fib(ex, n): return n if n < 2 else ex.submit(fib, ex, n - 1).result() + fib(ex, n - 2)`
    """

    def __init__(self, key: str, size: int, options: dict[str, Any] | None) -> None:
        node = nodes.current()
        with _making:  # calls of two tables would have the same numbers, and one of them no answers
            if node.requests is None:
                node.requests = _Requests(node)
        self._node = node
        self._key = key
        self._max_workers = size
        self._options = options

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run `fn(*args, **kwargs)` on a worker of the executor; see `ClusterExecutor.submit`."""
        node = self._node
        future: Future[Any] = Future()
        try:
            function = node.encoder.encode(fn, 1)
            seen: list[Any] = []
            data, buffers = codec.encode_args(args, kwargs, 1, seen)
        except SerializationError as error:
            future._settle(Outcome(RAISED_HERE, error, (), node.pid))
            return future
        if seen or function.references:
            node.references().lend((*function.references, *seen), 1)
        requests: _Requests = node.requests
        number = next(requests.numbers)
        future._call = _Request(requests, number)
        requests.futures[number] = future
        segments = node.runner.segments
        staged = [segments.stage(buffer) for buffer in (*function.buffers, *buffers)]
        # Buffers that could not be staged are sent from the caller's memory: copied, because that may change.
        parts = [bytes(part) if isinstance(part, memoryview) else part for part in staged]
        message = messages.Submit(
            number,
            self._key,
            function.name,
            len(function.data),
            len(function.buffers),
            function.reusable,
            self._options,
        )
        assert node.master_link is not None
        settle_puts(1)
        node.master_link.send(Kind.SUBMIT, message.pack(), function.data + data, parts)
        return future

    def map(
        self,
        fn: Callable[..., Any],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[Any]:
        """As `ClusterExecutor.map`."""
        deadline = check_map(timeout, chunksize, buffersize)
        return map_by_futures(self.submit, fn, iterables, deadline, chunksize, buffersize)

    def imap_unordered(
        self,
        fn: Callable[..., Any],
        *iterables: Iterable[Any],
        buffersize: int | None = None,
        timeout: float | None = None,
    ) -> Iterator[Any]:
        """As `ClusterExecutor.imap_unordered`."""
        deadline = check_map(timeout, 1, buffersize)
        ahead = buffersize or LOOK_AHEAD * self._max_workers
        arguments = zip(*iterables, strict=False)
        return unordered_futures(self.submit, fn, arguments, ahead, deadline, self._node.given_away)

    def pmap(self, f: Callable[..., Any], *iterables: Iterable[Any], **options: Any) -> list[Any]:
        """As `ClusterExecutor.pmap`; each element travels alone."""
        return pmap(f, *iterables, pool=self, **options)

    def options(
        self,
        *,
        timeout: float | None = None,
        retries: int | None = None,
        retry_delays: Iterable[float] | None = None,
        retry_check: Any = None,
        pids: Iterable[int] | int | None = None,
        keep: bool | None = None,
        label: str | None = None,
    ) -> ExecutorHandle:
        """A handle with another policy; see `ClusterExecutor.options`. ValueError for `retry_check`, which is code."""
        options = {
            "timeout": timeout, "retries": retries, "retry_delays": retry_delays, "retry_check": retry_check,
            "pids": pids, "keep": keep, "label": label,
        }  # fmt: skip
        given = {name: value for name, value in (self._options or {}).items() if (name, value) != ("retries", None)}
        given.update({name: value for name, value in options.items() if value is not None})
        policy = make_policy(None, **given) or Policy()  # checks them
        fields = _fields(policy, given)
        if policy.retry_delays is not None:
            fields.setdefault("retries", None)  # the executor's own, or as many as there are delays
        return ExecutorHandle(self._key, self._max_workers, fields)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Nothing: the executor belongs to the process that made it."""


def policy_fields(policy: Policy | None, base: Policy | None) -> dict[str, Any]:
    """What `policy` has otherwise than `base`, as it travels (JSON)."""
    new, old = policy or Policy(), base or Policy()
    return _fields(new, [name for name in Policy._fields if getattr(new, name) != getattr(old, name)])


def _fields(policy: Policy, names: Iterable[str]) -> dict[str, Any]:
    """`retry_check` is code, which the owner would have to decode: refused."""
    fields = {name: getattr(policy, name) for name in names}
    if fields.get("retry_check") is not None:
        raise ValueError("retry_check cannot be used through a handle: give it to the executor")
    if fields.get("pids") is not None:
        fields["pids"] = sorted(fields["pids"])
    return fields


# -- travelling --------------------------------------------------------------------------------------------------


def arrive(key: str, size: int, options: dict[str, Any] | None) -> Any:
    """What an executor becomes where it arrives: itself at home, a handle elsewhere."""
    node = nodes.current()
    home = _exports(node).get(key)
    if home is None:
        return ExecutorHandle(key, size, options)
    return home if options is None else home._view(_policy_of(home, options))


def reduce_executor(executor: Any, peer: Any) -> tuple[Any, ...]:
    """For `codec.register_reducer`: a `ClusterExecutor` on its way to another process."""
    if executor._key is None:
        key = os.urandom(8).hex()
        _export(executor, key)  # first: who sees the key may send it
        executor._key = key
    return arrive, (executor._key, executor._max_workers, None)


def reduce_view(view: Any, peer: Any) -> tuple[Any, ...]:
    """For `codec.register_reducer`: an `ExecutorView` on its way to another process."""
    _, (key, size, _) = reduce_executor(view._executor, peer)
    return arrive, (key, size, policy_fields(view._policy, view._executor._policy))


def _reduce_handle(handle: ExecutorHandle, peer: Any) -> tuple[Any, ...]:
    return arrive, (handle._key, handle._max_workers, handle._options)


codec.register_reducer(ExecutorHandle, _reduce_handle)

__all__ = ["ExecutorHandle", "arrive", "reduce_executor", "reduce_view"]
