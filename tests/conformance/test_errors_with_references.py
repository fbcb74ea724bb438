"""CONFORMANCE 2.3 for errors: references that an exception carries are counted, used and given back as those in values.

The raising process drops its own as soon as it has raised, so a receiver that was not counted finds nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

import distpool
from distpool import Channel, ClusterExecutor, RemoteChannel, RemoteException, remotecall, remotecall_fetch
from distpool.replies import request

from .conftest import wait_until
from .helpers import own_nothing

WAIT = 30.0
BEFORE: list[Any] = []


@pytest.fixture(scope="module")
def trio() -> Iterator[list[int]]:
    pids = distpool.addprocs(3)
    BEFORE[:] = distpool.debug.refs(1)  # the default pool, if anybody has asked for it
    yield pids
    distpool.rmprocs(pids)


def refuse(owner: int) -> Any:
    """Raise an error with references to what `owner` has: in its arguments, an attribute and its cause."""
    channel = RemoteChannel(lambda: Channel(3), owner)
    channel.put("item")
    error = ValueError("refused", channel)
    error.pending = remotecall(abs, owner, -5)  # type: ignore[attr-defined]
    raise error


def refuse_unopened(owner: int) -> Any:
    """As `refuse`, for callers that never look at the error."""
    refuse(owner)


def use(error: BaseException) -> None:
    """What the error refers to is there, also after a while in which its owner might have let go of it."""
    if isinstance(error, RemoteException):
        error = error.captured.ex
    assert type(error) is ValueError, error
    text, channel = error.args
    assert text == "refused"
    deadline = time.monotonic() + 0.05
    while time.monotonic() < deadline:
        assert channel.fetch(timeout=WAIT) == "item"
    assert error.pending.fetch(timeout=WAIT) == 5  # type: ignore[attr-defined]


def raised(call: Callable[[], object]) -> BaseException:
    with pytest.raises((ValueError, RemoteException)) as info:
        call()
    info.value.__traceback__ = None
    return info.value


def nothing_left(pids: list[int], besides: Any = ()) -> None:
    wait_until(lambda: own_nothing([1, *pids], [*BEFORE, *besides]))


def nested(executor: Any, owner: int) -> str:
    """In a task: the error comes from another worker by way of the executor's owner."""
    use(raised(lambda: executor.submit(refuse, owner).result(WAIT)))
    executor.submit(refuse, owner).cancel()  # and one that nobody looks at
    return "used"


def from_a_worker(other: int, owner: int) -> str:
    use(raised(lambda: remotecall_fetch(refuse, other, owner)))
    return "used"


def look(future: Any) -> str:
    use(raised(lambda: future.fetch(timeout=WAIT)))
    use(raised(lambda: future.fetch(timeout=WAIT)))
    return "used"


def test_calls(trio: list[int]) -> None:
    owner, other, third = trio
    use(raised(lambda: remotecall_fetch(refuse, other, owner)))
    use(raised(lambda: request(refuse, other, (owner,)).result(WAIT)))
    assert remotecall_fetch(from_a_worker, third, other, owner) == "used"
    nothing_left(trio)


def test_a_future_that_several_processes_ask(trio: list[int]) -> None:
    """Its owner keeps the error, and with it the references, until nobody holds the future."""
    owner, other, third = trio
    future = remotecall(refuse, other, owner)
    assert remotecall_fetch(look, third, future) == "used"
    assert remotecall_fetch(look, other, future) == "used", "in the process that has raised it"
    look(future)
    assert remotecall_fetch(look, third, future) == "used"
    del future
    nothing_left(trio)


def test_executors(trio: list[int]) -> None:
    owner = trio[0]
    with ClusterExecutor(2) as executor:
        use(raised(lambda: executor.submit(refuse, owner).result(WAIT)))
        use(raised(lambda: list(executor.map(refuse, [owner] * 3))))
        use(raised(lambda: executor.pmap(refuse, [owner] * 3)))
        assert executor.submit(nested, executor, owner).result(WAIT) == "used"
        kept = executor.options(keep=True).submit(refuse, owner)
        use(raised(partial(kept.result, WAIT)))
        del kept
        again = executor.options(retries=1).submit(refuse, owner)
        use(raised(partial(again.result, WAIT)))
        del again
        nothing_left([*trio, *executor.workers])


def test_a_future_of_an_executor_that_is_sent_on(trio: list[int]) -> None:
    owner, other, _ = trio
    with ClusterExecutor(1) as executor:
        future = executor.submit(refuse, owner)
        assert remotecall_fetch(look, other, future) == "used"
        use(raised(partial(future.result, WAIT)))
        del future
        nothing_left([*trio, *executor.workers])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_maps_over_worker_pools(trio: list[int], batch_size: int) -> None:
    owner, *others = trio
    pool = distpool.WorkerPool(others)
    seen: list[BaseException] = []
    distpool.pmap(refuse, [owner] * 5, pool=pool, batch_size=batch_size, on_error=seen.append)
    assert len(seen) == 5
    for error in seen:
        use(error)
    seen.clear()
    del error
    key = distpool.remoteref_id(pool._channel)
    nothing_left(trio, {key})


def test_everywhere(trio: list[int]) -> None:
    owner, *others = trio
    source = f"import {__name__} as cases; cases.refuse({owner})"
    with pytest.raises(distpool.CompositeException) as info:
        distpool.everywhere(source, others)
    for error in info.value.exceptions:
        use(error)
    del error, info
    nothing_left(trio)


def test_nobody_looks_at_the_error(trio: list[int]) -> None:
    owner, other, _ = trio
    with ClusterExecutor(1) as executor:
        futures = [executor.submit(refuse_unopened, owner) for _ in range(3)]
        wait_until(lambda: all(future.done() for future in futures))
        futures.clear()
        found = executor.map(refuse_unopened, [owner] * 5)
        wait_until(lambda: distpool.debug.refs(owner))
        del found
        future = request(refuse_unopened, other, (owner,))
        wait_until(future.done)
        del future
        remotecall(refuse_unopened, other, owner)
        distpool.remote_do(refuse_unopened, other, owner)
        with contextlib.suppress(RemoteException):
            remotecall(refuse_unopened, other, owner).wait(WAIT)
        nothing_left([*trio, *executor.workers])


def close_with_an_error(channel: Any) -> None:
    """In the owner: what takers get is the user's own."""
    from distpool.node import node as nodes
    from distpool.refs.owner import RRID

    entry = nodes.current().references().owner.get(RRID(channel.whence, channel.id))
    entry.channel.close(ValueError("refused", lambda: 1, (each for each in ())))


def test_a_channel_that_was_closed_with_an_error_that_cannot_be_sent(trio: list[int]) -> None:
    """Takers hear of it all the same."""
    owner = trio[0]
    channel = RemoteChannel(lambda: Channel(1), owner)
    taking = channel._ask("take")
    remotecall_fetch(close_with_an_error, owner, channel)
    for call in (lambda: taking.result(WAIT), lambda: channel.take(timeout=WAIT)):
        error = raised(call)
        assert isinstance(error, RemoteException) and "refused" in str(error)
