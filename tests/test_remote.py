"""`RemoteFuture`: where the value is, when it moves, and what becomes of it in every process that knows it.

The processes are played (`fakes.Cluster`); over real links: `conformance/test_futures.py`.
"""

from __future__ import annotations

import concurrent.futures
import gc
import threading
from typing import Any

import pytest
from fakes import Big, Cluster

from distpool.errors import ProcessExitedException, RemoteException, SerializationError
from distpool.refs.owner import RRID
from distpool.refs.remote import RemoteFuture
from distpool.refs.travel import new_future
from distpool.wire.frames import Kind


class Unreadable:
    def __reduce__(self) -> Any:
        return fail, ()


def fail() -> None:
    raise KeyError("cannot be rebuilt")


class Unsendable:
    def __reduce__(self) -> Any:
        raise ValueError("not this one")


# -- made by hand --------------------------------------------------------------------------------------------------


def test_its_owner_does_not_know_it_until_it_is_used(cluster: Cluster) -> None:
    future = new_future(2)
    assert (future.where, future.whence) == (2, 1) and future.id > 0
    assert cluster.table(2) == {}
    assert future.isready() is False
    assert list(cluster.table(2).values()) == [{1}]


def test_unknown_owners_are_refused(cluster: Cluster) -> None:
    with pytest.raises(ValueError, match="987654"):
        new_future(987654)
    assert new_future(None).where == 1


@pytest.mark.parametrize("where", [1, 2])
def test_it_is_set_once(cluster: Cluster, where: int) -> None:
    future = new_future(where)
    assert future.put(Big(5)) is future
    assert future.done() and future.isready() and future.fetch() == Big(5) and future.wait() is future
    with pytest.raises(RuntimeError, match="only once"):
        future.put(6)


def test_the_second_of_two_processes_is_told(cluster: Cluster) -> None:
    future = new_future(3)
    other = cluster.pass_on(future, 1, 2)
    assert type(other) is RemoteFuture and (other.where, other.whence, other.id) == (3, 1, future.id)
    with cluster.on(2):
        other.put("first")
    with pytest.raises(RemoteException) as info:
        future.put("second")
    assert isinstance(info.value.captured.ex, RuntimeError)
    assert future.fetch() == "first"


def test_what_cannot_be_sent_sets_nothing(cluster: Cluster) -> None:
    future = new_future(2)
    with pytest.raises(SerializationError, match="not this one"):
        future.put(Unsendable())
    assert not future.isready()
    future.put(1)
    assert future.fetch() == 1


@pytest.mark.parametrize("where", [1, 2])
def test_as_the_standard_library_fills_futures(cluster: Cluster, where: int) -> None:
    """It reached nobody else: whoever held the reference elsewhere waited for ever."""
    future = new_future(where)
    there, third = cluster.pass_on(future, 1, 2), cluster.pass_on(future, 1, 3)
    future.set_result(Big(5))
    assert future.result(5) == Big(5)
    with cluster.on(2):
        assert there.fetch(5) == Big(5)
        with pytest.raises(concurrent.futures.InvalidStateError, match="only once"):
            there.set_exception(ValueError("late"))
    with cluster.on(3), pytest.raises(concurrent.futures.InvalidStateError, match="only once"):
        third.set_result(2)
    with pytest.raises(concurrent.futures.InvalidStateError, match="only once"):
        future.set_result(1)
    assert future.cancel() is False


@pytest.mark.parametrize("where", [1, 2, 3])
def test_an_error_that_was_set_is_an_error_everywhere(cluster: Cluster, where: int) -> None:
    future = new_future(where)
    there, third = cluster.pass_on(future, 1, 2), cluster.pass_on(future, 1, 3)
    future.set_exception(KeyError("set"))
    with pytest.raises(KeyError, match="set"):
        future.result(5)
    for pid, reference in ((2, there), (3, third)):
        with cluster.on(pid):
            error = reference.exception(5)
        found = error.captured.ex if isinstance(error, RemoteException) else error  # plain at its owner
        assert isinstance(found, KeyError) and found.args == ("set",)
        assert pid == where or isinstance(error, RemoteException)


@pytest.mark.parametrize("where", [1, 2])
def test_who_has_asked_knows_the_end(cluster: Cluster, where: int) -> None:
    """`done()` stayed False for ever, although `isready()` had said that the value was there."""
    future = new_future(where)
    there = cluster.pass_on(future, 1, 3)
    assert not future.isready() and not future.done()
    with cluster.on(3):
        there.put(1)
    cluster.run()
    assert future.done(), "whoever has asked is told"
    other = new_future(where)
    there = cluster.pass_on(other, 1, 3)
    with cluster.on(3):
        there.put(2)
    assert other.isready() and other.done() and other.fetch(5) == 2


