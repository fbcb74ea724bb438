"""`finalized`: a future that was given back refuses every use, and says why."""

from __future__ import annotations

import concurrent.futures
import copy
import pickle
import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import Cluster
from wires import wait_until

import distpool
from distpool import Future
from distpool.refs import refs
from distpool.refs.finalized import FINALIZED, refuse_uses
from distpool.refs.refs import LOCAL_VALUE, Outcome
from distpool.refs.travel import new_future

USES = {
    "result": (),
    "exception": (),
    "fetch": (),
    "wait": (),
    "put": (1,),
    "isready": (),
    "add_done_callback": (print,),
    "done": (),
    "running": (),
    "cancelled": (),
}


def value(number: int) -> distpool.Future[int]:
    future: distpool.Future[int] = distpool.Future()
    future.set_result(number)
    return future


@pytest.mark.parametrize("use", USES)
def test_a_use_is_refused(use: str) -> None:
    future = value(1)
    refuse_uses(future)
    with pytest.raises(RuntimeError, match=FINALIZED):
        getattr(future, use)(*USES[use])


@pytest.mark.parametrize("keywords", [{"timeout": 3}, {}])
def test_with_a_time_limit_as_well(keywords: dict[str, Any]) -> None:
    future = value(1)
    refuse_uses(future)
    with pytest.raises(RuntimeError, match=FINALIZED):
        future.result(**keywords)


def test_others_go_on_and_it_can_be_looked_at() -> None:
    future, other = value(1), value(2)
    refuse_uses(future)
    assert other.result(0) == 2 and other.done()
    assert "finished" in repr(future)


# -- `concurrent.futures.wait` and `as_completed` ------------------------------------------------------------------


def finalized(future: Any) -> Any:
    future.finalize()
    return future


GONE = {
    "dead": lambda: pickle.loads(pickle.dumps(value(1))),
    "ended": lambda: finalized(value(1)),
    "by hand": lambda: finalized(Future()),
    "reference": lambda: finalized(new_future(1)),
    "reference that was set": lambda: finalized(new_future(1).put(2)),
    "twice": lambda: finalized(finalized(new_future(1))),
}


@pytest.mark.parametrize("make", GONE.values(), ids=list(GONE))
def test_the_helpers_refuse_it_and_let_go_of_the_others(cluster: Cluster, make: Any) -> None:
    """They waited for ever. Those of the standard library have nobody who looks for locks that were left behind."""
    for _ in range(8):  # they go by the addresses of the futures
        future = make()
        others = [concurrent.futures.Future[int]() for _ in range(3)]
        for use in (concurrent.futures.wait, lambda futures: list(concurrent.futures.as_completed(futures))):
            for futures in ([future], [*others, future]):
                with pytest.raises(RuntimeError, match="finalized|dead handle"):
                    use(futures)
        threads = [threading.Thread(target=other.set_result, args=(1,), daemon=True) for other in others]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert all(other.done() for other in others)


@pytest.mark.parametrize("make", GONE.values(), ids=list(GONE))
def test_its_state_is_refused(cluster: Cluster, make: Any) -> None:
    future = make()
    for use in (future.done, future.running, future.cancelled, future.isready):
        with pytest.raises(RuntimeError, match="finalized|dead handle"):
            use()
    assert "Future" in repr(future)
    future.finalize()


@pytest.mark.parametrize("make", [Future, lambda: new_future(1), lambda: new_future(2)])
def test_who_is_in_a_helper_already_hears_of_the_end(cluster: Cluster, make: Any) -> None:
    future, other = make(), value(1)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(concurrent.futures.wait([future, other], 30)))
    thread.start()
    wait_until(lambda: bool(future.__dict__.get("_waiters")))
    future.finalize()
    thread.join(30)
    assert [each.done for each in found] == [{future, other}] and future.__dict__["_waiters"] == []


def test_a_call_goes_on_whose_future_was_finalized() -> None:
    """The leader settles it, and others may have it."""
    future: Future[int] = Future()
    future._call = SimpleNamespace(loop=None, started=bool, waiting=nullcontext)  # type: ignore[assignment]
    future.finalize()
    assert refs.set_values([future], [1]) == [0] and future._settle(Outcome(LOCAL_VALUE, 5, (), 1)) is False
    assert future.outcome().data == 5 and not future.cancel()


@pytest.mark.parametrize("copied", [copy.copy, lambda future: pickle.loads(pickle.dumps(future))])
def test_a_pickle_of_ones_own_gives_a_dead_handle(copied: Any) -> None:
    dead = copied(value(1))
    with pytest.raises(RuntimeError, match="pickled outside of a distpool message"):
        dead.fetch()


def test_who_waits_for_one_made_by_hand_hears_of_it() -> None:
    """He waited for ever; a reference's waiters have always been told."""
    future: Future[int] = Future()
    errors: list[BaseException] = []
    told: list[bool] = []

    def wait() -> None:
        try:
            future.result(30)
        except BaseException as error:
            errors.append(error)

    future.add_done_callback(lambda done: told.append(done is future))
    threads = [threading.Thread(target=wait) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(future.__dict__.get("_sleepers", ())) == 2)
    future.finalize()
    for thread in threads:
        thread.join(30)
    assert [type(error) for error in errors] == [RuntimeError] * 2 and told == [True]
    future.finalize()


def test_others_may_still_set_one_that_was_sent(cluster: Cluster) -> None:
    future: Future[int] = Future()
    there, third = cluster.pass_on(future, 1, 2), cluster.pass_on(future, 1, 3)
    future.finalize()
    with cluster.on(2):
        there.put(3)
    with cluster.on(3):
        assert third.fetch(5) == 3
