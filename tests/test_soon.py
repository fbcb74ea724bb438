"""Results that cannot wait for somebody who asks: proxies of managers, ends of pipes, sockets."""

from __future__ import annotations

import multiprocessing
import socket
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from fakes import PATIENCE

from distpool import ClusterExecutor, DistPool
from distpool.refs.refs import LOCAL_VALUE, Outcome
from distpool.soon import Soon


def _back(value: Any) -> Any:
    return value


_ends: list[Any] = []


def _pipe(number: int = 0) -> Any:
    mine, other = multiprocessing.Pipe()
    _ends.append(mine)
    mine.send(number)
    return other


def _socket() -> socket.socket:
    mine, other = socket.socketpair()
    _ends.append(mine)
    mine.sendall(b"late")
    return other


def _wrong(number: int = 0) -> Any:
    return _Wrong()


class _Wrong:
    def __reduce__(self) -> Any:
        return _raise, ("multiprocessing.managers",)


def _raise(text: str) -> None:
    raise LookupError(text)


@pytest.fixture(scope="module")
def manager() -> Iterator[Any]:
    with multiprocessing.get_context("spawn").Manager() as made:
        yield made


def test_a_proxy_that_is_fetched_late(manager: Any) -> None:
    with ClusterExecutor(1) as executor:
        future = executor.submit(_back, manager.list([1]))
        results = executor.map(_back, (manager.list([number]) for number in range(3)))
        chunks = executor.map(_back, (manager.list([number]) for number in range(3)), chunksize=2)
    assert list(future.result()) == [1] and future.result() is future.result()
    assert [list(proxy) for proxy in results] == [list(proxy) for proxy in chunks] == [[0], [1], [2]]


def test_descriptors_that_are_fetched_when_the_workers_are_gone() -> None:
    called: list[Any] = []
    with ClusterExecutor(1) as executor:
        future = executor.submit(_pipe, 5)
        other = executor.submit(_pipe, 6)
        other.add_done_callback(lambda ended: called.append(ended.result()))
        results = executor.map(_pipe, range(3))
        retried = executor.options(retries=2).submit(_pipe, 7)
        connected = executor.submit(_socket)
    assert future.result().recv() == 5
    assert called == [other.result()] and called[0].recv() == 6
    assert [end.recv() for end in results] == [0, 1, 2]
    assert retried.result().recv() == 7
    with connected.result() as sock:
        assert sock.recv(100) == b"late"


def test_results_of_a_pool_that_are_fetched_late(manager: Any) -> None:
    called: list[Any] = []
    pool = DistPool(1)
    single, silent = pool.apply_async(_pipe, (5,), callback=called.append), pool.apply_async(_pipe, (6,))
    many = pool.map_async(_back, [manager.list([number]) for number in range(3)])
    lazy = pool.imap(_pipe, [1, 2])
    wrong = pool.apply_async(_wrong)
    pool.close()
    pool.join()
    assert called == [single.get()] and called[0].recv() == 5 and silent.get().recv() == 6
    assert [list(proxy) for proxy in many.get()] == [[0], [1], [2]]
    assert [end.recv() for end in lazy] == [1, 2]
    with pytest.raises(LookupError):
        wrong.get()


def test_what_cannot_be_opened_is_the_error_of_whoever_asks() -> None:
    with ClusterExecutor(1) as executor:
        future, results = executor.submit(_wrong), executor.map(_wrong, range(2))
    assert isinstance(future.exception(), LookupError)
    with pytest.raises(LookupError):
        next(results)


def _asks(executor: Any) -> int:
    return int(executor.submit(_pipe, 8).result(PATIENCE).recv())


def test_who_only_passes_it_on_does_not_open_it() -> None:
    with ClusterExecutor(2) as executor:
        assert executor.submit(_asks, executor).result(PATIENCE) == 8


def test_it_is_opened_once() -> None:
    opened: list[int] = []
    soon = Soon.of(Outcome(LOCAL_VALUE, opened, (), 1), kept := _Kept())
    ended = weakref.ref(kept)
    del kept
    assert ended() is not None
    threads = [threading.Thread(target=lambda: opened.append(id(soon.decoded()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert opened == [id(opened)] * 4 and ended() is None


class _Kept:
    pass
