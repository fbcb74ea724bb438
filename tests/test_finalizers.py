"""User code in the middle of ours: a `__del__` that the collector runs between any two bytecodes, a signal handler.

`at_every_line` stands for the collector: it runs the inner operation at each line of ours in turn. What cannot be
answered in there has an end all the same.
"""

from __future__ import annotations

import collections
import contextlib
import gc
import itertools
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from wires import wait_until

import distpool
from distpool import Channel, ChannelClosedError, ClusterExecutor, RemoteChannel, calls, remotecall, remotecall_fetch
from distpool.node import node as nodes
from distpool.node.interrupts import Interrupts
from distpool.node.results import ResultWriter
from distpool.node.threads import SerialQueue, ThreadCache
from distpool.poolqueue import WorkerQueue
from distpool.refs.refs import LOCAL_VALUE, Outcome
from distpool.transport.ioloop import IoLoop
from distpool.transport.journal import Journal
from distpool.transport.shm import SegmentPool

WAIT = 20.0


@pytest.fixture(scope="module")
def worker() -> Iterator[int]:
    (pid,) = distpool.addprocs(1)
    assert remotecall_fetch(abs, pid, -1) == 1
    yield pid
    distpool.rmprocs(pid)


def in_time(function: Callable[[], Any]) -> Any:
    """What it returns, or raises; not later than a test can wait."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append((function(), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(WAIT)
    assert found, "it hangs"
    if found[0][1] is not None:
        raise found[0][1]
    return found[0][0]


def at_line(number: int, outer: Callable[[], object], inner: Callable[[], object]) -> bool:
    """Run `outer()`, and `inner()` at the `number`th line of distpool in there; False if it has fewer."""
    left = [number]

    def local(frame: Any, event: str, arg: Any) -> Any:
        if event == "line" and left[0]:
            left[0] -= 1
            if not left[0]:
                inner()  # not traced itself
        return local

    def trace(frame: Any, event: str, arg: Any) -> Any:
        return local if "/distpool/" in frame.f_code.co_filename and "/tests/" not in frame.f_code.co_filename else None

    sys.settrace(trace)
    try:
        outer()
    finally:
        sys.settrace(None)
    return not left[0]


def at_every_line(make: Callable[[], tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """`make()` gives `(outer, inner, *what the test wants)`; for each line, what it gave after both have run."""
    for number in itertools.count(1):
        made = make()
        if not in_time(lambda: at_line(number, made[0], made[1])):
            assert number > 3, "nothing of ours was run"
            return
        yield made


def drained(channel: Any) -> list[Any]:
    items = []
    while channel.isready():  # also if somebody waits to put something
        items.append(channel.take(timeout=WAIT))
    return items


# -- one channel -----------------------------------------------------------------------------------------------------


def nothing(outcome: Any) -> None:
    pass


def outer_operation(name: str, channel: Channel) -> Callable[[], object]:
    item = Outcome(LOCAL_VALUE, "outer", (), 0)
    return {
        "put": lambda: channel.put("outer"),
        "offer": lambda: channel.offer(item, nothing),
        "arrive": lambda: channel.arrive(2, [item], nothing),
        "take": lambda: channel.restore(Outcome(LOCAL_VALUE, (channel.take(), "outer")[1], (), 0)),
        "wait": lambda: (channel.wait(), channel.put("outer")),
        "pickle": lambda: (channel.__reduce__(), channel.put("outer")),
        "isready": lambda: (channel.isready(), channel.put("outer")),
        "reserve": lambda: (channel.reserve(2, lambda *_: None, lambda *_: channel.answered(2)), channel.put("outer")),
    }[name]


@pytest.mark.parametrize("name", ["put", "offer", "arrive", "take", "wait", "pickle", "isready", "reserve"])
def test_putting_inside(name: str) -> None:
    """Both items are in, none twice, and the channel is never fuller than it may be."""

    def make() -> tuple[Any, ...]:
        channel = Channel(8)
        for number in range(6):
            channel.put(number)
        most: list[int] = []

        def inner() -> None:
            channel.put("inner", timeout=WAIT)
            most.append(len(channel))

        return outer_operation(name, channel), inner, channel, most

    for _, _, channel, most in at_every_line(make):
        assert max(*most, len(channel)) <= 8
        items = collections.Counter(drained(channel))
        assert items["inner"] == 1 and items["outer"] == 1 and max(items.values()) == 1


def test_putting_inside_does_not_overfill_the_channel() -> None:
    def make() -> tuple[Any, ...]:
        channel = Channel(2)
        channel.put("first")
        put: list[str] = []

        def inner() -> None:
            with contextlib.suppress(TimeoutError):
                channel.put("inner", timeout=0.001)
                put.append("inner")

        def outer() -> None:
            with contextlib.suppress(TimeoutError):
                channel.put("outer", timeout=0.001)
                put.append("outer")

        return outer, inner, channel, put

    for _, _, channel, put in at_every_line(make):
        assert len(channel) == 2
        assert sorted(drained(channel)) == sorted(["first", *put])


def test_waiting_inside_ends() -> None:
    """Nobody could bring an item while the lock is held: an error. Elsewhere it is served."""
    errors = 0

    def make() -> tuple[Any, ...]:
        channel = Channel(8)
        for number in range(3):
            channel.put(number)
        found: list[Any] = []

        def inner() -> None:
            for operation in (channel.take, channel.fetch, channel.wait):
                try:
                    found.append(operation(timeout=WAIT))
                except RuntimeError as error:
                    found.append(error)

        return lambda: channel.put("outer"), inner, channel, found

    for _, _, channel, found in at_every_line(make):
        left = drained(channel)
        inside = [value for value in found if isinstance(value, RuntimeError)]
        assert len(found) == 3 and len(inside) in (0, 3) and left[-1] == "outer"
        assert left[:-1] == ([0, 1, 2] if inside else [1, 2])
        errors += len(inside)
    assert errors, "the lock was never held"


def test_closing_inside() -> None:
    def make() -> tuple[Any, ...]:
        channel = Channel(8)
        channel.put("first")
        failed: list[Any] = []

        def outer() -> None:
            try:
                channel.put("outer")
            except ChannelClosedError as error:
                failed.append(error)

        return outer, channel.close, channel, failed

    for _, _, channel, failed in at_every_line(make):
        assert not channel.isopen()
        assert drained(channel) == (["first"] if failed else ["first", "outer"])


def test_looking_inside_never_waits() -> None:
    def make() -> tuple[Any, ...]:
        channel = Channel(8)
        channel.put("first")
        seen: list[Any] = []

        def inner() -> None:
            seen.append((channel.isready(), channel.isopen(), len(channel) >= 1, bool(channel)))

        return lambda: channel.put("outer"), inner, seen

    for _, _, seen in at_every_line(make):
        assert seen == [(True, True, True, True)]


def test_pool_of_workers_inside() -> None:
    def make() -> tuple[Any, ...]:
        queue = WorkerQueue(nodes.current(), [1])
        queue.take()
        return lambda: queue.give(1), lambda: (queue.give(1), queue.isready(), queue.living()), queue

    for _, _, queue in at_every_line(make):
        assert queue.take(timeout=WAIT) == 1 and not queue.isready()


class Circle:
    """Garbage that only the collector finds."""

    def __init__(self, end: Callable[[], object]) -> None:
        self.me = self
        self.end = end

    def __del__(self) -> None:
        self.end()


def test_the_collector_itself() -> None:
    channel = Channel(1_000_000)
    put, rounds = itertools.count(), 3_000

    def end() -> None:
        channel.put("from a finalizer")
        channel.isready()
        next(put)

    def work() -> None:
        for number in range(rounds):
            Circle(end)
            channel.put(number)
            channel.offer(Outcome(LOCAL_VALUE, number, (), 0), nothing)
            channel.take()

    before = gc.get_threshold()
    gc.set_threshold(3, 2, 2)
    try:
        in_time(work)
    finally:
        gc.set_threshold(*before)
    gc.collect()
    made = next(put)
    assert made > rounds // 2
    assert len(channel) == rounds + made


def test_a_signal_handler_puts_something() -> None:
    channel = Channel(1_000_000)
    count = [0]

    def handler(signum: int, frame: Any) -> None:
        channel.put("from a handler")
        count[0] += 1

    before = signal.signal(signal.SIGUSR1, handler)
    ended = threading.Event()

    def send() -> None:
        while not ended.is_set():
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
            ended.wait(0.0002)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    try:
        for number in range(20_000):
            channel.put(number)
    finally:
        ended.set()
        sender.join(WAIT)
        signal.signal(signal.SIGUSR1, before)
    assert count[0] and len(channel) == 20_000 + count[0]


# -- other places that have locks ------------------------------------------------------------------------------------


def test_timers_inside() -> None:
    """None is lost: neither by a push in the middle of another one, nor by one between the look at a cancelled timer
    and its removal."""

    def make() -> tuple[Any, ...]:
        loop = IoLoop("test")
        fired: list[str] = []
        loop.call_later(100, nothing_at_all).cancel()

        def outer() -> None:
            loop.call_later(0.001, lambda: fired.append("outer"))
            loop.lead(lambda: "outer" in fired, time.monotonic() + WAIT)

        return outer, lambda: loop.call_later(0, lambda: fired.append("inner")), loop, fired

    for _, _, loop, fired in at_every_line(make):
        loop.lead(lambda fired=fired: len(fired) == 2, time.monotonic() + WAIT)
        assert sorted(fired) == ["inner", "outer"]
        loop.close_descriptors()


def nothing_at_all() -> None:
    pass


def test_followers_inside() -> None:
    def make() -> tuple[Any, ...]:
        loop = IoLoop("test")

        def follow() -> None:
            with loop.following(nothing_at_all):
                loop.hurry()

        return follow, follow, loop

    for _, _, loop in at_every_line(make):
        loop.close_descriptors()


def test_serial_queues_inside() -> None:
    threads = ThreadCache("test")

    def make() -> tuple[Any, ...]:
        queue, ran = SerialQueue(threads), []
        return lambda: queue.put(lambda: ran.append(1)), lambda: queue.put(lambda: ran.append(2)), queue, ran

    for _, _, queue, ran in at_every_line(make):
        assert queue.join(WAIT) and sorted(ran) == [1, 2]


def test_serial_queues_inside_their_own_thread() -> None:
    class Now:
        """Runs it here."""

        def run(self, function: Callable[[], object]) -> None:
            function()

    def make() -> tuple[Any, ...]:
        queue: Any = SerialQueue(Now())  # type: ignore[arg-type]
        ran: list[int] = []
        return lambda: queue.put(lambda: ran.append(1)), lambda: queue.put(lambda: ran.append(2)), ran

    for _, _, ran in at_every_line(make):
        assert sorted(ran) == [1, 2]


def test_the_guard_of_interrupts_inside() -> None:
    def make() -> tuple[Any, ...]:
        interrupts = Interrupts()

        def guarded() -> None:
            inside = interrupts.enter(None)
            if inside is not None:
                interrupts.leave(inside)

        return lambda: interrupts.call_beside(guarded, (), {}), guarded, interrupts

    for _, _, interrupts in at_every_line(make):
        assert not interrupts._beside and not interrupts._inside


def test_results_of_a_worker_inside() -> None:
    class Line:
        peer = 1
        idle = True

        def __init__(self) -> None:
            self.loop = self
            self.leads = False
            self.bodies: list[bytes] = []

        def send(self, kind: Any, control: bytes, body: bytes, buffers: Any = ()) -> None:
            self.bodies.append(body)

    def make() -> tuple[Any, ...]:
        line: Any = Line()
        results = ResultWriter(line, Journal.private(), None)  # type: ignore[arg-type]
        results._smallest_large = 1000

        def outer() -> None:
            results.scalar(1, 10)
            results.flush()

        return outer, results.flush, results

    for _, _, results in at_every_line(make):
        results.flush()
        assert len(b"".join(results.link.bodies)) > 0 and not results.unsent


def test_shared_memory_inside() -> None:
    def make() -> tuple[Any, ...]:
        pool = SegmentPool()
        other = pool.put(b"y" * 5000)
        big = pool.put(b"y" * 500_000)
        assert big is not None and other is not None
        big.release()
        made: list[Any] = []

        def inner() -> None:
            other.release()
            made.append(pool.put(b"z" * 3000))

        return lambda: made.append(pool.put(b"x" * 400_000)), inner, pool, made

    for _, _, pool, made in at_every_line(make):
        assert len({lease.segment_id for lease in made if lease}) == sum(1 for lease in made if lease)
        for lease in made:
            if lease is not None:
                lease.release()
        assert pool.bytes_in_use == 0
        pool.close()


def test_round_robin_inside(worker: int) -> None:
    seen: list[int] = []

    def make() -> tuple[Any, ...]:
        return (
            lambda: seen.append(calls.next_worker()),
            lambda: seen.append(calls.next_worker()),
        )

    for _ in at_every_line(make):
        pass
    assert set(seen) <= set(distpool.workers())


def test_submitting_and_cancelling_inside() -> None:
    with ClusterExecutor(1) as executor:
        assert executor.submit(abs, -1).result(WAIT) == 1
        scheduler = executor._crew.scheduler

        def make() -> tuple[Any, ...]:
            futures: list[Any] = []

            def outer() -> None:
                futures.append(executor.submit(abs, -2))
                scheduler.pump()

            def inner() -> None:
                futures.append(executor.submit(abs, -2))
                futures[-1].cancel()

            return outer, inner, futures

        for _, _, futures in at_every_line(make):
            assert {future.result(WAIT) for future in futures if not future.cancelled()} <= {2}


# -- what cannot be waited for ---------------------------------------------------------------------------------------


def on_leader(function: Callable[[], object]) -> Any:
    """What it returns or raises when it runs there: as a `__del__` that the collector runs in a handler."""
    found: list[Any] = []
    done = threading.Event()

    def run() -> None:
        try:
            found.append(function())
        except BaseException as error:
            found.append(error)
        done.set()

    nodes.current().loop.call_soon(run)
    assert done.wait(WAIT), "it hangs"
    return found[0]


def test_waiting_on_the_leader_ends(worker: int) -> None:
    channel = RemoteChannel(lambda: Channel(5), worker)
    here = Channel(1)
    rest = remotecall(time.sleep, worker, 0.5)
    for operation in (
        lambda: rest.result(),
        lambda: rest.fetch(),
        lambda: remotecall_fetch(abs, worker, -1),
        lambda: channel.take(),
        lambda: channel.isready(),
        lambda: here.take(),
        lambda: here.wait(),
    ):
        error = on_leader(operation)
        assert isinstance(error, RuntimeError) and "finalizer" in str(error)
    assert rest.result(WAIT) is None and remotecall_fetch(abs, worker, -1) == 1


def test_putting_on_the_leader(worker: int) -> None:
    """It is not waited for, but done."""
    for channel in (RemoteChannel(lambda: Channel(1), worker), Channel(1)):
        for number in range(2):
            assert not isinstance(on_leader(lambda channel=channel, number=number: channel.put(number)), BaseException)
        assert [channel.take(timeout=WAIT) for _ in range(2)] == [0, 1]
        assert not isinstance(on_leader(channel.close), BaseException)
        wait_until(lambda channel=channel: not channel.isopen())


def test_what_needs_no_answer_on_the_leader(worker: int) -> None:
    box = RemoteChannel(lambda: Channel(5), 1)
    on_leader(lambda: distpool.remote_do(box.put, worker, "done"))
    assert box.take(timeout=WAIT) == "done"
    future = on_leader(lambda: remotecall(abs, worker, -3))
    assert future.result(WAIT) == 3


@pytest.mark.parametrize("name", ["table", "references", "timers", "dispatch", "sending"])
def test_waiting_with_a_lock_that_the_leader_needs_ends(worker: int, name: str) -> None:
    node = nodes.current()
    refs = node.references()
    with ClusterExecutor(1) as executor:
        lock = {
            "table": refs.owner._lock,
            "references": refs._lock,
            "timers": node.loop._timer_lock,
            "dispatch": executor._crew.scheduler.lock,
            "sending": node.peers.link(worker)._write_lock,
        }[name]

        def inside() -> None:
            with lock:
                with pytest.raises(RuntimeError, match="finalizer"):
                    remotecall_fetch(abs, worker, -1)
                with pytest.raises(RuntimeError, match="finalizer"):
                    executor.submit(abs, -1).result()

        in_time(inside)
        assert executor.submit(abs, -1).result(WAIT) == 1
    assert remotecall_fetch(abs, worker, -1) == 1


def put_and_answer(box: Any) -> int:
    """On the worker: its request to the channel is on the way before this returns."""
    peers = nodes.current().peers
    before = len(peers.requests)
    threading.Thread(target=box.put, args=("from there",), daemon=True).start()
    wait_until(lambda: len(peers.requests) > before)
    return 5


def test_the_leader_does_not_wait_for_a_channel(worker: int) -> None:
    """A thread is in the middle of an operation, in a `__del__` that waits for another process: the leader, which has
    to bring the answer, has the same channel to serve."""
    box = RemoteChannel(lambda: Channel(10), 1)
    channel = nodes.current().references().owner.get(box._handle.rrid).channel

    def middle() -> int:
        with channel._lock:
            return sum(remotecall_fetch(put_and_answer, worker, box) for _ in range(3))

    assert in_time(middle) == 15
    assert [box.take(timeout=WAIT) for _ in range(3)] == ["from there"] * 3


def test_opening_a_value_twice_inside(worker: int) -> None:
    class Nested:
        def __reduce__(self) -> Any:
            return look_at, ()

    OPENING.clear()
    future = remotecall(Nested, worker)
    OPENING.append(future)
    assert in_time(lambda: future.result(WAIT)) == "refused"


OPENING: list[Any] = []


def look_at() -> str:
    """While the value is being opened: what a finalizer gets that wants it."""
    if not OPENING:
        return "elsewhere"
    with pytest.raises(RuntimeError, match="just being opened"):
        OPENING[0].result(1)
    return "refused"


# -- signal handlers that wait -----------------------------------------------------------------------------------------

WAITS_IN_A_HANDLER = """
import os, signal, sys, threading
from distpool import ClusterExecutor, DistPool
from distpool.node import node as nodes

