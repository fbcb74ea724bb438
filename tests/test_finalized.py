"""`finalized`: a future that was given back refuses every use, and says why."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
from fakes import Cluster
from wires import wait_until

import distpool
from distpool import Future
from distpool.refs.finalized import FINALIZED, refuse_uses

USES = {
    "result": (),
    "exception": (),
    "fetch": (),
    "wait": (),
    "put": (1,),
    "isready": (),
    "add_done_callback": (print,),
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


def test_others_go_on_and_its_state_can_be_seen() -> None:
    future, other = value(1), value(2)
    refuse_uses(future)
    assert other.result(0) == 2
    assert future.done() and not future.cancelled() and "finished" in repr(future)


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

    future.add_done_callback(lambda done: told.append(done.done()))
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
    assert future.done()
    with cluster.on(2):
        there.put(3)
    with cluster.on(3):
        assert third.fetch(5) == 3
