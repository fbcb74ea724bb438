"""Counts of references: lent before the message, given back by finalizers that only note. Processes are played."""

from __future__ import annotations

import gc as collector
import sys
import threading
from typing import Any

import pytest
from fakes import Cluster

from distpool.refs import gc
from distpool.refs.gc import Handle, Loan, Reference
from distpool.refs.owner import RRID
from distpool.refs.refs import Future
from distpool.refs.remote import RemoteFuture
from distpool.refs.travel import new_future
from distpool.wire import codec
from distpool.wire.frames import Kind


def test_there_is_one_for_each_node_and_identities_are_its_own(cluster: Cluster) -> None:
    one, other = cluster.processes[1], cluster.processes[2]
    assert gc.of(one) is one.refs is not other.refs  # type: ignore[arg-type]
    numbers = [one.refs.new_id(), one.refs.new_id(), other.refs.new_id()]
    assert len(set(numbers)) == 3 and [rrid.whence for rrid in numbers] == [1, 1, 2]


def test_who_was_dead_before_it_was_made_holds_nothing(cluster: Cluster) -> None:
    one = cluster.processes[1]
    one.dead[2] = OSError
    one.refs = None
    gc.of(one).owner.change(RRID(1, 1), 2, 1)  # type: ignore[arg-type]
    assert one.refs.owner.table() == {}


# -- handles -------------------------------------------------------------------------------------------------------


def test_a_finalizer_only_notes(cluster: Cluster) -> None:
    """It may run between any two bytecodes, on any thread, with any lock held."""
    one = cluster.processes[1]
    with one.refs._lock, one.refs.owner._lock:
        thread = threading.Thread(target=lambda: Handle(one.refs, RRID(1, 1), 2, 1))
        thread.start()
        thread.join(30)
        assert not thread.is_alive()
    assert one.sent == [] and len(one.loop.soon) == 1
    cluster.run()
    assert one.sent == [(2, Kind.CLIENTS)]


def test_what_is_given_back_goes_in_one_frame_for_each_owner(cluster: Cluster) -> None:
    one = cluster.processes[1]
    for number in range(5):
        Handle(one.refs, RRID(1, number), 2 + number % 2, 1)
    assert len(one.loop.soon) == 1
    cluster.run()
    assert sorted(one.sent) == [(2, Kind.CLIENTS), (3, Kind.CLIENTS)]
    Handle(one.refs, RRID(1, 9), 2, 1)
    cluster.run()
    assert len(one.sent) == 3


def test_a_handle_that_holds_nothing_gives_nothing_back(cluster: Cluster) -> None:
    one = cluster.processes[1]
    handle = Handle(one.refs, RRID(1, 1), 2, 1)
    empty = handle.empty()
    assert (empty.rrid, empty.where, empty.held) == (RRID(1, 1), 2, 0)
    del empty
    assert not one.loop.soon
    del handle
    assert one.loop.soon


def test_what_was_put_ahead_comes_before_the_news(cluster: Cluster) -> None:
    one = cluster.processes[1]
    retired: list[RRID] = []

    class Ahead:
        def retire(self, rrid: RRID) -> None:
            assert one.sent == []
            retired.append(rrid)

    one.ahead = Ahead()  # type: ignore[assignment]
    Handle(one.refs, RRID(1, 1), 2, 1)
    Handle(one.refs, RRID(1, 2), 1, 1)  # its own: nothing was put ahead there
    one.loop.run()
    assert retired == [RRID(1, 1)] and one.sent == [(2, Kind.CLIENTS)]


# -- identities ----------------------------------------------------------------------------------------------------


class Some(Reference):
    def __init__(self, handle: Handle | None) -> None:
        self._handle = handle


def test_references_are_equal_by_identity(cluster: Cluster) -> None:
    refs = cluster.processes[1].refs
    one, same, other = (Some(Handle(refs, RRID(1, number), 2, 0)) for number in (1, 1, 2))
    assert one == same and hash(one) == hash(same) and one != other and one != 5
    dead, also = Some(None), Some(None)
    assert dead == dead and dead != also
    assert (dead.where, dead.whence, dead.id) == (0, 0, 0) and (one.where, one.whence, one.id) == (2, 1, 1)


