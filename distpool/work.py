"""What waits to run: single calls, and maps whose elements are cut into spans when a worker has room (layer 7).

    submit  ->  Call     one record, one future
    map     ->  MapRun   feed() adds elements; take() cuts a span or records for one frame; results come back by index

User objects are serialised in the thread that submits or feeds, never at dispatch, which runs on the leader. The only
exception are exact scalars (`SCALARS`): pickling them runs no user code, so a whole span of them goes into one pickle,
cut as long as the measured time per call allows.

Entries in flight (`Call`, `Element`, `Span`) share three methods: `elements`, `settle(index, outcome)`, `put_back`.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pickle import dumps

from distpool.errors import SerializationError
from distpool.hints import TYPE_CHECKING, Any, NamedTuple
from distpool.refs.refs import Outcome
from distpool.wire.functions import EncodedFunction
from distpool.wire.messages import CALL, ONE, SPAN

if TYPE_CHECKING:
    from distpool.node.node import Node
    from distpool.scheduling import Scheduler
    from distpool.slots import Slot
    from distpool.transport.ioloop import IoLoop

SCALARS = frozenset((int, float, str, bytes, bool, type(None)))
_SIZED = (str, bytes)
_LONG = 1024  # bytes: longer strings are serialised by who submits them
_NOT_WAITING: AbstractContextManager[object] = contextlib.nullcontext()


class Policy(NamedTuple):
    """How calls of an executor view are treated; see `ClusterExecutor.options`."""

    timeout: float | None = None
    retries: int = 0
    retry_delays: tuple[float, ...] | None = None
    retry_check: Any = None
    pids: frozenset[int] | None = None
    keep: bool = False
    label: str | None = None

    @property
    def plain(self) -> bool:
        """Whether calls need no special treatment by the scheduler."""
        return self.timeout is None and not self.retries and self.pids is None

    def may_retry(self, error: BaseException) -> bool:
        """Whether `error` may be retried (user code: not on the leader)."""
        check = self.retry_check
        if check is None:
            return issubclass(type(error), Exception)
        if isinstance(check, type | tuple):
            return issubclass(type(error), check)
        return bool(check(error))

    def delay(self, attempt: int) -> float:
        """Seconds before attempt number `attempt` (1 = first retry)."""
        delays = self.retry_delays
        return float(delays[min(attempt, len(delays)) - 1]) if delays else 0.0


#: In each pickle of a proxy of a `multiprocessing` manager.
PROXIES = b"multiprocessing.managers"


def check_references(node: Node, references: Iterable[Any]) -> None:
    """SerializationError for references that the workers of an executor which was made in a task cannot use: they are a
    group of their own, in which the processes of ours have no numbers, but this one."""
    members = node.group.members if node.group is not None else ()  # the first of them are being launched
    for loan in () if node.is_master else references:
        handle = getattr(loan, "handle", None)
        if handle is not None and handle.where != node.pid and handle.where not in members:
            raise SerializationError(
                f"a reference to process {handle.where} cannot be sent to the workers of an executor that was made in a"
                f" task of worker {node.pid}: those are a process group of their own"
            )


class Parts(list[Any]):
    """Staged buffers of a call that also carries references: they are lent to the worker when the call is sent."""

    references: tuple[Any, ...] = ()
    kept: Any = None  # what has to live until the call has ended


class _Kept:
    """Objects that live until nobody has this any more, which may be on the leader: they end on a library thread."""

    def __init__(self, node: Node, things: list[Any]) -> None:
        self._node = node
        self._things = things

    def __del__(self) -> None:
        node, things = self._node, self._things
        node.loop.call_soon(lambda: node.deliver(things.clear))


def parts_of(node: Node, buffers: list[Any], references: list[Any] | None, data: bytes, *things: Any) -> list[Any]:
    """`buffers` of a call, with the references that its record carries, and with the `things` that this is the pickle
    of, if there is a proxy of a manager among them: it forgets an object when the last proxy ends, and the worker's
    begins when it unpickles this. (Other things are not kept: the user's memory is not to be needed twice.)"""
    proxies = PROXIES in data
    if not references and not proxies:
        return buffers
    check_references(node, references or ())
    parts = Parts(buffers)
    parts.references = tuple(references or ())
    if proxies:
        parts.kept = _Kept(node, list(things))
    return parts


class Call:
    """One submitted call."""

    __slots__ = (
        "arguments", "attempt", "brisk", "buffers", "cancelled", "function", "future",
        "policy", "record", "scheduler", "sequence", "slot",
    )  # fmt: skip

    elements = 1
    done, stop = 0, 1  # an entry of one element: nothing of it is done, nothing was recalled
    early: frozenset[int] = frozenset()

    def __init__(
        self,
        scheduler: Scheduler,
        function: EncodedFunction,
        record: bytes,
        buffers: list[Any],
        future: Any,
        policy: Policy | None,
        arguments: tuple[Any, ...] | None = None,
    ) -> None:
        #: Plain arguments, still to be serialised: `record` is empty then (see `records_of`).
        self.arguments = arguments
        self.scheduler = scheduler
        self.function = function
        self.record = record
        self.buffers = buffers
        self.future = future
        self.policy = policy
        self.attempt = 0
        self.slot: Slot | None = None
        self.sequence = 0
        self.cancelled = False
        self.brisk = False  # it was sent alone: whoever waits for it may look for a moment before sleeping

    @property
    def timing(self) -> EncodedFunction:
        """Whose `mean` tells the seconds per call."""
        return self.function

    @property
    def loop(self) -> IoLoop | None:
        """The loop whose leader settles the future."""
        return self.scheduler.loop

    def cancel(self) -> bool:
        """Recall the call; True if it will not run."""
        return self.scheduler.cancel(self)

    def started(self) -> bool:
        """Whether a worker is known to have begun it (same host), or has it (other hosts)."""
        slot = self.slot
        try:
            return slot is not None and not slot.gone and slot.has_started(self.sequence)
        except ValueError:  # the journal of a worker that ended this very moment
            return False

    def is_stranded(self, slots: dict[int, Slot]) -> bool:
        """Whether it may run on certain workers only, and all of them are gone."""
        pids = None if self.policy is None else self.policy.pids
        return pids is not None and not any(pid in pids and not slot.retiring for pid, slot in slots.items())

    def waiting(self) -> AbstractContextManager[object]:
        """In the owner of the executor a waiting thread holds no slot."""
        self.scheduler.check_process()
        return _NOT_WAITING

    def settle(self, index: int, outcome: Outcome) -> Any:
        """Store the outcome; returns the future if callbacks are left to run."""
        self.release()
        future = self.future
        return future if future._settle(outcome) else None

    def release(self) -> None:
        """Let go of staged buffers: the call will not be sent again."""
        if self.buffers:
            release_all(self.buffers)
            self.buffers = []

    def put_back(self, first: int, count: int, queue: collections.deque[Any]) -> None:
        """The call has not started: it runs elsewhere."""
        self.slot = None
        if self.cancelled:
            self.release()
        else:
            queue.appendleft(self)


def is_plain(arguments: tuple[Any, ...]) -> bool:
    """Whether pickling these runs no user code and takes no time: exact scalars, and none of them long."""
    try:
        for value in arguments:  # as a loop: `map` and `issuperset` take twice as long
            kind = type(value)
            if kind not in SCALARS or (kind in _SIZED and len(value) > _LONG):
                return False
    except TypeError:  # a type without a hash (its metaclass has an __eq__): what is wrong with it, the pickler says
        return False
    return True


def all_scalars(arguments: list[Any], single: bool) -> bool:
    """Whether these elements, arguments alone (`single`) or tuples of them, are exact scalars."""
    try:
        if single:
            return SCALARS.issuperset(map(type, arguments))
        return all(SCALARS.issuperset(map(type, argument)) for argument in arguments)
    except TypeError:  # as above
        return False


def plain_record(calls: list[Call]) -> bytes:
    """One record for calls of one function with plain arguments, which have consecutive sequence numbers."""
    number = calls[0].function.number
    if len(calls) == 1:
        payload = dumps(calls[0].arguments, 5)
        return CALL.pack(number, 1, len(payload), 0, ONE) + payload
    payload = dumps([call.arguments for call in calls], 5)
    return CALL.pack(number, len(calls), len(payload), 0, SPAN) + payload


def release_all(buffers: Iterable[Any]) -> None:
    """Give staged buffers back to the pool."""
    for buffer in buffers:
        release = getattr(buffer, "release", None)
        if release is not None and not isinstance(buffer, memoryview):
            release()


__all__ = [
    "PROXIES", "SCALARS", "Call", "Parts", "Policy", "all_scalars", "check_references", "is_plain", "parts_of",
    "plain_record", "release_all",
]  # fmt: skip
