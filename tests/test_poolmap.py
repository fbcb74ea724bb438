"""Elements of a map on the workers of a pool, with a pool and workers that the test plays."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import PATIENCE
from wires import until

from distpool import poolmap
from distpool.errors import ProcessExitedException
from distpool.mapruns import LOOK_AHEAD
from distpool.node import node as nodes
from distpool.poolmap import PoolCarrier
from distpool.refs.refs import LOCAL_VALUE, RAISED_HERE, Future, Outcome


class Pool:
    """A `WorkerPool` in one process: free workers in order, and who waits for one."""

    def __init__(self, *pids: int) -> None:
        self.members = list(pids)
        self.free = list(pids)
        self.waiting: list[Future[int]] = []
        self.put_back: list[int] = []
        self.lock = threading.Lock()
        self.error: BaseException | None = None  # of `_take_later`
        self.fails: dict[int, BaseException] = {}  # of `prepare`
        self.taken_by_asker = False

    def _do(self, op: str, *arguments: Any) -> Any:
        return {"living": list(self.members), "has": self.taken_by_asker}[op]

    def _take_later(self) -> Future[int]:
        if self.error is not None:
            raise self.error
        future: Future[int] = Future()
        with self.lock:
            if not self.free:
                self.waiting.append(future)
                return future
            pid = self.free.pop(0)
        future.set_result(pid)
        return future

    def put(self, pid: int) -> None:
        with self.lock:
            self.put_back.append(pid)
            taker = self.waiting.pop(0) if self.waiting else None
            if taker is None:
                self.free.append(pid)
        if taker is not None:
            taker.set_result(pid)

    def empty(self, error: BaseException) -> None:
        """No worker is left: who waits hears of it."""
        self.members.clear()
        waiting, self.waiting = self.waiting, []
        for future in waiting:
            future.set_exception(error)

    def prepare(self, function: Callable[..., Any], pid: int) -> Callable[..., Any]:
        if pid in self.fails:
            raise self.fails[pid]
        return function


class Desk:
    """What `request` was asked; the test answers."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, int, tuple[Any, ...], Future[Any]]] = []
        self.arrived = threading.Condition()

    def request(self, function: Any, pid: int, arguments: tuple[Any, ...]) -> Future[Any]:
        future: Future[Any] = Future()
        with self.arrived:
            self.asked.append((function, pid, arguments, future))
            self.arrived.notify_all()
        return future

    def wait(self, count: int) -> None:
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.asked) >= count, PATIENCE), len(self.asked)

    def answer(self, number: int) -> None:
        """As the worker would."""
        function, _, arguments, future = self.asked[number]
        try:
            value = function(*arguments)
        except BaseException as error:
            self.settle(future, Outcome(RAISED_HERE, error, (), 2))
        else:
            self.settle(future, Outcome(LOCAL_VALUE, value, (), 2))

    def fail(self, number: int, error: BaseException) -> None:
        self.settle(self.asked[number][3], Outcome(RAISED_HERE, error, (), 2))

    @staticmethod
    def settle(future: Future[Any], outcome: Outcome) -> None:
        if future._settle(outcome):
            future._run_callbacks()


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Desk:
    made = Desk()
    monkeypatch.setattr(poolmap, "request", made.request)
    return made


@pytest.fixture
def carriers() -> Iterator[Callable[..., PoolCarrier]]:
    made: list[PoolCarrier] = []

    def one(pool: Pool, function: Callable[..., Any] = abs, single: bool = True, batch: int = 1) -> PoolCarrier:
        made.append(PoolCarrier(pool, function, single, batch))  # type: ignore[arg-type]
        return made[-1]

    yield one
    for carrier in made:
        carrier.close()


Make = Callable[..., PoolCarrier]