def test_uses_that_are_refused(cluster: Cluster) -> None:
    with pytest.raises(RuntimeError, match="dead handle"):
        Some(None)._live()
    gone = Some(None)
    gone.finalize()
    gone.finalize()
    with pytest.raises(RuntimeError, match="finalized"):
        gone._live()


def test_finalizing_an_old_object_leaves_a_new_one_of_the_same_reference(cluster: Cluster) -> None:
    refs = cluster.processes[1].refs
    old = new_future(2)
    rrid = RRID(old.whence, old.id)
    new = Some(Handle(refs, rrid, 2, 0))
    refs.live[rrid] = new
    old.finalize()
    assert refs.live[rrid] is new


# -- lending -------------------------------------------------------------------------------------------------------


def test_the_receiver_is_counted_before_the_message_goes(cluster: Cluster) -> None:
    mine, theirs = new_future(1), new_future(2)
    seen: list[Any] = []
    codec.encode([mine, theirs, mine], 3, seen)
    assert all(type(each) is Loan for each in seen)
    cluster.processes[1].refs.lend(seen, 3)
    assert cluster.table(1)[RRID(1, mine.id)] == {1, 3}
    assert cluster.table(2)[RRID(1, theirs.id)] == {1, 3}
    cluster.processes[1].refs.lend(seen, 3, -1)  # they did not go after all
    assert cluster.table(1)[RRID(1, mine.id)] == {1} and cluster.table(2)[RRID(1, theirs.id)] == {1}