waits, route = sys.argv[1:]
make = DistPool if waits.startswith("pool") else ClusterExecutor
held = make(2)
pool = executor = held

def ended(value):
    called.append(value)

called = []
how = {
    "result": lambda: executor.submit(abs, -1).result(),
    "limited": lambda: type(executor.options(timeout=0.2).submit(signal.pause).exception()).__name__,
    "map": lambda: list(executor.map(abs, [-1])),
    "imap": lambda: list(executor.imap_unordered(abs, [-1])),
    "pmap": lambda: executor.pmap(abs, [-1]),
    "shutdown": lambda: (executor.submit(abs, -1).add_done_callback(ended), executor.shutdown(), len(called))[2],
    "pool-map": lambda: pool.map(abs, [-1]),
    "pool-callback": lambda: (pool.apply_async(abs, (-1,), callback=ended).get(), called)[0],
    "pool-join": lambda: (pool.apply_async(abs, (-1,), callback=ended), pool.close(), pool.join(), len(called))[3],
    "pool-terminate": lambda: (pool.terminate(), pool.join()),
}[waits]
found = []
struck = threading.Event()

def handler(signum, frame):
    if struck.is_set():
        return
    struck.set()
    read, write = pipe
    os.write(write, b"x")  # what the main thread waits for comes meanwhile
    found.append(how())