def ended(carrier: PoolCarrier, count: int) -> dict[int, Any]:
    carrier.wait_until(lambda: len(carrier.results) + len(carrier.failed) >= count, time.monotonic() + PATIENCE)
    found: dict[int, Any] = {index: carrier.open(raw)[0] for index, raw in carrier.results.items()}
    found.update((index, carrier.open(raw)[1]) for index, raw in carrier.failed)
    assert len(found) == count
    return found


def test_one_message_at_a_time_for_each_worker(desk: Desk, carriers: Make) -> None:
    pool = Pool(2, 3)
    carrier = carriers(pool)
    carrier.feed([-1, -2, -3])
    desk.wait(2)
    assert {pid for _, pid, _, _ in desk.asked} == {2, 3} and not pool.free
    desk.answer(0)
    desk.wait(3)
    assert desk.asked[2][1] == desk.asked[0][1]
    for number in (1, 2):
        desk.answer(number)
    assert ended(carrier, 3) == {0: 1, 1: 2, 2: 3}
    assert sorted(pool.free) == [2, 3] and carrier.inflight == 0 and carrier.sent == 3


def test_no_more_workers_are_asked_for_than_there_are_messages(desk: Desk, carriers: Make) -> None:
    pool = Pool(2, 3, 4)
    carriers(pool, batch=4).feed([1, 2, 3, 4, 5])
    desk.wait(2)
    assert len(pool.free) == 1 and [len(asked[2][2]) for asked in desk.asked] in ([4, 1], [1, 4])


def test_several_iterables(desk: Desk, carriers: Make) -> None:
    carrier = carriers(Pool(2), pow, single=False)
    carrier.feed([(2, 3)])
    desk.wait(1)
    desk.answer(0)
    assert ended(carrier, 1) == {0: 8}


