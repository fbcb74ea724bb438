"""Workers that a test plays itself, for the scheduler: what they were sent, and answers at will."""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from distpool.errors import ProcessExitedException
from distpool.mapruns import MapRun
from distpool.node import node as nodes
from distpool.node.requests import Requests
from distpool.node.threads import ThreadCache
from distpool.refs.refs import Future
from distpool.scheduling import Scheduler
from distpool.slots import Slot
from distpool.wire import codec, messages
from distpool.wire.failures import encode_exception
from distpool.wire.frames import Frame, Kind
from distpool.work import Call, Policy

PATIENCE = 30.0


_numbers = itertools.count(1)


def fresh() -> Callable[[Any], Any]:
    """A function that nobody has measured yet: what it captures makes it another one than all before."""
    number = next(_numbers)
    return lambda value: value if number else None


#: Seconds per call that functions are known to take, unless a test says otherwise: two calls per worker. (Of a
#: function that is not known, a worker gets one call.)
KNOWN = 0.003


def nobody_takes(feed: Any) -> bool:
    """Whether nobody takes from the input of an `imap`; of containers only the calling thread does in these tests."""
    lock = feed._taking
    return not (lock._is_owned() if hasattr(lock, "_is_owned") else lock.locked())


class ManualLoop:
    """Runs what is due when the test says so."""

    def __init__(self) -> None:
        self.soon: list[Callable[[], object]] = []
        self.later: list[Any] = []
        self.leads = False
        self.can_lead = True
        self.followed = threading.Event()
        self.held: list[Callable[[], bool]] = []

    guard: Any = None

    def check_wait(self) -> None:
        pass

    def enter_critical(self) -> bool:
        return False

    def call_soon(self, callback: Callable[[], object]) -> None:
        self.soon.append(callback)

    def call_later(self, seconds: float, callback: Callable[[], object]) -> Any:
        timer = SimpleNamespace(seconds=seconds, callback=callback, cancel=lambda: setattr(timer, "callback", int))
        self.later.append(timer)
        return timer

    def run(self) -> None:
        while self.soon:
            self.soon.pop(0)()

    def ring(self, seconds: float) -> None:
        """All timers of that length are due."""
        due = [timer for timer in self.later if timer.seconds == seconds]
        self.later = [timer for timer in self.later if timer.seconds != seconds]
        for timer in due:
            timer.callback()
        self.run()

    def lead(self, until: Callable[[], bool], deadline: float | None = None, brisk: bool = False) -> bool:
        if self.can_lead:
            self.run()
        return self.can_lead and (until() or deadline is not None)

    def wake(self) -> None:
        pass

    hurry = wake

    @contextlib.contextmanager
    def following(self, wake: Callable[[], object] = lambda: None) -> Iterator[None]:
        self.wake = wake
        self.followed.set()
        yield


class Struck(dict[int, Any]):
    """Results of a map; Ctrl-C comes right behind the first that is taken out."""

    strikes = 1

    def pop(self, *key: Any) -> Any:
        found = super().pop(*key)
        self.strikes -= 1
        if self.strikes == 0:
            raise KeyboardInterrupt
        return found


class StruckQueue(collections.deque[int]):
    """The same for the indices of those that are ready."""

    strikes = 1

    def popleft(self) -> int:
        found = super().popleft()
        self.strikes -= 1
        if self.strikes == 0:
            raise KeyboardInterrupt
        return found


class FakeJournal:
    """The shared memory of a worker, as the master reads it."""

    def __init__(self) -> None:
        self.started = 0
        self.data = b""
        self.revoked: list[tuple[int, int]] = []

    def read_from(self, offset: int) -> bytes:
        return self.data[offset:]

    snapshot = read_from

    def revoke(self, first: int, last: int) -> None:
        self.revoked.append((first, last))


class FakeLink:
    """Keeps what is sent through it."""

    shares_memory = False
    closed = False

    def __init__(self, worker: FakeWorker) -> None:
        self._worker = worker

    def send(self, kind: Kind, control: bytes = b"", body: Any = b"", buffers: Any = (), roomy: bool = False) -> bool:
        self._worker.received(kind, control, body, list(buffers))
        return True


