"""CONFORMANCE 2.1 (C3), 2.7 (C111) and 2.11: distributed loops and splitrange."""

from __future__ import annotations

import concurrent.futures
import gc
import io
import operator
import random
import sys
from collections.abc import Sequence
from typing import Any

import pytest

import distpool
from distpool import CompositeException, RemoteException, distributed, myid, remotecall_fetch, splitrange

from .conftest import wait_until

pytestmark = pytest.mark.time_limit(90)


def fail_at(limit: int) -> Any:
    def body(i: int) -> int:
        if i >= limit:
            raise RuntimeError(i)
        return i

    return body


def test_C003_alone() -> None:
    assert distpool.nworkers() == 1, "this test comes first in its module"
    assert distributed(lambda i: 1, range(1, 101), operator.add) == 100
    assert distributed(lambda i: [myid()], range(3), operator.add) == [1, 1, 1]
    seen: list[int] = []
    assert distributed(seen.append, range(3)).result() is None
    assert seen == [0, 1, 2]
    with pytest.raises(RemoteException) as info:
        distributed(fail_at(0), range(3), operator.add)
    assert info.value.pid == 1


@pytest.mark.parametrize(
    ("first", "last", "n", "expected"),
    [
        (1, 11, 1, [(1, 11)]), (1, 11, 2, [(1, 6), (7, 11)]), (1, 11, 3, [(1, 4), (5, 8), (9, 11)]),
        (1, 3, 3, [(1, 1), (2, 2), (3, 3)]), (1, 3, 4, [(1, 1), (2, 2), (3, 3)]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("shift", [0, -1, -2])
def test_C167_splitrange(first: int, last: int, n: int, expected: list[tuple[int, int]], shift: int) -> None:
    wanted = [range(begin + shift, end + shift + 1) for begin, end in expected]
    assert splitrange(first + shift, last + shift, n) == wanted


def test_C167_splitrange_properties() -> None:
    for length in range(40):
        for n in range(1, 12):
            parts = splitrange(5, 4 + length, n)
            assert [i for part in parts for i in part] == list(range(5, 5 + length))
            assert all(parts)
            assert len(parts) == min(n, length)
            sizes = [len(part) for part in parts]
            assert sizes == sorted(sizes, reverse=True)
            assert not sizes or max(sizes) - min(sizes) <= 1
    for n in (0, -1):
        with pytest.raises(ValueError, match="number of parts"):
            splitrange(1, 2, n)
    with pytest.raises(TypeError):
        splitrange(1.5, 2, 1)  # type: ignore[arg-type]


def test_C169_fewer_iterations_than_workers(team: list[int]) -> None:
    assert distributed(lambda i: i, range(1, 3), operator.add) == 3
    assert distributed(lambda i: [i, myid()], [7], operator.add) == [7, team[0]]


class OneBased(Sequence[int]):
    """Knows indices only; counts how often it is asked for its length."""

    asked = 0

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        OneBased.asked += 1
        return self.n

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self.n:
            raise IndexError(index)
        return index + 1


def test_C170_C172_any_sequence(team: list[int]) -> None:
    import numpy as np

    add = operator.add
    assert distributed(lambda i: i, range(1, 11), add) == 55
    assert distributed(lambda i: i, range(10, 0, -1), add) == 55
    assert distributed(lambda i: int(i), np.arange(1, 11, dtype=np.int8), add) == 55
    assert distributed(lambda i: i, tuple(range(1, 11)), add) == 55
    assert distributed(str.upper, "hello", add) == "HELLO"
    sequence = OneBased(10)
    assert distributed(lambda i: i, sequence, add) == 55
    assert distributed(lambda i: i, range(np.int64(1), np.int64(11)), add) == 55  # type: ignore[arg-type]
    calls: list[int] = []
    assert distributed(lambda i: i, [calls.append(1) or 5 for _ in range(3)], add) == 15  # type: ignore[func-returns-value]
    assert calls == [1, 1, 1]


def test_C171_in_order_with_captured_variables(team: list[int]) -> None:
    base = 100
    assert distributed(lambda i: [i + base], range(1, 3), operator.add) == [101, 102]
    for length in (1, 3, 4, 5, 50):
        assert distributed(lambda i: [i + base], range(length), operator.add) == [i + base for i in range(length)]
    assert distributed(lambda i: (i,), range(10), lambda a, b: a + b) == tuple(range(10))


def test_C111_stateful_objects(team: list[int]) -> None:
    source = random.Random(5)
    for _ in range(2):
        state = source.getstate()
        expected = random.Random()
        expected.setstate(state)
        parts = distributed(lambda i: [source.random()], range(4), operator.add)
        assert parts == [expected.random()] * 4, "each part starts from the present state"
        assert source.getstate() == state
        source.random()


def test_C173_without_reducer(team: list[int]) -> None:
    gate = distpool.RemoteChannel(lambda: distpool.Channel(10))
    done = distpool.RemoteChannel(lambda: distpool.Channel(100))

    def body(i: int) -> None:
        if i == 0:
            gate.fetch()
        done.put((i, myid()))

    loop = distributed(body, range(20))
    assert not loop.done()
    assert not loop.cancel()
    with pytest.raises(TimeoutError):
        loop.result(0.01)
    gate.put(1)
    assert distpool.wait(loop, timeout=20) is loop
    assert loop.result() is None
    assert distpool.fetch(loop) is None
    taken = sorted(done.take(timeout=10) for _ in range(20))
    assert taken == [(i, team[i // 5]) for i in range(20)]
    assert concurrent.futures.wait([distributed(abs, [1])], 20).not_done == set()


def test_C173_errors_of_the_handle(team: list[int]) -> None:
    loop = distributed(fail_at(10), range(20))
    for ask in (loop.result, loop.wait, loop.fetch):
        with pytest.raises(CompositeException) as info:
            ask(20)
        errors = [error for error in info.value.exceptions if isinstance(error, RemoteException)]
        assert [error.captured.ex.args[0] for error in errors] == [10, 15]
        assert [error.pid for error in errors] == [team[2], team[3]]
    assert isinstance(loop.exception(), CompositeException)


def test_C173_an_error_that_nobody_asks_for_is_printed(team: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    loop = distributed(fail_at(3), range(4))
    assert concurrent.futures.wait([loop], 20).done
    del loop
    gc.collect()
    wait_until(lambda: "RuntimeError: 3" in written.getvalue())  # by whichever thread drops it last
    assert "CompositeException" in written.getvalue()
    loop = distributed(fail_at(3), range(4))
    assert loop.exception(20) is not None
    before = written.getvalue()
    del loop
    gc.collect()
    assert written.getvalue() == before


def test_C173_a_dropped_handle_runs_on(team: list[int]) -> None:
    done = distpool.RemoteChannel(lambda: distpool.Channel(100))
    distributed(lambda i: done.put(i) and None, range(8))
    gc.collect()
    assert sorted(done.take(timeout=10) for _ in range(8)) == list(range(8))


def test_C175_errors_with_reducer(team: list[int]) -> None:
    with pytest.raises(RemoteException, match="RuntimeError") as info:
        distributed(fail_at(10), range(20), operator.add)
    assert info.value.captured.ex.args == (10,)
    with pytest.raises(RemoteException) as reducing:
        distributed(lambda i: i, range(8), lambda a, b: a + b + None)
    assert isinstance(reducing.value.captured.ex, TypeError)


def test_C175_unpicklable_body(team: list[int]) -> None:
    import threading

    lock = threading.Lock()
    with pytest.raises(distpool.SerializationError):
        distributed(lambda i: lock and i, range(4), operator.add)
    with pytest.raises(CompositeException) as info:
        distributed(lambda i: lock and i, range(4)).result(20)
    assert all(isinstance(error, distpool.SerializationError) for error in info.value.exceptions)


def test_C176_empty(team: list[int]) -> None:
    assert distributed(fail_at(0), []).result(20) is None
    with pytest.raises(TypeError, match="empty"):
        distributed(fail_at(0), range(0), operator.add)
    assert distributed(fail_at(0), "", operator.add, initial=5) == 5
    assert distributed(lambda i: i, range(4), operator.add, initial=100) == 106
    assert distributed(lambda i: [i], range(6), operator.add, initial=["x"]) == ["x", 0, 1, 2, 3, 4, 5]
    assert distributed(lambda i: i, [None], lambda a, b: (a, b), initial=None) == (None, None)


def test_C177_C179_misuse(team: list[int]) -> None:
    ran: list[int] = []
    for bad in ((i for i in range(3)), iter([1]), {1, 2}, {1: 2}, 5, None):
        for reducer in (None, operator.add):
            with pytest.raises(TypeError):
                distributed(ran.append, bad, reducer)  # type: ignore[arg-type]
    for arguments in ((3, range(2)), (abs, range(2), 3)):
        with pytest.raises(TypeError):
            distributed(*arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        distributed(abs, range(2), initial=3)
    with pytest.raises(TypeError):
        distributed(abs)  # type: ignore[call-arg]
    assert ran == []


def test_C178_only_workers_compute(team: list[int]) -> None:
    collected: list[int] = []
    pids = distributed(lambda i: collected.append(i) or [myid()], range(8), operator.add)  # type: ignore[func-returns-value]
    assert pids == [pid for pid in team for _ in range(2)]
    assert collected == []
    there = remotecall_fetch(lambda: distributed(lambda i: [myid()], range(4), operator.add), team[1])
    assert there == team


def test_a_worker_dies_in_the_loop(team: list[int]) -> None:
    import os

    (victim,) = distpool.addprocs(1)

    def body(i: int) -> int:
        if myid() == victim:
            os._exit(2)
        return i

    with pytest.raises(distpool.ProcessExitedException):
        distributed(body, range(10), operator.add)
    (victim,) = distpool.addprocs(1)
    with pytest.raises(CompositeException) as info:
        distributed(body, range(10)).result(20)
    assert [error.worker_id for error in info.value.exceptions] == [victim]  # type: ignore[attr-defined]
    assert distributed(lambda i: i, range(10), operator.add) == 45


def test_the_handle_of_a_loop_may_be_sent(team: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    """It arrived as a dead handle. Its errors are then also those of whoever has it."""
    gate = distpool.RemoteChannel()

    def body(i: int) -> None:
        gate.fetch()
        fail_at(1)(i)

    good, bad = distributed(body, range(1)), distributed(body, range(2))
    asked = [distpool.remotecall(lambda loop: repr(loop.exception(30)), team[0], loop) for loop in (good, bad)]
    assert remotecall_fetch(lambda loop: loop.where, team[0], bad) == 1
    gate.put(None)
    assert good.result(30) is None
    found = [future.fetch(30) for future in asked]
    assert found[0] == "None" and "CompositeException" in found[1]
    del bad
    gc.collect()
    assert "RuntimeError" not in capsys.readouterr().err, "somebody else had it"
