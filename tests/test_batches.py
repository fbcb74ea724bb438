"""Elements that go to a worker together: what one of them does happens to it alone, however its worker reports."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from wires import until

import distpool
from distpool import (
    CachingPool,
    Channel,
    ProcessExitedException,
    RemoteChannel,
    RemoteException,
    SerializationError,
    WorkerPool,
    addprocs,
    batches,
    pmap,
    remotecall_fetch,
    rmprocs,
)
from distpool.batches import Batch, Boards, boards, run_batch, when_known
from distpool.node import node as nodes
from distpool.refs.refs import LOCAL_VALUE, RAISED_HERE, Outcome, open_outcome
from distpool.transport.journal import Journal

pytestmark = pytest.mark.time_limit(90)


@pytest.fixture(params=["board", "far", "refused"])
def pair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Two workers that note on a board how far they are, or share no memory with us, or think so and are wrong."""
    pids = addprocs(2)
    if request.param == "far":
        for pid in pids:
            link = nodes.current().peers.link(pid)
            assert link is not None
            link.shares_memory = False
    elif request.param == "refused":
        create = Journal.create

        def nowhere(*args: Any, **kwargs: Any) -> Journal:
            journal = create(*args, **kwargs)
            journal.path = "/nowhere/at/all"
            return journal

        monkeypatch.setattr(Journal, "create", nowhere)
    yield pids
    rmprocs(*pids).result()


def ident(x: Any) -> Any:
    return x


def name(error: BaseException) -> str:
    return type(error).__name__


class Trap:
    """Can be sent, and not received."""

    def __reduce__(self) -> Any:
        return int, ("no number",)