signal.signal(signal.SIGUSR1, handler)
path = "/proc/%d/fd/" % os.getpid()
pipe = os.pipe()
wait = lambda end: open(end, "rb", 0).read(1)
if make is DistPool:
    waiting = pool.apply_async(wait, (path + str(pipe[0]),))
else:
    waiting = executor.submit(wait, path + str(pipe[0]))
loop = nodes.current().loop
def send():
    signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

def insist():  # one that comes just before the poll is heard behind it
    while not struck.wait(0.1):
        send()

loop.call_soon(lambda: loop.call_later(0.3, send if route == "leader" else lambda: nodes.current().deliver(insist)))
try:
    waiting.get() if make is DistPool else waiting.result()
except Exception as error:
    assert waits == "pool-terminate", error
assert len(found) == 1, found
print(found[0], flush=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
@pytest.mark.parametrize("route", ["leader", "poll"])
@pytest.mark.parametrize(
    ("waits", "found"),
    [
        ("result", "1"),
        ("limited", "TimeoutError"),
        ("map", "[1]"),
        ("imap", "[1]"),
        ("pmap", "[1]"),
        ("shutdown", "1"),
        ("pool-map", "[1]"),
        ("pool-callback", "1"),
        ("pool-join", "1"),
        ("pool-terminate", "(None, None)"),
    ],
)
def test_a_signal_handler_waits_in_the_poll(waits: str, found: str, route: str) -> None:
    """Of the main thread, which leads: nobody else could bring what it waits for. It waited for ever."""
    command = [sys.executable, "-c", WAITS_IN_A_HANDLER, waits, route]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.strip(), done.returncode) == (found, 0), done.stderr