def test_an_interrupt_behind_the_message_leaves_no_signal_deferred(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []

    class Guard:
        def enter(self, wake: object) -> str:
            return "a call of the user's"

        def leave(self, inside: object) -> None:
            steps.append("interrupted")
            raise KeyboardInterrupt

    one = cluster.processes[1]
    monkeypatch.setattr(one.loop, "guard", Guard(), raising=False)
    monkeypatch.setattr(one.loop, "enter_critical", lambda: steps.append("deferred") or True, raising=False)
    monkeypatch.setattr(one.loop, "leave_critical", lambda: steps.append("not any more"), raising=False)
    with pytest.raises(KeyboardInterrupt), one.refs.lending([], 2):
        steps.append("message")
    assert steps == ["deferred", "message", "not any more", "interrupted"]


def test_what_took_its_value_along_is_not_lent(cluster: Cluster) -> None:
    future = new_future(2)
    future.put(1)
    seen: list[Any] = []
    codec.encode(future, 3, seen)
    cluster.run()
    before = list(cluster.processes[1].sent)
    cluster.processes[1].refs.lend(seen, 3)
    assert cluster.processes[1].sent == before


def test_a_loan_keeps_the_value_until_its_receiver_is_counted(cluster: Cluster) -> None:
    """The object may fetch, and need its owner no more, while the message waits in a queue."""
    future = new_future(2)
    there = cluster.pass_on(future, 1, 2)
    seen: list[Any] = []
    codec.encode(future, 3, seen)
    with cluster.on(2):
        there.put("value")
    del there
    assert future.fetch() == "value"
    collector.collect()
    assert cluster.table(2) == {RRID(1, future.id): {1}}
    cluster.processes[1].refs.lend(seen, 3)
    del seen
    collector.collect()
    assert cluster.table(2) == {RRID(1, future.id): {3}}


# -- futures of this process ---------------------------------------------------------------------------------------


def test_a_future_is_adopted_once(cluster: Cluster) -> None:
    refs = cluster.processes[1].refs
    future: Future[Any] = Future()
    handles: list[Handle] = []
    threads = [threading.Thread(target=lambda: handles.append(refs.adopt(future))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(set(map(id, handles))) == 1 and cluster.table(1) == {handles[0].rrid: {1}}


@pytest.mark.parametrize("before", [True, False])
def test_its_outcome_is_the_owners(cluster: Cluster, before: bool) -> None:
    refs = cluster.processes[1].refs
    future: Future[Any] = Future()
    if before:
        future.set_result([1])
    entry = refs.owner.get(refs.adopt(future).rrid)
    if not before:
        future.set_result([1])
    assert entry.outcome is not None and entry.outcome.data == [1]


def test_a_cancelled_one_is_an_error(cluster: Cluster) -> None:
    refs = cluster.processes[1].refs
    future: Future[Any] = Future()
    entry = refs.owner.get(refs.adopt(future).rrid)
    assert future.cancel()
    assert type(entry.outcome.data).__name__ == "CancelledError"


# -- values that nobody opens --------------------------------------------------------------------------------------


def test_references_in_an_unread_value_are_given_back(cluster: Cluster) -> None:
    future = new_future(1)
    seen: list[Any] = []
    data, buffers = codec.encode([future], 2, seen)
    cluster.processes[1].refs.lend(seen, 2)
    assert cluster.table(1)[RRID(1, future.id)] == {1, 2}
    with cluster.on(2) as process:
        process.refs.unread(0, data, buffers)
    collector.collect()
    cluster.run()
    collector.collect()
    assert cluster.table(1)[RRID(1, future.id)] == {1}


def test_an_unread_value_that_cannot_be_read_harms_nobody(cluster: Cluster) -> None:
    with cluster.on(2) as process:
        process.refs.unread(0, b"no pickle", [])
        process.refs.unread(0, b"", [])
    cluster.run()
    assert not process.refs._unread


# -- deaths --------------------------------------------------------------------------------------------------------


def test_a_lost_process_holds_nothing_and_owns_nothing(cluster: Cluster) -> None:
    mine, theirs = new_future(1), new_future(2)
    there = cluster.pass_on(mine, 1, 2)
    cluster.pass_on(theirs, 1, 3)
    assert cluster.table(1)[RRID(1, mine.id)] == {1, 2} and there is not None
    cluster.lose(2)
    assert cluster.table(1) == {RRID(1, mine.id): {1}}
    assert theirs.done() and not mine.done()


def test_a_future_made_by_hand_can_be_set_by_whom_it_is_sent_to(cluster: Cluster) -> None:
    """Its own process was not told: it waited for ever."""
    future: Future[Any] = Future()
    told: list[Any] = []
    future.add_done_callback(lambda done: told.append(done.result(0)))
    there = cluster.pass_on(future, 1, 2)
    with cluster.on(2):
        there.put([1])
        with pytest.raises(RuntimeError, match="only once"):
            there.put([2])
    cluster.run()
    assert future.result(5) == [1] and told == [[1]]
    with pytest.raises(RuntimeError, match="only once"):
        future.put([3])


def test_it_is_not_kept_for_that(cluster: Cluster) -> None:
    future: Future[Any] = Future()
    there = cluster.pass_on(future, 1, 2)
    collector.disable()
    try:
        del future
        assert list(cluster.table(1).values()) == [{2}], "dropping it is enough"
    finally:
        collector.enable()
    with cluster.on(2):
        there.put(1)
    del there
    collector.collect()
    assert cluster.table(1) == {}


def test_a_process_is_lost_while_other_threads_make_references(cluster: Cluster) -> None:
    """To look at each was many steps: it ended with an error, and what else had to hear of the death did not."""
    one = cluster.processes[1]
    held = [new_future(2) for _ in range(3000)]
    over = threading.Event()

    def make() -> None:
        while not over.is_set():
            [RemoteFuture.make(one.refs, one.refs.new_id(), 3, 0) for _ in range(100)]

    thread = threading.Thread(target=make)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        thread.start()
        cluster.lose(2)
    finally:
        sys.setswitchinterval(interval)
        over.set()
        thread.join(30)
    assert all(future.done() for future in held)


def test_an_interrupted_finalizer_stops_no_later_one(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was given back any more: a flush was said to be on its way."""
    one = cluster.processes[1]

    def interrupted(callback: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(one.loop, "call_soon", interrupted)
        with pytest.raises(KeyboardInterrupt):
            one.refs.drop(RRID(1, 1), 2, 1)
    one.refs.drop(RRID(1, 2), 2, 1)
    cluster.run()
    assert one.sent == [(2, Kind.CLIENTS)]
