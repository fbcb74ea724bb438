"""`spawn` and its kin, and `sync` blocks, in a process that is alone; with workers: `conformance/test_spawn.py`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from distpool import distributed, fetch
from distpool.errors import CompositeException, RemoteException
from distpool.node import node as nodes
from distpool.spawning import fetch_any, fetchfrom, spawn, spawnat, sync

PATIENCE = 30.0


def fail(number: int) -> None:
    raise ValueError(number)


def numbers(error: CompositeException) -> list[int]:
    """What the failed calls were called with."""
    return [part.captured.ex.args[0] for part in error.exceptions]  # type: ignore[attr-defined]


def test_all_four_pass_arguments_on() -> None:
    assert fetch(spawn(int, "11", base=2)) == 3
    assert fetch(spawnat(1, int, "11", base=2)) == 3
    assert fetchfrom(1, int, "11", base=2) == 3 == fetch_any(int, "11", base=2)


def test_errors_are_remote_ones_also_here() -> None:
    for call in (lambda: fetch(spawn(fail, 3)), lambda: fetchfrom(1, fail, 3), lambda: fetch_any(fail, 3)):
        with pytest.raises(RemoteException) as info:
            call()
        assert info.value.pid == 1 and info.value.captured.ex.args == (3,)


@pytest.mark.parametrize("call", [spawnat, fetchfrom])
def test_unknown_pids_are_refused_at_once(call: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="987654"):
        call(987654, abs, 1)


# -- blocks --------------------------------------------------------------------------------------------------------


def test_the_end_of_a_block_waits() -> None:
    gate, ended = threading.Event(), threading.Event()

    def hold() -> None:
        assert gate.wait(PATIENCE)
        ended.set()

    with sync():
        future = spawn(hold)
        assert not future.done()
        gate.set()
    assert ended.is_set() and future.done()


def test_errors_come_in_the_order_of_starting() -> None:
    gate = threading.Event()

    def late() -> None:
        assert gate.wait(PATIENCE)
        fail(1)

    with pytest.raises(CompositeException) as info:
        with sync():
            spawn(late)
            fetch_any(gate.set)
            spawn(abs, -1)
            spawn(fail, 2)
            distributed(fail, [3])
    assert numbers(info.value) == [1, 2, 3], "those of loops stand for themselves"


def test_a_block_waits_for_its_own_calls_only() -> None:
    gate = threading.Event()
    with sync():
        outer = spawn(gate.wait, PATIENCE)
        with sync():
            inner = spawn(abs, -1)
        assert inner.done() and not outer.done()
        gate.set()
    assert outer.done()


@pytest.mark.parametrize("depth", [1, 2])
def test_empty_blocks_inside_do_not_take_the_place_of_the_outer_one(depth: int) -> None:
    with pytest.raises(CompositeException) as info:
        with sync():
            for _ in range(depth):
                with sync():
                    pass
            spawn(fail, 1)
    assert numbers(info.value) == [1]
    assert not nodes.current().collecting


def test_an_error_of_the_block_is_raised_at_once() -> None:
    gate = threading.Event()
    with pytest.raises(KeyError, match="mine"):
        with sync():
            future = spawn(gate.wait, PATIENCE)
            raise KeyError("mine")
    assert not future.done() and not nodes.current().collecting
    gate.set()
    future.wait(PATIENCE)


def test_other_threads_are_not_waited_for() -> None:
    gate = threading.Event()
    found: list[Any] = []
    with sync():
        thread = threading.Thread(target=lambda: found.append(spawn(gate.wait, PATIENCE)))
        thread.start()
        thread.join(PATIENCE)
    assert not found[0].done()
    gate.set()
    found[0].wait(PATIENCE)


def test_a_block_that_another_thread_closes_is_over_here() -> None:
    """A generator with a block in it, dropped elsewhere."""

    def steps() -> Iterator[None]:
        with sync():
            yield

    generator = steps()
    next(generator)
    thread = threading.Thread(target=generator.close)
    thread.start()
    thread.join(PATIENCE)
    assert not nodes.current().collecting


def test_calls_behind_a_block_are_nobodys() -> None:
    with sync():
        pass
    future = spawn(fail, 1)
    with sync():
        spawn(abs, -1)
    with pytest.raises(RemoteException):
        future.wait(PATIENCE)