class FakeWorker:
    """A member whose process is the test. Sent elements wait in `inbox` as (sequence number, argument)."""

    segments = None
    tracer = None

    def __init__(self, pid: int, journal: bool = True) -> None:
        self.pid = pid
        self.link = FakeLink(self)
        self.journal: Any = FakeJournal() if journal else None
        self.killed: list[str] = []
        self.kinds: list[Kind] = []
        self.frames: list[list[int]] = []  # elements of each CALLS frame
        self.inbox: list[tuple[int, Any]] = []
        self.recalls: list[messages.Recall] = []
        self.functions: set[int] = set()
        self.entries: dict[int, int] = {}  # sequence number -> first one of its record
        self.arrived = threading.Condition()

    def kill(self, reason: str = "") -> None:
        with self.arrived:
            self.killed.append(reason)
            self.arrived.notify_all()

    def received(self, kind: Kind, control: bytes, body: bytes, buffers: list[Any]) -> None:
        with self.arrived:
            self.kinds.append(kind)
            if kind == Kind.FUNCTION:
                self.functions.add(messages.Function.unpack(control).number)
            elif kind == Kind.FORGET:
                self.functions -= set(messages.Forget.unpack(control).numbers)
            elif kind == Kind.RECALL:
                self.recalls.append(messages.Recall.unpack(control))
            elif kind == Kind.CALLS:
                self._take_calls(control, body)
            self.arrived.notify_all()

    def _take_calls(self, control: bytes, body: bytes) -> None:
        first, count = messages.CALLS.unpack(control)
        sizes = []
        for sequence, number, elements, flags, payload, _ in messages.call_records(body, first, count):
            assert number in self.functions, "the function was not sent before the call"
            sizes.append(elements)
            self.entries.update({sequence + offset: sequence for offset in range(elements)})
            if flags in (messages.SPAN, messages.SPAN_OF_SCALARS):
                items = codec.decode(payload)
                assert len(items) == elements
                if flags == messages.SPAN:  # calls that travel together; maps of one iterable send bare arguments
                    items = [args[0] for args in items]
                self.inbox.extend((sequence + offset, item) for offset, item in enumerate(items))
            elif flags in (messages.CHUNK, messages.CHUNK_OF_SCALARS):
                chunk = codec.decode(payload)
                self.inbox.append((sequence, list(range(*chunk)) if type(chunk) is tuple else chunk))
            else:
                args, _kwargs = codec.decode_args(payload, [])
                self.inbox.append((sequence, args[0] if args else None))
        self.frames.append(sizes)

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> None:
        with self.arrived:
            assert self.arrived.wait_for(condition, seconds), f"worker {self.pid}: {what}, after {seconds} s"

    def start(self) -> tuple[int, Any]:
        """Take the next element and note that it runs."""
        with self.arrived:
            sequence, item = self.inbox.pop(0)
        if self.journal is not None:
            self.journal.started = sequence
        return sequence, item

    def try_start(self) -> tuple[int, Any] | None:
        """As `start`, the way a real worker does it: not what the master has revoked in the journal."""
        with self.arrived:
            if not self.inbox:
                return None
            sequence = self.inbox[0][0]
            if self.journal is not None:
                self.journal.started = sequence
                if self.is_revoked(sequence):
                    return None
            return self.inbox.pop(0)

    def is_revoked(self, sequence: int) -> bool:
        return any(first <= sequence <= last for first, last in self.journal.revoked)


def result(sequence: int, value: Any) -> bytes:
    if isinstance(value, BaseException):
        payload, status = encode_exception(value), messages.ERROR
    else:
        payload, status = codec.encode(value)[0], messages.VALUE
    return messages.RESULT.pack(sequence, 1, len(payload), 0, status) + payload


def together(pairs: list[tuple[int, Any]]) -> bytes:
    """The same for values that are scalars, those of consecutive calls as one list, as a worker sends them."""
    runs: list[list[tuple[int, Any]]] = []
    for pair in pairs:
        if runs and runs[-1][-1][0] + 1 == pair[0]:
            runs[-1].append(pair)
        else:
            runs.append([pair])
    records = []
    for run in runs:
        payload = codec.encode([value for _, value in run])[0]
        records.append(messages.RESULT.pack(run[0][0], len(run), len(payload), 0, messages.VALUES) + payload)
    return b"".join(records)