def test_batches_and_what_fails_in_one(desk: Desk, carriers: Make) -> None:
    carrier = carriers(Pool(2), lambda number: 6 // number, batch=4)
    carrier.feed([1, 0, 3, 2, 6])
    desk.wait(1)
    desk.answer(0)
    desk.wait(2)
    desk.answer(1)
    found = ended(carrier, 5)
    assert type(found.pop(1)) is ZeroDivisionError and found == {0: 6, 2: 2, 3: 3, 4: 1}


def test_of_a_batch_whose_worker_died_what_had_not_begun_runs_elsewhere(desk: Desk, carriers: Make) -> None:
    """This one has told of nothing, and so may have been at the first."""
    carrier = carriers(Pool(2), batch=3)
    carrier.feed([1, 2, 3, -4])
    desk.wait(1)
    desk.fail(0, ProcessExitedException(2))
    desk.wait(2)
    assert desk.asked[1][2][2] == [2, 3, -4]
    desk.answer(1)
    found = ended(carrier, 4)
    assert type(found.pop(0)) is ProcessExitedException and found == {1: 2, 2: 3, 3: 4}


def test_a_batch_whose_function_cannot_be_loaded_fails_as_a_whole(desk: Desk, carriers: Make) -> None:
    carrier = carriers(Pool(2), batch=3)
    carrier.feed([1, 2, 3])
    desk.wait(1)
    desk.fail(0, ImportError("no such module"))
    assert {type(error) for error in ended(carrier, 3).values()} == {ImportError}


def test_what_had_not_begun_is_dropped_if_nobody_wants_it(desk: Desk, carriers: Make) -> None:
    carrier = carriers(Pool(2), batch=3)
    carrier.feed([1, 2, 3])
    desk.wait(1)
    carrier.close()
    desk.fail(0, ProcessExitedException(2))
    assert not carrier.waits() and not carrier._waiting and not carrier.failed


def test_again_goes_alone_and_first(desk: Desk, carriers: Make) -> None:
    carrier = carriers(Pool(2), batch=4)
    carrier.feed([1])
    desk.wait(1)
    carrier.feed([2, 3])
    carrier.again(0, -7)
    desk.answer(0)
    desk.wait(2)
    assert desk.asked[1][2] == (-7,) and carrier.fed == 3
    desk.answer(1)
    desk.wait(3)
    desk.answer(2)
    assert ended(carrier, 3) == {0: 7, 1: 2, 2: 3}


def test_a_worker_that_is_gone_before_anything_was_sent(desk: Desk, carriers: Make) -> None:
    pool = Pool(2, 3)
    pool.fails[2] = ProcessExitedException(2)
    put = pool.put
    pool.put = lambda pid: None if pid == 2 else put(pid)  # type: ignore[method-assign,assignment]  # no member any more
    carrier = carriers(pool)
    carrier.feed([-1, -2])
    for number in (0, 1):
        desk.wait(number + 1)
        assert desk.asked[number][1] == 3
        desk.answer(number)
    assert sorted(ended(carrier, 2).values()) == [1, 2] and carrier.inflight == 0


def test_what_cannot_be_sent_is_that_elements_error(desk: Desk, carriers: Make) -> None:
    pool = Pool(2)
    pool.fails[2] = ValueError("cannot be sent")
    carrier = carriers(pool)
    carrier.feed([1, 2])
    found = ended(carrier, 2)
    assert {str(error) for error in found.values()} == {"cannot be sent"}
    until(lambda: pool.free == [2], "the worker is back")
    assert carrier.inflight == 0 and carrier.usable


def test_no_worker_is_left(desk: Desk, carriers: Make) -> None:
    """What is in flight ends first: it says why the pool is empty."""
    pool = Pool(2)
    carrier = carriers(pool)
    carrier.feed([1, 2, 3])
    desk.wait(1)
    desk.answer(0)
    desk.wait(2)
    pool.empty(RuntimeError("No active worker"))
    carrier.again(0, 5)
    pool.error = RuntimeError("No active worker")
    assert not carrier.failed
    desk.fail(1, ProcessExitedException(2))
    carrier.wait_until(lambda: len(carrier.failed) >= 2, time.monotonic() + PATIENCE)
    first, *others = [carrier.open(raw)[1] for _, raw in carrier.failed]
    assert type(first) is ProcessExitedException and {type(error) for error in others} == {RuntimeError}
    assert not carrier.usable


def test_the_owner_of_the_pool_has_died(desk: Desk, carriers: Make) -> None:
    """Its workers live on, so nobody waits for what they are doing."""
    pool = Pool(2)
    carrier = carriers(pool)
    carrier.feed([1])
    desk.wait(1)
    pool.error = ProcessExitedException(7)
    carrier.feed([2])
    carrier.wait_until(lambda: bool(carrier.failed), time.monotonic() + PATIENCE)
    ((index, raw),) = carrier.failed
    assert index == 1 and type(carrier.open(raw)[1]) is ProcessExitedException

    def put(pid: int) -> None:
        raise ProcessExitedException(7)

    pool.put = put  # type: ignore[method-assign]
    desk.answer(0)
    assert ended(carrier, 2)[0] == 1  # whoever waits hears of it all the same


def test_the_owner_dies_while_something_is_sent(desk: Desk, carriers: Make) -> None:
    pool = Pool(2)
    pool.fails[2] = ProcessExitedException(7)  # of another process than the one that it was to be sent to
    carrier = carriers(pool)
    carrier.feed([1])
    assert type(ended(carrier, 1)[0]) is ProcessExitedException and not carrier.usable


def test_closing_drops_what_waits(desk: Desk, carriers: Make) -> None:
    pool = Pool(2)
    carrier = carriers(pool)
    carrier.feed([1, 2, 3])
    desk.wait(1)
    carrier.close()
    assert not carrier.waits()
    desk.answer(0)
    until(lambda: pool.free == [2], "the worker is back")
    assert len(desk.asked) == 1 and not carrier.results and not carrier.failed


def test_a_worker_that_comes_when_it_is_closed_goes_back(desk: Desk, carriers: Make) -> None:
    pool = Pool(2)
    pool.free.clear()
    carrier = carriers(pool)
    carrier.feed([1])
    until(lambda: pool.waiting, "it has asked")
    carrier.close()
    pool.waiting.pop().set_result(2)
    until(lambda: pool.put_back == [2], "it goes back")
    assert not desk.asked


def test_waiting(desk: Desk, carriers: Make) -> None:
    carrier = carriers(Pool(2))
    begin = time.monotonic()
    carrier.wait_until(lambda: False, begin + 0.01)
    assert 0.005 < time.monotonic() - begin < PATIENCE
    carrier.wait_until(lambda: True, None)


def test_look_ahead(desk: Desk, carriers: Make) -> None:
    assert carriers(Pool(2, 3)).ahead(True) == LOOK_AHEAD * 2
    assert carriers(Pool(2, 3), batch=5).ahead(False) == LOOK_AHEAD * 2 * 5
    auto = carriers(Pool(2), batch=0)
    assert auto.ahead(False) == LOOK_AHEAD
    auto._mean = 1e-9
    assert auto.ahead(False) == LOOK_AHEAD * poolmap._MAX_BATCH
    auto._mean = 100.0
    assert auto.ahead(False) == LOOK_AHEAD


def test_auto_measures(desk: Desk, carriers: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poolmap.config, "WINDOW_SECONDS", 1000.0)  # whatever this machine takes, more fit in
    carrier = carriers(Pool(2), batch=0)
    carrier.feed([1])
    desk.wait(1)
    carrier._mean = 0.0
    carrier.feed(list(range(100)))
    desk.answer(0)
    desk.wait(2)
    assert carrier._mean > 0 and len(desk.asked[1][2][2]) > 1
    desk.answer(1)


# -- a map inside a call that came through the same pool -------------------------------------------------


def test_a_process_that_is_a_member_and_taken_serves_itself(desk: Desk, carriers: Make) -> None:
    pool = Pool(1)
    pool.taken_by_asker = True
    pool.free.clear()
    carrier = carriers(pool)
    carrier.feed([-1, -2])
    for number in (0, 1):
        desk.wait(number + 1)
        assert desk.asked[number][1] == 1
        desk.answer(number)
    assert ended(carrier, 2) == {0: 1, 1: 2}
    assert pool.put_back == []  # it was not taken for this


class Elsewhere:
    """This process's node, as if it were a worker's."""

    is_master = False

    def __init__(self, node: nodes.Node, dead: dict[int, BaseException]) -> None:
        self.pid = 9
        self.peers = SimpleNamespace(dead=dead)
        self.loop, self.given_away, self.deliver = node.loop, node.given_away, node.deliver


def test_after_a_while_some_member_serves_a_worker_s_map(
    desk: Desk, carriers: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poolmap, "_PATIENCE", 0.01)
    here = Elsewhere(nodes.current(), {2: OSError()})
    monkeypatch.setattr(poolmap.nodes, "current", lambda: here)
    pool = Pool(2, 3)
    pool.free.clear()
    carrier = carriers(pool)
    carrier.feed([-1, -2])
    desk.wait(1)
    assert desk.asked[0][1] == 3  # not the dead one
    assert pool.waiting  # it still would rather have a worker of its own
    desk.answer(0)
    desk.wait(2)
    desk.answer(1)
    assert ended(carrier, 2) == {0: 1, 1: 2}


def test_a_lane_whose_process_died_is_given_up(desk: Desk, carriers: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poolmap, "_PATIENCE", 0.01)
    dead: dict[int, BaseException] = {}
    here = Elsewhere(nodes.current(), dead)
    monkeypatch.setattr(poolmap.nodes, "current", lambda: here)
    pool = Pool(2, 3)
    pool.free.clear()
    carrier = carriers(pool)
    carrier.feed([-1, -2])
    desk.wait(1)
    dead[2] = OSError()
    desk.fail(0, ProcessExitedException(2))
    desk.wait(2)
    assert desk.asked[1][1] == 3
    desk.answer(1)
    found = ended(carrier, 2)
    assert type(found[0]) is ProcessExitedException and found[1] == 2