def test_a_notice_that_is_quicker_than_the_answer_to_a_put(cluster: Cluster) -> None:
    """The value was given up at its owner and not kept here: `fetch` waited for ever."""
    future = new_future(2)
    assert not future.isready()
    future.put(Big(1))
    assert future.fetch(5) == Big(1) and cluster.table(2) == {}


def test_what_was_put_does_not_change_any_more(cluster: Cluster) -> None:
    """The putter kept its own object, and sent that on: each process had another value."""
    value = [0]
    future = new_future(2).put(value)
    value.append(1)
    assert future.done() and future.travels_with_value and future.wait(5) is future
    assert cluster.pass_on(future, 1, 3).fetch(5) == [0]
    assert future.fetch(5) == [0] and future.fetch(5) is future.fetch(5)
    own = new_future(1).put(value)
    assert own.fetch(5) is value, "a value of this process is shared"


def test_what_was_put_is_opened_once_and_only_if_wanted(cluster: Cluster) -> None:
    unread = new_future(2).put(Unreadable())
    assert unread.wait(5) is unread
    with pytest.raises(KeyError, match="cannot be rebuilt"):
        unread.fetch(5)
    there = cluster.pass_on(unread, 1, 3)
    with cluster.on(3), pytest.raises(KeyError, match="cannot be rebuilt"):
        there.fetch(5)


@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize("owner", [1, 2, 3])
def test_references_in_what_was_put_are_counted(cluster: Cluster, owner: int, read: bool) -> None:
    inner = new_future(owner)
    future = new_future(2).put([inner])
    cluster.run()
    name = RRID(inner.whence, inner.id)
    assert cluster.table(owner)[name] == {1, 2}
    if read:
        assert future.fetch(5) == [inner] and future.fetch(5)[0] is inner
    del inner
    cluster.run()
    assert 1 in cluster.table(owner)[name]
    del future
    cluster.run()
    assert name not in cluster.table(owner)


def test_having_asked_keeps_nothing(cluster: Cluster) -> None:
    for where in (1, 2):
        future = new_future(where)
        assert not future.isready()
        del future
        gc.collect()
        cluster.run()
        assert cluster.table(where) == {}


# -- waiting and fetching ------------------------------------------------------------------------------------------


def test_waiting_moves_no_value(cluster: Cluster) -> None:
    future = new_future(2)
    with pytest.raises(TimeoutError):
        future.wait(0)
    with cluster.on(2):
        cluster.pass_on(future, 1, 2).put(Big(1))
    assert future.wait(5) is future and future.done()
    assert Kind.NOTICE in cluster.processes[2].kinds()
    before = len(cluster.processes[1].sent)
    assert future.isready() and future.wait() is future
    assert len(cluster.processes[1].sent) == before, "it is known here"
    assert future.fetch() == Big(1)


def test_a_fetched_value_is_here_and_given_back_there(cluster: Cluster) -> None:
    future = new_future(2)
    cluster.pass_on(future, 1, 2).put(Big([1]))
    del cluster.processes[1].sent[:]
    first = future.fetch()
    assert first == Big([1]) and future.fetch() is first
    assert cluster.processes[1].kinds().count(Kind.REFERENCE) == 1
    gc.collect()
    assert all(1 not in held for held in cluster.table(2).values())


def test_time_limits(cluster: Cluster) -> None:
    future = new_future(2)
    for ask in (future.fetch, future.result, future.exception, future.wait):
        with pytest.raises(TimeoutError):
            ask(0)
    assert not future.cancel() and not future.done(), "a remote call cannot be cancelled"


def test_errors_are_remote_ones_each_time(cluster: Cluster) -> None:
    future = new_future(2)
    there = cluster.pass_on(future, 1, 2)
    with cluster.on(2):
        owner = cluster.now.refs.owner
        from distpool.refs.refs import RAISED_HERE, Outcome

        owner.settle(owner.get((1, future.id)), Outcome(RAISED_HERE, KeyError("x"), (), 2))
    for ask in (future.wait, future.fetch, future.result):
        with pytest.raises(RemoteException) as info:
            ask(5)
        assert info.value.pid == 2 and isinstance(info.value.captured.ex, KeyError)
    assert isinstance(future.exception(5), RemoteException) and there is not None
    assert list(cluster.table(2).values()) == [{1, 2}], "an error stays at its owner, for whoever this is sent to"