class Office:
    """A scheduler with fake workers, and the leader's side of their frames."""

    def __init__(self) -> None:
        self.node = nodes.current()
        self.scheduler = Scheduler(self.node)
        self.retired: list[Slot] = []
        self.scheduler.on_retire = self.retired.append
        self.slots: dict[int, Slot] = {}
        self.default = fresh()
        self.plain = False  # calls without a policy are made as `submit` makes them of plain arguments

    def on_leader(self, function: Callable[[], Any]) -> Any:
        """Run it where handlers run, and wait for it."""
        done = threading.Event()
        box: list[Any] = []

        def run() -> None:
            try:
                box.append(function())
            except BaseException as error:
                box.append(error)
            done.set()

        self.node.loop.call_soon(run)
        with self.node.loop.following():
            assert done.wait(PATIENCE), "nobody leads"
        if isinstance(box[0], BaseException):
            raise box[0]
        return box[0]

    def worker(self, pid: int, journal: bool = True, max_tasks: int | None = None) -> FakeWorker:
        made = FakeWorker(pid, journal)
        slot = self.slots[pid] = Slot(made, max_tasks)  # type: ignore[arg-type]
        self.on_leader(lambda: self.scheduler.add(slot))
        return made

    def submit(
        self, argument: Any, function: Callable[..., Any] | None = None, policy: Policy | None = None
    ) -> Future[Any]:
        encoded = self.node.encoder.encode(function or self.default)
        if encoded.mean < 0:
            encoded.mean = KNOWN
        future: Future[Any] = Future()
        if self.plain and policy is None:
            future._call = call = Call(self.scheduler, encoded, b"", [], future, None, (argument,))
            self.scheduler.enqueue(call)
            return future
        data, buffers = codec.encode_args((argument,), {})
        assert not buffers
        record = messages.CALL.pack(encoded.number, 1, len(data), 0, messages.ONE) + data
        future._call = call = Call(self.scheduler, encoded, record, [], future, policy)
        self.scheduler.enqueue(call)
        return future

    def run(
        self, items: list[Any], function: Callable[..., Any], ordered: bool = True, chunked: bool = False
    ) -> MapRun:
        encoded = self.node.encoder.encode(function)
        if encoded.mean < 0:
            encoded.mean = KNOWN
        made = MapRun(self.scheduler, encoded, single=True, ordered=ordered, chunked=chunked)
        made.feed(items)
        return made

    def frame(self, worker: FakeWorker, kind: Kind, control: bytes, body: bytes = b"") -> None:
        slot = self.slots[worker.pid]
        self.on_leader(lambda: self.scheduler.on_frame(slot, Frame(kind, control, body, [])))

    def results(self, worker: FakeWorker, *pairs: tuple[int, Any], busy: float = 0.0) -> None:
        """The worker has finished these: (sequence number, value or exception)."""
        body = b"".join(result(*pair) for pair in pairs)
        if worker.journal is not None:
            worker.journal.data += body
        offset = len(worker.journal.data) if worker.journal is not None else 0
        ran = len(pairs) if busy else 0  # 0: nothing was measured
        self.frame(worker, Kind.RESULTS, messages.RESULTS.pack(offset, busy, ran), body)

    def finish(self, worker: FakeWorker, value: Any = None, busy: float = 0.0) -> Any:
        """It runs its next element to the end; the value is the argument unless one is given."""
        sequence, item = worker.start()
        self.results(worker, (sequence, item if value is None else value), busy=busy)
        return item

    def recalled(
        self, worker: FakeWorker, sequences: list[int], asked: list[int] | None = None, unasked: bool = False
    ) -> None:
        """The worker gives these back."""
        with worker.arrived:
            worker.inbox = [pair for pair in worker.inbox if pair[0] not in sequences]
        ranges: dict[int, list[int]] = {}  # one for each record, as a worker gives them
        for sequence in sorted(sequences):
            ranges.setdefault(worker.entries[sequence], [sequence, 0])[1] += 1
        control = messages.Recalled(list(ranges.values())[::-1], asked or [], unasked).pack()
        self.frame(worker, Kind.RECALLED, control)

    def lost(self, worker: FakeWorker) -> list[bool]:
        """The worker is gone; what `make_error` was asked."""
        asked: list[bool] = []

        def make_error(ran: bool) -> BaseException:
            asked.append(ran)
            return OSError(f"worker {worker.pid} is gone")

        slot = self.slots.pop(worker.pid)
        self.on_leader(lambda: self.scheduler.lost(slot, make_error))
        return asked

    def close(self) -> None:
        self.on_leader(lambda: self.scheduler.fail_all(lambda: RuntimeError("the test is over")))