class Counted:
    """Notes in a folder how often each element has run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def note(self, i: int) -> None:
        with (self.folder / str(i)).open("ab") as file:
            file.write(b"x")

    def times(self, count: int) -> list[int]:
        files = [self.folder / str(i) for i in range(count)]
        return [file.stat().st_size if file.exists() else 0 for file in files]


# -- each for itself -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [4, "auto"])
def test_what_cannot_be_sent_or_received_fails_alone(pair: list[int], batch: Any) -> None:
    errors: list[BaseException] = []

    def noted(error: BaseException) -> str:
        errors.append(error)
        return "E"

    elements = [0, 1, threading.Lock(), 3, Trap(), 5, [6], Trap()]
    assert pmap(ident, elements, pool=CachingPool(pair), batch_size=batch, on_error=noted) == [
        *(0, 1, "E", 3, "E", 5, [6], "E")
    ]
    assert sorted(map(name, errors)) == ["SerializationError", "ValueError", "ValueError"]
    with pytest.raises(SerializationError, match="lock"):
        pmap(ident, elements[:4], pool=CachingPool(pair), batch_size=batch)
    pairs = pmap(lambda a, b: (a, b), elements, range(8), pool=WorkerPool(pair), batch_size=batch, on_error=name)
    assert [value for value in pairs if type(value) is tuple] == [(0, 0), (1, 1), (3, 3), (5, 5), ([6], 6)]


def test_nothing_of_a_batch_can_be_sent(pair: list[int]) -> None:
    locks = [threading.Lock() for _ in range(6)]
    assert pmap(ident, locks, pool=WorkerPool(pair), batch_size=3, on_error=name) == ["SerializationError"] * 6


@pytest.mark.parametrize("batch", [1, 4, "auto"])
def test_elements_share_nothing(pair: list[int], batch: Any) -> None:
    def grow(grown: list[Any], *others: Any) -> Any:
        grown.append(1)
        return len(grown), *map(len, others)

    one, big = [0], [[0] * 100]
    pool = CachingPool(pair)
    assert pmap(grow, [one] * 4, pool=pool, batch_size=batch) == [(2,)] * 4
    assert pmap(grow, [big] * 4, pool=pool, batch_size=batch) == [(2,)] * 4
    assert pmap(grow, [one] * 4, [one] * 4, pool=pool, batch_size=batch) == [(2, 2)] * 4, "those of one element do"
    assert one == [0]


def test_references_in_elements(pair: list[int]) -> None:
    channels = [RemoteChannel(lambda: Channel(2)) for _ in range(5)]

    def put(channel: Any, i: int) -> Any:
        channel.put(i)
        return channel

    back = pmap(put, [*channels, threading.Lock()], range(6), pool=WorkerPool(pair), batch_size=3, on_error=name)
    assert back == [*channels, "SerializationError"]
    assert [channel.take(timeout=10) for channel in channels] == list(range(5))
    trapped = pmap(ident, [(channels[0], Trap()), (channels[1],)], pool=WorkerPool(pair), batch_size=2, on_error=name)
    assert trapped == ["ValueError", (channels[1],)]
    references = [distpool.remoteref_id(channel) for channel in channels]
    del channels, back, trapped
    until(lambda: not any(reference in distpool.debug.refs() for reference in references), "nobody holds them")


def test_arrays(pair: list[int]) -> None:
    np = pytest.importorskip("numpy")

    def double(array: Any) -> Any:
        array *= 2
        return array

    arrays = [np.full(100_000, i) for i in range(5)]
    doubled = pmap(double, arrays, pool=CachingPool(pair), batch_size=3)
    assert [int(array.sum()) for array in doubled] == [200_000 * i for i in range(5)]
    assert int(arrays[3].sum()) == 300_000


def test_errors_of_elements(pair: list[int]) -> None:
    def act(i: int) -> Any:
        if i == 1:
            raise KeyError("x")
        if i == 2:
            raise SystemExit(3)
        if i == 3:
            return threading.Lock()
        return i

    values = pmap(act, range(5), pool=CachingPool(pair), batch_size=5, on_error=name)
    assert values == [0, "KeyError", "SystemExit", "SerializationError", 4]


class NoCause(Exception):
    __cause__ = property(lambda self: 1 // 0)  # type: ignore[assignment]


class Touchy(Exception):
    def __getattribute__(self, name: str) -> Any:
        raise LookupError(name)


@pytest.mark.parametrize("batch", [1, 3])
def test_errors_that_refuse_to_be_looked_at(pair: list[int], batch: int) -> None:
    def act(kind: Any) -> Any:
        raise kind("x")

    values = pmap(act, [NoCause, Touchy, ValueError], pool=WorkerPool(pair), batch_size=batch, on_error=ident)
    assert [type(value) for value in values] == [NoCause, RemoteException, ValueError]
    assert "Touchy: x" in str(values[1])
    for kind in (NoCause, Touchy):
        with pytest.raises(RemoteException, match=f"{kind.__name__}: x"):
            remotecall_fetch(act, pair[0], kind)
        here = pmap(act, [kind] * 3, pool=WorkerPool([1]), batch_size=batch, on_error=ident)
        assert [type(value) for value in here] == [kind] * 3
    assert set(pair) <= set(distpool.workers()), "nobody died of it"


def test_a_function_that_cannot_be_loaded_fails_all(pair: list[int]) -> None:
    def function(_: int, trap: Any = Trap()) -> None:  # noqa: B008
        pass

    for pool in (CachingPool(pair), WorkerPool(pair)):
        assert pmap(function, range(4), pool=pool, batch_size=2, on_error=name) == ["ValueError"] * 4
    assert pmap(ident, range(4), pool=WorkerPool(pair), batch_size=2) == list(range(4))


# -- deaths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 3, 7])
def test_a_death_costs_what_ran_and_nothing_else(pair: list[int], tmp_path: Path, place: int) -> None:
    counted = Counted(tmp_path)

    def act(i: int) -> int:
        counted.note(i)
        if i == place:
            os._exit(3)
        return i * i

    errors: list[Any] = []
    values = pmap(act, range(8), pool=WorkerPool(pair), batch_size=8, on_error=lambda error: errors.append(error))
    assert values == [i * i if i != place else None for i in range(8)]
    assert counted.times(8) == [1] * 8
    (error,) = errors
    assert type(error) is ProcessExitedException and error.exitcode == 3 and error.maybe_ran


def test_a_death_and_retries(pair: list[int], tmp_path: Path) -> None:
    counted = Counted(tmp_path)

    def act(i: int) -> int:
        counted.note(i)
        if i == 2 and (counted.folder / "2").stat().st_size == 1:
            os._exit(3)
        return i

    assert pmap(act, range(8), pool=CachingPool(pair), batch_size=4, retry_delays=[0]) == list(range(8))
    assert counted.times(8) == [1, 1, 2, 1, 1, 1, 1, 1]


def test_large_results_and_references_outlive_their_worker(pair: list[int], tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    counted = Counted(tmp_path)
    channel = RemoteChannel(lambda: Channel(10))

    def act(i: int) -> Any:
        counted.note(i)
        if i == 39:
            os._exit(3)
        if i == 0:
            return channel
        if i == 1:
            return np.full(200_000, 7)
        if i == 2:
            return ["x" * 300_000]
        if i == 3:
            channel.put("from 3")
            raise KeyError(channel)
        return [str(i) * 2000]  # many of these fill the board

    values = pmap(act, range(40), pool=CachingPool(pair), batch_size=40, on_error=ident)
    assert values[0] == channel and int(values[1].sum()) == 1_400_000 and values[2] == ["x" * 300_000]
    assert type(values[3]) is KeyError and values[3].args == (channel,)
    assert values[4:39] == [[str(i) * 2000] for i in range(4, 39)]
    assert type(values[39]) is ProcessExitedException and counted.times(40) == [1] * 40
    assert channel.take(timeout=10) == "from 3"


def test_nobody_is_left(pair: list[int]) -> None:
    def act(i: int) -> int:
        if i % 2:
            os._exit(3)
        return i

    values = pmap(act, range(6), pool=WorkerPool(pair[:1]), batch_size=6, on_error=name)
    assert values == [0, "ProcessExitedException", *["RuntimeError"] * 4]


def test_a_function_that_kills_whoever_loads_it_gets_them_one_by_one(pair: list[int]) -> None:
    class Deadly:
        def __reduce__(self) -> Any:
            return os._exit, (3,)

    deadly = Deadly()
    values = pmap(lambda i: deadly, range(6), pool=WorkerPool(pair), batch_size=6, on_error=name)
    assert values == [*["ProcessExitedException"] * 2, *["RuntimeError"] * 4]


def test_an_element_that_kills_whoever_loads_it(pair: list[int]) -> None:
    class Deadly:
        def __reduce__(self) -> Any:
            return os._exit, (3,)

    assert pmap(ident, [0, 1, Deadly(), 3], pool=WorkerPool(pair), batch_size=4, on_error=name) == [
        *(0, 1, "ProcessExitedException", 3)
    ]


def test_a_map_of_a_worker(tmp_path: Path) -> None:
    """There, the link to the worker that dies is lost before pid 1 has said that it is dead."""
    asker, *others = addprocs(3)
    counted = Counted(tmp_path)

    def act(i: int) -> int:
        counted.note(i)
        if i == 2:
            os._exit(3)
        return i

    def there() -> list[Any]:
        return pmap(act, range(6), pool=WorkerPool(others), batch_size=6, on_error=repr)

    values = remotecall_fetch(there, asker)
    assert values == [0, 1, f"ProcessExitedException({others[0]}, 3, True, '', '')", 3, 4, 5]
    assert counted.times(6) == [1] * 6
    rmprocs(asker, *others).result()


def test_what_may_still_be_running_does_not_run_again() -> None:
    """The link is lost, and nobody says that the process is."""
    node = nodes.current()
    batch = Batch(node, 77, True, [1, 2, 3])
    batch.message(ident)
    assert batch.lost(ProcessExitedException(77), False) == []
    assert [open_outcome(end)[1] is not None for end in batch.ends if end is not None] == [True] * 3


class Elsewhere:
    """This process's node, as if it were a worker's."""

    is_master = False

    def __init__(self) -> None:
        node = nodes.current()
        self.loop, self.deliver = node.loop, node.deliver
        self.peers = SimpleNamespace(dead={}, on_lost=[])


def test_news_of_a_process_whose_link_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    node: Any = Elsewhere()
    told: queue.SimpleQueue[bool] = queue.SimpleQueue()
    when_known(node, 5, told.put)
    until(lambda: node.peers.on_lost, "it waits for news")
    node.peers.on_lost[0](6)
    node.peers.dead[5] = OSError
    node.peers.on_lost[0](5)
    assert told.get(timeout=30) is True and not node.peers.on_lost
    when_known(node, 5, told.put)
    assert told.get(timeout=30) is True, "it was known"
    monkeypatch.setattr(batches, "_NEWS", 0.01)
    when_known(node, 7, told.put)
    assert told.get(timeout=30) is False and not node.peers.on_lost
    assert told.empty()


def test_what_was_not_sent_leaves_nothing_behind() -> None:
    (pid,) = addprocs(1)
    node = nodes.current()
    channel = RemoteChannel(lambda: Channel(1))
    before, reference = len(node.peers.requests), distpool.remoteref_id(channel)
    batch = Batch(node, pid, True, [channel, 2])
    batch.message(ident)
    assert distpool.debug.refs()[reference] == {1, pid} and not boards(node)._free[pid]
    batch.withdraw()
    assert len(node.peers.requests) == before and len(boards(node)._free[pid]) == 1
    assert distpool.debug.refs()[reference] == {1}
    rmprocs(pid).result()


# -- boards ----------------------------------------------------------------------------------------------------------


def test_boards_are_used_again_and_go_with_their_worker() -> None:
    pids = addprocs(1)
    table = boards(nodes.current())
    for _ in range(3):
        assert pmap(ident, range(10), pool=WorkerPool(pids), batch_size=5) == list(range(10))
    (board,) = table._free[pids[0]]
    assert board.next == 31 and board.journal.started == 30

    def mapped() -> int:
        return len(boards(nodes.current())._mapped)

    assert remotecall_fetch(mapped, pids[0]) == 1
    rmprocs(*pids).result()
    until(lambda: pids[0] not in table._free, "it is dropped")
    with pytest.raises(ValueError):
        board.journal.started  # noqa: B018


def test_there_is_no_memory_for_a_board(monkeypatch: pytest.MonkeyPatch) -> None:
    pids = addprocs(1)

    def full(*args: Any, **kwargs: Any) -> Journal:
        raise OSError("no room")

    monkeypatch.setattr(Journal, "create", full)
    assert pmap(ident, range(10), pool=WorkerPool(pids), batch_size=5) == list(range(10))
    rmprocs(*pids).result()


def test_a_board_that_comes_back_when_its_worker_has_died() -> None:
    (pid,) = addprocs(1)
    table = Boards(nodes.current())
    board = table.take(pid)
    assert board is not None
    rmprocs(pid).result()
    until(lambda: pid in nodes.current().peers.dead, "it is gone")
    table.put(pid, board, True, False)
    assert pid not in table._free and table.take(pid) is None
    nodes.current().peers.on_lost.remove(table._on_lost)


# -- to oneself ------------------------------------------------------------------------------------------------------


def test_a_batch_of_this_process_stays_as_it_is() -> None:
    node = nodes.current()
    value = threading.Lock()

    def act(number: int) -> Any:
        return value if number else 1 // number

    batch = Batch(node, node.pid, True, [1, 0])
    batch.answered(run_batch(*batch.message(act)))
    good, bad = batch.ends
    assert isinstance(good, Outcome) and good.status == LOCAL_VALUE and good.data is value
    assert isinstance(bad, Outcome) and bad.status == RAISED_HERE and "in act" in str(bad.data.__cause__)


def test_a_batch_of_several_iterables() -> None:
    assert [value for _, _, value in run_batch(pow, False, [(2, 3), (3, 2)], nodes.current().pid)] == [8, 9]
