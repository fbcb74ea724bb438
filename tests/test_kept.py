"""`options(keep=True)`: the value stays on its worker until somebody asks for it."""

from __future__ import annotations

import concurrent.futures
import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import distpool
from distpool import ClusterExecutor, ProcessExitedException, SerializationError, remotecall_fetch

PATIENCE = 30


@pytest.fixture
def executor() -> Iterator[ClusterExecutor]:
    with ClusterExecutor(2) as made:
        list(made.map(abs, range(2)))
        while len(made.workers) < 2:
            made.submit(abs, 1).result(PATIENCE)  # a round trip: the second one is on its way
        yield made


class Loud:
    """Says where it is unpickled."""

    def __init__(self) -> None:
        self.travelled = 0

    def __reduce__(self) -> Any:
        return _travelled, (self.travelled + 1,)


def _travelled(times: int) -> Loud:
    made = Loud()
    made.travelled = times
    return made


def held(executor: ClusterExecutor) -> int:
    return sum(len(distpool.debug.refs(pid)) for pid in executor.workers)


def until_none_is_held(executor: ClusterExecutor) -> None:
    for _ in range(1000):  # each is a round trip to the owners
        gc.collect()
        if not held(executor):
            return
    raise AssertionError("a value is still held")


def test_the_value_stays_until_it_is_asked_for(executor: ClusterExecutor) -> None:
    view = executor.options(keep=True)
    future = view.submit(Loud)
    assert concurrent.futures.wait([future], PATIENCE).done == {future}
    assert future.done() and future.where in executor.workers
    assert held(executor) == 1
    assert next(concurrent.futures.as_completed([future], PATIENCE)) is future
    assert held(executor) == 1  # nobody has asked for the value
    first = future.result(PATIENCE)
    assert first.travelled == 1 and future.result() is first and future.exception() is None
    until_none_is_held(executor)


def test_none_is_a_value_and_errors_are_not_kept(executor: ClusterExecutor) -> None:
    view = executor.options(keep=True)
    assert view.submit(print, end="").result(PATIENCE) is None
    with pytest.raises(ZeroDivisionError) as info:
        view.submit(divmod, 1, 0).result(PATIENCE)
    assert "ZeroDivisionError" in str(info.value.__cause__)
    assert isinstance(view.submit(divmod, 1, 0).exception(PATIENCE), ZeroDivisionError)
    until_none_is_held(executor)


def test_dropped_or_finalized_unfetched(executor: ClusterExecutor) -> None:
    view = executor.options(keep=True)
    futures = [view.submit(list, range(n)) for n in range(20)]
    concurrent.futures.wait(futures, PATIENCE)
    assert held(executor) == 20
    for future in futures[:10]:
        future.finalize()
    with pytest.raises(RuntimeError, match="finalized"):
        futures[0].result()
    del futures, future
    until_none_is_held(executor)


def test_sent_on_without_passing_through_here(executor: ClusterExecutor) -> None:
    a, b = executor.workers
    future = executor.options(keep=True, pids=a).submit(Loud)
    concurrent.futures.wait([future], PATIENCE)
    assert future.where == a
    assert remotecall_fetch(lambda f: f.fetch().travelled, b, future) == 1
    assert executor.options(pids=b).submit(lambda f: f.result(PATIENCE).travelled, future).result(PATIENCE) == 1
    assert held(executor) == 1
    assert remotecall_fetch(lambda f: f.fetch().travelled, a, future) == 0  # at its owner
    del future
    until_none_is_held(executor)


def test_sent_on_before_it_has_ended(executor: ClusterExecutor) -> None:
    a, b = executor.workers
    gate = distpool.RemoteChannel()
    future = executor.options(keep=True, pids=a).submit(lambda: gate.take(timeout=PATIENCE))
    asked = distpool.remotecall(lambda f: f.fetch(), b, future)
    gate.put("value")
    assert asked.fetch(timeout=PATIENCE) == "value" == future.result(PATIENCE)


def test_callbacks_and_retries(executor: ClusterExecutor, tmp_path: Any) -> None:
    called: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def flaky() -> int:
        with open(tmp_path / "tries", "a") as file:
            file.write("x")
        if os.path.getsize(tmp_path / "tries") < 3:
            raise OSError("not yet")
        return 7

    future = executor.options(keep=True, retries=3).submit(flaky)
    future.add_done_callback(called.set_result)
    assert called.result(PATIENCE) is future
    assert future.result(PATIENCE) == 7


def test_its_worker_dies(executor: ClusterExecutor) -> None:
    future = executor.options(keep=True).submit(os.getpid)
    concurrent.futures.wait([future], PATIENCE)
    where = future.where
    os.kill(remotecall_fetch(os.getpid, where), signal.SIGKILL)
    with pytest.raises(ProcessExitedException) as info:
        future.result(PATIENCE)
    assert info.value.worker_id == where
    assert executor.submit(abs, -1).result(PATIENCE) == 1


def test_time_is_up_while_it_is_fetched(executor: ClusterExecutor) -> None:
    future = executor.options(keep=True).submit(list, range(3))
    concurrent.futures.wait([future], PATIENCE)
    ospid = remotecall_fetch(os.getpid, future.where)
    os.kill(ospid, signal.SIGSTOP)
    try:
        with pytest.raises(TimeoutError):
            future.result(0.2)
    finally:
        os.kill(ospid, signal.SIGCONT)
    assert future.result(PATIENCE) == [0, 1, 2]


def test_a_value_that_cannot_be_sent_is_an_error_as_of_any_other_call(executor: ClusterExecutor) -> None:
    future = executor.options(keep=True).submit(threading.Lock)
    assert concurrent.futures.wait([future], PATIENCE).done == {future}  # it is there, and can be passed on
    error = future.exception(PATIENCE)
    assert type(error) is SerializationError and "_thread.lock" in str(error)
    with pytest.raises(SerializationError):
        future.result()


def test_errors_name_the_function_of_the_user(executor: ClusterExecutor) -> None:
    view = executor.options(keep=True)
    with pytest.raises(TimeoutError, match=r"^time\.sleep ran for more than 0\.2 seconds"):
        view.options(timeout=0.2).submit(time.sleep, 60).result(PATIENCE)
    lock = threading.Lock()
    with pytest.raises(SerializationError, match=r"^the captured variable 'lock' of the function .*<lambda>"):
        view.submit(lambda: lock).result(PATIENCE)
    with pytest.raises(TypeError, match="must be callable, not int"):
        view.submit(3)  # type: ignore[arg-type]