class Big:
    """Something that is not a scalar."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Big) and self.value == other.value


class Process:
    """One of the processes of a `Cluster`: a node with references, whose frames the cluster carries."""

    def __init__(self, cluster: Cluster, pid: int) -> None:
        self.pid = pid
        self.ospid = os.getpid()
        self.is_master = pid == 1
        self.cluster = cluster
        self.loop = ManualLoop()
        self.threads = ThreadCache(f"process-{pid}")
        self.handlers: dict[int, Callable[[Any, Frame], None]] = {}
        self.peers = self
        self.requests = Requests()
        self.dead: dict[int, Callable[[], BaseException]] = {}
        self.on_lost: list[Callable[[int], object]] = []
        self.on_unlinked: list[Callable[[int], object]] = []
        self.refs: Any = None
        self.serving = self.ahead = self.runner = self.callee = None
        self.sent: list[tuple[int, Kind]] = []
        self.delivered: list[Callable[[], object]] = []

    def send(self, pid: int, kind: Kind, control: bytes, body: Any = b"", buffers: Any = ()) -> None:
        self.sent.append((pid, kind))
        self.cluster.wire.append((self.pid, pid, Frame(kind, control, bytes(body), list(buffers))))

    def deliver(self, function: Callable[[], object]) -> None:
        self.delivered.append(function)

    def ensure(self, pid: int) -> None:
        if pid not in self.cluster.processes:
            raise ValueError(f"no process with id {pid} exists")

    def references(self) -> Any:
        return self.refs

    def given_away(self) -> Any:
        return contextlib.nullcontext()

    def kinds(self) -> list[Kind]:
        return [kind for _, kind in self.sent]


class Cluster:
    """Processes with references inside this one; frames travel, and library threads run, when `run` is called."""

    def __init__(self, monkeypatch: Any, count: int = 2) -> None:
        from distpool.refs import gc
        from distpool.refs.serving import serving

        self.wire: collections.deque[tuple[int, int, Frame]] = collections.deque()
        self.processes = {pid: Process(self, pid) for pid in range(1, count + 1)}
        self.now = self.processes[1]
        monkeypatch.setattr(nodes, "current", lambda: self.now)
        monkeypatch.setattr(nodes, "existing", lambda: self.now)
        for process in self.processes.values():
            gc.of(process)  # type: ignore[arg-type]
            serving(process)
            process.loop.lead = self._lead  # type: ignore[method-assign]

    def _lead(self, until: Callable[[], bool], deadline: float | None = None, brisk: bool = False) -> bool:
        self.run()
        return until() or deadline is not None

    @contextlib.contextmanager
    def on(self, pid: int) -> Iterator[Process]:
        """As code of that process."""
        before, self.now = self.now, self.processes[pid]
        try:
            yield self.now
        finally:
            self.now = before

    def run(self) -> None:
        """Until nothing is on its way."""
        while self.step():
            pass

    def step(self) -> bool:
        for process in self.processes.values():
            with self.on(process.pid):
                if process.loop.soon or process.delivered:
                    process.loop.run()
                    while process.delivered:
                        process.delivered.pop(0)()
                    return True
        if not self.wire:
            return False
        source, target, frame = self.wire.popleft()
        if target not in self.processes:
            return True
        with self.on(target) as process:
            link = SimpleNamespace(peer=source, segments=SimpleNamespace(open=lambda buffer: buffer))
            process.handlers[frame.kind](link, frame)
        return True

    def lose(self, pid: int) -> None:
        """That process is gone, and everybody hears of it."""
        self.wire = collections.deque(parts for parts in self.wire if parts[1] != pid)
        gone = self.processes.pop(pid)
        for process in self.processes.values():
            with self.on(process.pid):
                process.dead[pid] = lambda: ProcessExitedException(pid, 1, True)
                process.requests.fail(pid, process.dead[pid])
                for callback in process.on_lost:
                    callback(pid)
        self.run()
        assert gone.pid == pid

    def pass_on(self, value: Any, source: int, target: int) -> Any:
        """`value` as it arrives: serialised there, its references lent, rebuilt here."""
        seen: list[Any] = []
        with self.on(source) as process:
            data, buffers = codec.encode(value, target, seen)
            process.refs.lend(seen, target)
        self.run()
        with self.on(target):
            return codec.decode(data, buffers)

    def table(self, pid: int) -> dict[Any, set[int]]:
        """Who holds what that process owns."""
        self.run()
        found: dict[Any, set[int]] = self.processes[pid].refs.owner.table()
        return found
