"""What the workers are doing: `stats` and `dump_stacks` (layer 9).

    stats        any thread: tables of the crews (no lock: a snapshot) + psutil for processes of this host
                 workers elsewhere, and all once there may have been remote calls: USAGE -> their I/O thread -> USAGE_IS
    dump_stacks  STACKS -> I/O thread of each worker -> STACKS_ARE, until all have answered, are gone, or time is up

Answers are collected on the leader (`Monitor`, one per node). psutil is imported on first use: `import distpool` must
stay cheap.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from distpool.config import LONGEST, as_int
from distpool.errors import ProcessExitedException
from distpool.node import group as groups
from distpool.node import node as nodes
from distpool.node import observe
from distpool.node.group import Member, State
from distpool.node.node import Node
from distpool.wire import messages
from distpool.wire.frames import Frame, Kind

if TYPE_CHECKING:
    from distpool.crew import Crew
    from distpool.slots import Slot
    from distpool.transport.link import Link

_USAGE_PATIENCE = 1.0  # seconds for workers to say what they use, and run
_SHORTEST = 0.05  # seconds over which a CPU percentage means anything: the kernel counts in steps of 10 ms


def stats() -> list[dict[str, Any]]:
    """One dict per living worker of this program, sorted by pid; `[]` if there are none.

    `pid`, `host`, `ospid`; `cpu` (percent of one CPU since the last call, at first since the worker's start),
    `memory` (bytes resident), both `None` if the process cannot be looked at; `done`, `failed` (calls that returned,
    and that raised); `bytes_in`, `bytes_out` (over its connection with this process; shared memory is not counted);
    `running` (label or function name of the call it runs, or `None`); `since` (seconds, or `None`); `queued` (calls
    sent ahead).

    Counted are calls of executors and pools (each element of a map; a chunk of `map(chunksize=)` and of `distributed`
    is one call), and remote calls, whoever makes them: this process, another worker, or itself (but
    `remotecall_fetch` to oneself is a plain call). Of several remote calls at a time, `running` is the oldest, and an
    executor's call comes first. `since` of an executor's call counts from when it was sent to the idle worker, or from
    when the result before it arrived: right to some milliseconds without any cost per call.

    Workers are asked for their remote calls, and those of other hosts for `cpu` and `memory`. Who does not answer
    within a second (it is stopped, or in C code that holds the interpreter lock) is taken to be as it was when it last
    did. RuntimeError on a worker.

    Example: `for row in distpool.stats(): print(row["pid"], row["cpu"], row["running"])`
    """
    node = _master_node("stats")
    if node is None or node.group is None:
        return []
    slots = {pid: slot for crew in list(node.crews) for pid, slot in list(crew._slots.items())}
    return _rows(node, [(member, slots.get(member.pid, member.slot)) for member in _living(node)])


def crew_stats(crew: Crew) -> list[dict[str, Any]]:
    """The rows of `stats` for one executor's workers."""
    crew.scheduler.check_process()
    members = [member for _, member in sorted(crew.members.copy().items()) if _is_up(member)]
    return _rows(crew.node, [(member, crew._slots.get(member.pid)) for member in members])


def dump_stacks(pids: int | Iterable[int] | None = None, *, timeout: float = 5.0) -> dict[int, str]:
    """Where all threads of these workers are (default: of all workers): `{pid: text}`; pid 1 is this process.

    Works while a worker runs Python code. One that is stopped, or in C code that holds the interpreter lock, cannot
    answer: after `timeout` seconds its entry says so. ValueError for a pid that never existed,
    `ProcessExitedException` for a worker that is gone, RuntimeError on a worker.

    Example: `print(distpool.dump_stacks(2)[2])`
    """
    timeout = as_int(timeout)
    if isinstance(timeout, bool) or not isinstance(timeout, int | float):
        raise TypeError(f"timeout must be a number of seconds, not {type(timeout).__name__}")
    if not timeout > 0:  # NaN too
        raise ValueError("timeout must be greater than 0")
    node = _master_node("dump_stacks")
    if pids is None:
        members, own = _living(node) if node is not None else [], False
    else:
        pids = as_int(pids)
        if isinstance(pids, str | bytes | bytearray | memoryview):
            raise TypeError(f"pids must be an int or several, not {type(pids).__name__}")
        wanted = {_check_pid(pid) for pid in ([pids] if isinstance(pids, int) else map(as_int, pids))}
        members, own = [_member(node, pid) for pid in sorted(wanted) if pid != 1], 1 in wanted
    texts = {1: observe.stacks()} if own else {}
    if not members:
        return texts
    assert node is not None
    answers = of(node).ask(members, Kind.STACKS, lambda number, member: messages.Stacks(number), timeout)
    for member in members:
        frame = answers.get(member.pid)
        if frame is not None:
            texts[member.pid] = bytes(frame.body).decode()
        elif _is_up(member):
            texts[member.pid] = (
                f"worker {member.pid} did not answer within {timeout:g} seconds: it is stopped, "
                "or in C code that holds the interpreter lock\n"
            )
        else:
            texts[member.pid] = f"worker {member.pid} ended before it could answer\n"
    return texts


# -- rows --------------------------------------------------------------------------------------------------------


def _master_node(what: str) -> Node | None:
    node = nodes.existing()
    if node is not None and not node.is_master:
        raise RuntimeError(f"{what}() works on process 1: a worker does not know the others")
    return node


def _is_up(member: Member) -> bool:
    return member.state in (State.READY, State.LEAVING)


def _living(node: Node) -> list[Member]:
    members: dict[int, Member] = groups.of(node).members.copy()
    return [member for _, member in sorted(members.items()) if _is_up(member)]


def _check_pid(pid: Any) -> int:
    if isinstance(pid, bool) or not isinstance(pid, int):
        raise TypeError(f"a pid must be an int, not {type(pid).__name__}")
    return pid


def _member(node: Node | None, pid: int) -> Member:
    group = groups.of(node) if node is not None else None
    if group is None or not group.first_pid <= pid <= group.last_pid:
        raise ValueError(f"no process with id {pid} exists")
    member = group.members.get(pid)
    if member is None or not _is_up(member):
        raise ProcessExitedException(pid)
    return member


def _rows(node: Node, pairs: list[tuple[Member, Slot | None]]) -> list[dict[str, Any]]:
    used = _usage(node, [member for member, _ in pairs])
    return [_row(member, slot, used.get(member.pid)) for member, slot in pairs]


class _Served(NamedTuple):
    """What a worker has told of the remote calls that it runs (kept in `member.served`)."""

    done: int = 0
    failed: int = 0
    running: str | None = None
    begin: float = 0.0  # monotonic seconds of this process: since when that runs


def _row(member: Member, slot: Slot | None, used: tuple[float, float, int] | None) -> dict[str, Any]:
    served: _Served = member.served or _Served()
    running, since = _running(slot) if slot is not None else (None, None)
    link = member.link
    load = max(0, slot.load) if slot is not None else 0
    queued = max(0, load - (running is not None))
    if running is None and served.running is not None:
        running, since = served.running, max(0.0, time.monotonic() - served.begin)
    return {
        "pid": member.pid,
        "host": member.host,
        "ospid": member.ospid,
        "cpu": _percent(member, used[0], used[1]) if used is not None else None,
        "memory": used[2] if used is not None else None,
        "done": served.done + (slot.done if slot is not None else 0),
        "failed": served.failed + (slot.failed if slot is not None else 0),
        "bytes_in": link.bytes_in if link is not None else 0,
        "bytes_out": link.bytes_out if link is not None else 0,
        "running": running,
        "since": since,
        "queued": queued,
    }


def _running(slot: Slot) -> tuple[str | None, float | None]:
    """What the worker runs and for how long.

    With a shared journal: the call that was started last, if it is unanswered, else the latest unanswered one before
    it (that one waits for other calls). Without: the first unanswered one, as results are sent one by one there.
    """
    found = None
    try:
        for sequence, entry in list(slot.inflight.items()):
            if not slot.has_started(sequence):
                break
            found = entry
            if not slot.has_surely_started(sequence):
                break
    except ValueError:  # the journal of a worker that ended this very moment
        return None, None
    if found is None:
        return None, None
    policy = found.policy
    name = policy.label if policy is not None and policy.label else found.function.name
    return name, max(0.0, time.monotonic() - slot.since)


def _usage(node: Node, members: list[Member]) -> dict[int, tuple[float, float, int]]:
    """pid -> age, seconds of CPU, resident bytes. Processes of this host are looked at, others are asked.

    What they are asked for besides, the remote calls that they have run, is kept in `member.served`. Those of this host
    are not asked while there cannot have been any, so that one that does not answer holds nobody up.
    """
    import psutil

    used: dict[int, tuple[float, float, int]] = {}
    elsewhere = set()
    for member in members:
        if member.link is None or not member.link.shares_memory:
            elsewhere.add(member.pid)
            continue
        try:
            process = psutil.Process(member.ospid)
            with process.oneshot():
                times = process.cpu_times()
                age = time.time() - process.create_time()
                used[member.pid] = age, times.user + times.system, process.memory_info().rss
        except psutil.Error:
            continue  # it is ending, or we may not look
    # To find each other, workers ask this process, unless they have been connected from the beginning.
    remote = node.remote_calls_loaded or (node.group is not None and not node.group.lazy)
    asked = [member for member in members if remote or member.pid in elsewhere]
    if asked:
        answers = of(node).ask(
            asked, Kind.USAGE, lambda number, member: messages.Usage(number, member.pid in elsewhere), _USAGE_PATIENCE
        )
        for member in asked:
            frame = answers.get(member.pid)
            if frame is None:
                continue
            answer = messages.UsageIs.unpack(frame.control)
            begin = time.monotonic() - (answer.since or 0.0)
            member.served = _Served(answer.done, answer.failed, answer.running, begin)
            if member.pid in elsewhere:
                used[member.pid] = answer.age, answer.cpu_seconds, answer.memory
    return used


def _percent(member: Member, age: float, cpu_seconds: float) -> float:
    """CPU percentage since the last look (kept in `member.meter`)."""
    then_age, then_cpu, percent = member.meter or (0.0, 0.0, 0.0)
    if age - then_age >= _SHORTEST:
        percent = round(max(0.0, 100.0 * (cpu_seconds - then_cpu) / (age - then_age)), 1)
        member.meter = age, cpu_seconds, percent
    return float(percent)


# -- questions ---------------------------------------------------------------------------------------------------


class _Inquiry:
    """One question to several workers."""

    def __init__(self, pids: set[int]) -> None:
        self.waiting = pids  # changed on the leader, and before the question is sent
        self.answers: dict[int, Frame] = {}
        self.ended = threading.Event()

    def settle(self, pid: int, frame: Frame | None) -> None:
        """This worker has answered, or never will."""
        if frame is not None and pid in self.waiting:
            self.answers[pid] = frame
        self.waiting.discard(pid)
        if not self.waiting:
            self.ended.set()


class Monitor:
    """The open questions of this process to its workers."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._numbers = itertools.count(1)
        self._open: dict[int, _Inquiry] = {}  # atomic operations only
        node.handlers[Kind.STACKS_ARE] = lambda link, frame: self._on_answer(link, messages.StacksAre, frame)
        node.handlers[Kind.USAGE_IS] = lambda link, frame: self._on_answer(link, messages.UsageIs, frame)
        groups.of(node).gone_watchers.append(self._on_gone)

    def _on_answer(self, link: Link, kind: type[messages.StacksAre] | type[messages.UsageIs], frame: Frame) -> None:
        inquiry = self._open.get(kind.unpack(frame.control).request)
        if inquiry is not None:  # else: later than we cared to wait
            inquiry.settle(link.peer, frame)

    def _on_gone(self, member: Member) -> None:
        for inquiry in list(self._open.values()):
            inquiry.settle(member.pid, None)

    def ask(
        self, members: list[Member], kind: Kind, make: Callable[[int, Member], messages.Message], timeout: float
    ) -> dict[int, Frame]:
        """The answers to `make(number, member)` that come within `timeout` seconds, by pid. Not on the leader."""
        deadline = time.monotonic() + min(timeout, LONGEST)
        number = next(self._numbers)
        inquiry = self._open[number] = _Inquiry({member.pid for member in members})
        loop = self._node.loop
        try:
            questions = [(member, make(number, member).pack()) for member in members]
            loop.call_soon(lambda: self._send(inquiry, kind, questions))
            if not loop.lead(inquiry.ended.is_set, deadline):
                with loop.following():
                    inquiry.ended.wait(max(0.0, deadline - time.monotonic()))
        finally:
            self._open.pop(number, None)
        return dict(inquiry.answers)

    def _send(self, inquiry: _Inquiry, kind: Kind, questions: list[tuple[Member, bytes]]) -> None:
        """On the leader, so that nobody can go between the look at the state and the sending."""
        for member, question in questions:
            if not _is_up(member) or member.link is None or not member.link.send(kind, question):
                inquiry.settle(member.pid, None)


_making = threading.Lock()  # protects Node.monitor while it is made


def of(node: Node) -> Monitor:
    """The monitor of `node`, made on first use."""
    with _making:
        if node.monitor is None:
            node.monitor = Monitor(node)
    return node.monitor  # type: ignore[no-any-return]


__all__ = ["crew_stats", "dump_stacks", "stats"]
