"""How futures travel: one object for each reference and process, values that go along, counts, dead handles.

The processes are played (`fakes.Cluster`); over real links: `conformance/test_futures.py`.
"""

from __future__ import annotations

import gc
import multiprocessing
import pickle
import socket
import sys
import threading
from typing import Any

import pytest
from fakes import Big, Cluster

from distpool.errors import RemoteException, SerializationError
from distpool.refs.refs import Future
from distpool.refs.remote import RemoteFuture
from distpool.refs.travel import _can_be_pickled, dead_future, new_future


@pytest.mark.parametrize("wrong", [True, 2.0, "2", [2]])
def test_a_pid_is_an_int(cluster: Cluster, wrong: Any) -> None:
    with pytest.raises(TypeError, match="a pid is an int"):
        new_future(wrong)


def test_one_object_for_each_reference(cluster: Cluster) -> None:
    future = new_future(2)
    there = cluster.pass_on(future, 1, 2)
    assert cluster.pass_on(future, 1, 2) is there and there == future and hash(there) == hash(future)
    assert cluster.pass_on(there, 2, 1) is future


def test_with_its_value_it_needs_no_owner(cluster: Cluster) -> None:
    future = new_future(2)
    waiting = cluster.pass_on(future, 1, 3)
    future.put(Big(7))
    got = cluster.pass_on(future, 1, 3)
    assert got is waiting and got.done()
    cluster.lose(2)
    with cluster.on(3):
        assert got.fetch() == Big(7)


def test_a_value_that_comes_with_a_reference_is_here_although_its_end_was_known(cluster: Cluster) -> None:
    """It was dropped, and the owner told that nobody here needs it: the next fetch waited for ever."""
    future = new_future(2)
    with cluster.on(2):
        cluster.pass_on(future, 1, 2).put(Big(7))
    third = cluster.pass_on(future.wait(5), 1, 3)
    with cluster.on(3):
        assert third.fetch() == Big(7)
    assert cluster.pass_on(third, 3, 1) is future
    assert cluster.table(2) == {}
    assert future.fetch(5) == Big(7)


def test_a_plain_future_becomes_a_reference_when_it_is_sent(cluster: Cluster) -> None:
    future: Future[Any] = Future()
    there = cluster.pass_on(future, 1, 2)
    assert type(there) is RemoteFuture and there.where == 1
    future.set_result(Big(3))
    with cluster.on(2):
        assert there.fetch() == Big(3)


def test_counts_end_with_the_objects(cluster: Cluster) -> None:
    future = new_future(3)
    there = cluster.pass_on(future, 1, 2)
    assert list(cluster.table(3).values()) == [{1, 2}]
    del there
    gc.collect()
    assert list(cluster.table(3).values()) == [{1}]
    del future
    gc.collect()
    assert cluster.table(3) == {}


def test_finalized_is_finalized(cluster: Cluster) -> None:
    future = new_future(2)
    assert not future.isready()
    future.finalize()
    future.finalize()
    assert cluster.table(2) == {}
    for use in (future.fetch, future.wait, future.isready, lambda: future.put(1)):
        with pytest.raises(RuntimeError, match="finalized"):
            use()
    with pytest.raises(SerializationError, match="finalized"):
        cluster.pass_on(future, 1, 2)


def test_who_waits_hears_that_it_was_finalized(cluster: Cluster) -> None:
    """The owner's notice finds nobody: the wait never ended, and the callbacks were kept for ever."""
    future = new_future(2)
    there = cluster.pass_on(future, 1, 2)
    told: list[bool] = []
    future.add_done_callback(lambda done: told.append(done is future))
    future.finalize()
    cluster.run()
    assert told == [True] and not cluster.processes[1].refs.kept
    with cluster.on(2):
        there.put(1)
    with pytest.raises(RuntimeError, match="finalized"):
        future.wait()


def test_a_dead_handle(cluster: Cluster) -> None:
    for dead in (dead_future(), pickle.loads(pickle.dumps(new_future(2)))):
        assert (dead.where, dead.whence, dead.id) == (0, 0, 0) and dead != dead_future() and dead == dead
        for use in (dead.fetch, dead.wait, dead.isready, dead.cancel, lambda dead=dead: dead.put(1)):
            with pytest.raises(RuntimeError, match="dead handle"):
                use()
        again = cluster.pass_on(dead, 1, 2)
        assert (again.where, again.id) == (0, 0)
        dead.finalize()


@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize("by_hand", [True, False])
def test_a_value_that_cannot_be_sent_does_not_hold_back_its_reference(
    cluster: Cluster, by_hand: bool, read: bool
) -> None:
    """Owned by the sender it could not be sent at all, while others of its kind could."""
    lock = threading.Lock()
    future: Any = Future() if by_hand else new_future(1)
    future.put(lock)
    if read:
        assert future.fetch(5) is lock
    for _ in range(2):
        there = cluster.pass_on(future, 1, 2)
        with cluster.on(2), pytest.raises(RemoteException) as info:
            there.fetch(5)
        assert isinstance(info.value.captured.ex, SerializationError)
    assert future.fetch(5) is lock
    back = cluster.pass_on(there, 2, 1)
    assert back is future and back.fetch(5) is lock


def test_a_value_that_leads_to_its_own_future(cluster: Cluster) -> None:
    first, second = new_future(1), new_future(1)
    first.put([second])
    second.put([first])
    there = cluster.pass_on(first, 1, 2)
    with cluster.on(2):
        other = there.fetch(5)[0]
        assert other.fetch(5)[0] is there


def test_what_can_be_sent_is_tried_once(cluster: Cluster) -> None:
    class Counted:
        pickled = 0

        def __reduce__(self) -> Any:
            Counted.pickled += 1
            return int, ()

    future = new_future(1).put(Counted())
    for number in range(3):
        there = cluster.pass_on(future, 1, 2)
        assert there.done() and Counted.pickled == number + 2


def test_the_trial_lends_no_end_of_a_pipe_and_no_socket(cluster: Cluster) -> None:
    """Nobody would fetch that one, and who waits for the end of the pipe would wait for ever."""
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs, socket.socket() as sock:
        assert (
            _can_be_pickled([ours], 2) and _can_be_pickled(sock, 2) and not _can_be_pickled([ours, threading.Lock()], 2)
        )
        sharer = sys.modules.get("multiprocessing.resource_sharer")
        assert sharer is None or not sharer._resource_sharer._cache  # type: ignore[attr-defined]