def test_a_value_that_cannot_be_rebuilt_here(cluster: Cluster) -> None:
    future = new_future(2)
    with cluster.on(2):
        cluster.pass_on(future, 1, 2).put(Unreadable())
    with pytest.raises(KeyError, match="cannot be rebuilt"):
        future.fetch()


def test_callbacks_move_nothing_and_need_no_holder(cluster: Cluster) -> None:
    seen: list[bool] = []
    future = new_future(2)
    there = cluster.pass_on(future, 1, 2)
    future.add_done_callback(lambda done: seen.append(done.done()))
    cluster.run()
    del future
    gc.collect()
    with cluster.on(2):
        there.put(Big(1))
    cluster.run()
    assert seen == [True]
    assert not cluster.processes[1].refs.kept
    late = new_future(1)
    late.put(1)
    late.add_done_callback(lambda done: seen.append(done.done()))
    assert seen == [True, True], "here and now"


def test_an_interrupted_callback_keeps_no_future(cluster: Cluster) -> None:
    future = new_future(2).put(1)

    def interrupted(done: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        future.add_done_callback(interrupted)
    assert not cluster.processes[1].refs.kept


def test_several_threads_fetch_once(cluster: Cluster) -> None:
    future = new_future(2)
    cluster.pass_on(future, 1, 2).put(Big(1))
    barrier = threading.Barrier(4)

    def start() -> None:
        barrier.wait(30)
        future._start_transfer()

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert future.fetch() == Big(1)
    assert cluster.processes[1].kinds().count(Kind.REFERENCE) == 1


def test_who_has_given_up_keeps_nothing(cluster: Cluster) -> None:
    """The request for the value kept the object, and that the entry at the owner, which nobody could set any more."""
    future = new_future(1)
    there = cluster.pass_on(future, 1, 2)
    with cluster.on(2), pytest.raises(TimeoutError):
        there.fetch(0)
    assert list(cluster.table(1).values()) == [{1, 2}]
    del there
    gc.collect()
    assert list(cluster.table(1).values()) == [{1}]
    future.put(Big(1))
    cluster.run()
    assert cluster.processes[2].requests.pending(1) == []


# -- the owner is lost ---------------------------------------------------------------------------------------------


def test_who_waits_hears_of_the_owners_death(cluster: Cluster) -> None:
    pending, ended, fetched = new_future(2), new_future(2), new_future(2)
    with cluster.on(2):
        cluster.pass_on(ended, 1, 2).put(Big(1))
    fetched.put(Big(2))
    ended.wait(5)
    seen: list[Any] = []
    pending.add_done_callback(lambda done: seen.append(done.exception(0)))
    cluster.run()
    cluster.lose(2)
    assert isinstance(seen[0], ProcessExitedException)
    for future in (pending, ended):
        with pytest.raises(ProcessExitedException):
            future.fetch()
    assert fetched.fetch() == Big(2), "what is here stays"
    late = new_future(3)
    cluster.lose(3)
    for ask in (late.fetch, late.wait):
        with pytest.raises(ProcessExitedException):
            ask()


# -- interrupts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["fetch", "wait"])
@pytest.mark.parametrize("where", ["hold", "_send"])
def test_who_was_interrupted_when_about_to_ask_has_asked(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, what: str, where: str
) -> None:
    """By the next attempt, and for other threads, it counted as asked: they waited for ever."""
    future = new_future(2)

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RemoteFuture, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            getattr(future, what)()
    with cluster.on(2):
        cluster.pass_on(future, 1, 2).put(Big(1))
    future.wait(5)
    assert future.fetch(5) == Big(1)


def test_who_was_interrupted_and_then_finalizes_it_asks_nobody(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    future = new_future(2)

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RemoteFuture, "_send", interrupted)
        for ask in (future.fetch, future.wait):
            with pytest.raises(KeyboardInterrupt):
                ask()
    future.finalize()
    assert cluster.table(2) == {}


def test_a_put_that_was_interrupted_before_it_was_sent_has_lent_nothing(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, future = new_future(1), new_future(2)
    inner.put("value")
    other = new_future(1)
    key = RRID(other.whence, other.id)

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    other.isready()
    with monkeypatch.context() as patch:
        patch.setattr(RemoteFuture, "hold", interrupted)
        with pytest.raises(KeyboardInterrupt):
            future.put([inner, other])
    assert cluster.table(1)[key] == {1}
