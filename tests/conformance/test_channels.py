"""CONFORMANCE 2.4: channels."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import distpool
from distpool import (
    Channel,
    ChannelClosedError,
    ProcessExitedException,
    RemoteChannel,
    RemoteException,
    finalize,
    isready,
    remotecall,
    remotecall_fetch,
    remoteref_id,
    take,
)

from .conftest import wait_until
from .helpers import DictChannel, holders, ident


def kinds(w: list[int], size: int = 10) -> list[Any]:
    return [
        Channel(size),
        RemoteChannel(lambda: Channel(size)),
        RemoteChannel(lambda: Channel(size), w[0]),
    ]


def test_C041_life(w: list[int]) -> None:
    for c in kinds(w):
        assert c.isopen()
        for item in (1, "Hello", 5.0):
            c.put(item)
        assert c.isready()
        assert c.fetch() == 1
        assert c.fetch() == 1
        assert c.take() == 1
        assert c.take() == "Hello"
        assert c.fetch() == 5.0
        assert c.take() == 5.0
        assert not c.isready()
        assert c.isopen()
        c.close()
        assert not c.isopen()


def test_C043_iteration_ends_at_close(w: list[int]) -> None:
    for inward, outward in zip(kinds(w), kinds(w), strict=True):

        def consume(inward: Any = inward, outward: Any = outward) -> None:
            for value in inward:
                outward.put(value)

        with ThreadPoolExecutor(1) as threads:
            consumer = threads.submit(consume)
            inward.put(1)
            assert outward.take() == 1
            inward.put("Hello")
            inward.close()
            assert outward.take() == "Hello"
            with pytest.raises(ChannelClosedError):
                inward.put(2)
            consumer.result(30)


def produce(channel: Any) -> None:
    for number in range(1, 11):
        channel.put(number)
    channel.close()


def test_C044_producer_and_consumer(w: list[int]) -> None:
    for producer in (1, w[0]):
        for consumer in (1, w[0]):
            channel = RemoteChannel(lambda: Channel(1))
            made = remotecall(produce, producer, channel)
            assert remotecall_fetch(lambda c: len(list(c)), consumer, channel) == 10
            made.wait(30)


def test_C045_looking_never_takes(w: list[int]) -> None:
    channel = RemoteChannel(w[0])
    assert not isready(channel)
    channel.put(1)
    for _ in range(3):
        assert isready(channel)
    assert channel.take() == 1


def test_C046_default_capacity_is_one(w: list[int]) -> None:
    for channel in (RemoteChannel(), RemoteChannel(w[0])):
        channel.put(1)
        with pytest.raises(TimeoutError):
            channel.put(2, timeout=0.1)
        with pytest.raises((TimeoutError, RemoteException)):
            remotecall_fetch(lambda c: c.put(3, timeout=0.1), w[1], channel)
        assert channel.take() == 1
        assert not channel.isready()


def test_C047_put_and_wait_return_the_channel(w: list[int]) -> None:
    for c in kinds(w):
        assert c.put(1) is c
        assert c.wait() is c


def test_C049_after_close(w: list[int]) -> None:
    for c in kinds(w):
        c.put(1)
        c.put(2)
        c.close()
        c.close()
        assert c.isready()
        assert c.fetch() == 1
        assert c.take() == 1
        with pytest.raises(ChannelClosedError):
            c.put(3)
        assert c.take() == 2
        assert not c.isready()
        for operation in (c.take, c.fetch):
            with pytest.raises(ChannelClosedError):
                operation()


def test_C051_rendezvous(w: list[int]) -> None:
    for c in (Channel(0), RemoteChannel(lambda: Channel(0)), RemoteChannel(lambda: Channel(0), w[0])):
        assert not c.isready()
        with pytest.raises(RuntimeError, match="not supported on an unbuffered Channel"):
            c.fetch()
        with ThreadPoolExecutor(1) as threads:
            putting = threads.submit(c.put, "x")
            c.wait(timeout=30)
            assert c.isready()
            assert not putting.done()
            assert c.take(timeout=30) == "x"
            putting.result(30)


def test_C053_closed_rendezvous(w: list[int]) -> None:
    c = RemoteChannel(lambda: Channel(0))

    def take_there(c: Any) -> str:
        try:
            c.take()
        except ChannelClosedError as error:
            return str(error)
        return "an item"

    waiting = remotecall(take_there, w[0], c)
    c.close()
    assert waiting.fetch(timeout=30) != "an item"
    assert remotecall_fetch(take_there, w[0], c) != "an item"


def test_C055_sending(w: list[int]) -> None:
    rc = RemoteChannel(lambda: Channel(3))
    remotecall_fetch(lambda c: c.put(1).where, w[0], rc)
    assert rc.take() == 1
    plain = Channel(3)
    plain.put(1)
    remotecall_fetch(lambda c: c.put(2).take(), w[0], plain)
    assert plain.take() == 1
    assert not plain.isready()


def test_C056_a_class_of_ones_own(w: list[int]) -> None:
    rc = RemoteChannel(DictChannel, w[0])
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(rc.fetch, "k")
        remotecall_fetch(lambda c: c.put("k", 5).where, w[1], rc)
        assert waiting.result(30) == 5
    assert rc.isready("k")
    assert not rc.isready("other")
    rc.wait("k")
    assert rc.take("k") == 5
    assert not rc.isready("k")


def test_C057_fetch_does_not_free(w: list[int]) -> None:
    for pid in (1, w[0]):
        rc = RemoteChannel(pid)
        rc.put("OK")
        assert holders(rc) == {1}
        assert rc.fetch() == "OK"
        assert holders(rc) == {1}
        key = remoteref_id(rc)
        finalize(rc)
        wait_until(lambda key=key, pid=pid: key not in distpool.debug.refs(pid))


def test_C058_in_a_channel_it_lives(w: list[int]) -> None:
    rr = RemoteChannel(w[0])
    box = RemoteChannel(w[1])
    key = remoteref_id(rr)
    box.put(rr)
    wait_until(lambda: w[1] in distpool.debug.refs(w[0]).get(key, set()))
    finalize(rr)
    wait_until(lambda: distpool.debug.refs(w[0]).get(key) == {w[1]})
    remotecall_fetch(lambda b: finalize(take(b)), w[1], box)
    wait_until(lambda: key not in distpool.debug.refs(w[0]))


def test_C061_each_item_once(w: list[int]) -> None:
    rc = RemoteChannel(lambda: Channel(4))

    def drain(c: Any) -> list[int]:
        return list(c)

    takers = [remotecall(drain, pid, rc) for pid in w]
    for number in range(200):
        rc.put(number)
    rc.close()
    assert sorted(sum((t.fetch(timeout=30) for t in takers), [])) == list(range(200))


def test_C062_owner_dies() -> None:
    executor = distpool.ClusterExecutor(2)
    assert list(executor.map(abs, [1, 2]))
    wait_until(lambda: len(executor.workers) == 2)
    owner, other = executor.workers
    rc = RemoteChannel(owner)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(rc.take)
        there = remotecall(lambda c: c.take(), other, rc)
        ospid = remotecall_fetch(os.getpid, owner)
        os.kill(ospid, signal.SIGKILL)
        with pytest.raises(ProcessExitedException) as info:
            waiting.result(30)
        assert info.value.worker_id == owner
        with pytest.raises(RemoteException) as remote:
            there.fetch(timeout=30)
        assert isinstance(remote.value.captured.ex, ProcessExitedException)
    for operation in (lambda: rc.put(1), rc.take, rc.fetch, rc.isready, rc.wait, rc.close):
        with pytest.raises(ProcessExitedException):
            operation()
    executor.shutdown()


def test_C063_bind() -> None:
    executor = distpool.ClusterExecutor(1)
    assert executor.submit(abs, 1).result(60) == 1
    (pid,) = executor.workers
    rc = RemoteChannel(lambda: Channel(2))
    rc.bind(pid)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(rc.take)
        os.kill(remotecall_fetch(os.getpid, pid), signal.SIGKILL)
        with pytest.raises(ChannelClosedError) as info:
            waiting.result(30)
    assert isinstance(info.value.__cause__, ProcessExitedException)
    # API 8.5: "the channel closes with ProcessExitedException, which takers then get". Seen: only as the cause.
    for taken in (rc.take, rc.fetch, rc.wait, lambda: rc.put(1)):
        with pytest.raises(ProcessExitedException) as exited:
            taken()
        assert (exited.value.worker_id, exited.value.exitcode) == (pid, -signal.SIGKILL)
    assert list(rc) == [] and not rc.isopen()
    executor.shutdown()


def test_C063_bind_seen_from_another_process(w: list[int]) -> None:
    executor = distpool.ClusterExecutor(1)
    assert executor.submit(abs, 1).result(60) == 1
    (pid,) = executor.workers
    rc = RemoteChannel(lambda: Channel(2), w[0])
    rc.bind(pid)
    executor.submit(os._exit, 3)
    for kind in (ChannelClosedError, ProcessExitedException):
        with pytest.raises(kind, match="exit code 3") as info:
            rc.take(timeout=30)
        assert type(info.value.__cause__) is ProcessExitedException and info.value.__cause__.worker_id == pid
    executor.shutdown()


def test_C064_a_timeout_swallows_nothing(w: list[int]) -> None:
    for c in kinds(w, 1):
        with pytest.raises(TimeoutError):
            c.take(timeout=0.05)
        with pytest.raises(TimeoutError):
            c.fetch(timeout=0.05)
        with pytest.raises(TimeoutError):
            c.wait(timeout=0.05)
        c.put("kept")
        assert c.take(timeout=30) == "kept"
        c.put(1)
        with pytest.raises(TimeoutError):
            c.put(2, timeout=0.05)
        assert c.take() == 1
        assert not c.isready()


def test_a_timeout_that_is_no_number_is_a_type_error_from_any_process(w: list[int]) -> None:
    """Seen: `struct.error` where the channel lives elsewhere."""
    for c in kinds(w, 1):
        for operation in (c.take, c.fetch, c.wait):
            with pytest.raises(TypeError):
                operation(timeout="1")  # type: ignore[arg-type]


def test_C064_many_timeouts_race(w: list[int]) -> None:
    rc = RemoteChannel(lambda: Channel(1000), w[0])
    got: list[int] = []
    done = threading.Event()

    def taker() -> None:
        while not done.is_set() or rc.isready():
            try:
                got.append(rc.take(timeout=0.001))
            except TimeoutError:
                continue

    threads = [threading.Thread(target=taker) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(200):
        rc.put(number)
    done.set()
    for thread in threads:
        thread.join(30)
    assert sorted(got) == list(range(200))


def test_typed_channel(w: list[int]) -> None:
    for c in (Channel(2, int), RemoteChannel(lambda: Channel(2, int)), RemoteChannel(lambda: Channel(2, int), w[0])):
        c.put(1)
        with pytest.raises(TypeError):
            c.put("text")
        assert c.take() == 1


def test_factory_error(w: list[int]) -> None:
    with pytest.raises(RemoteException):
        RemoteChannel(lambda: 1 / 0, w[0])
    gc.collect()
    assert remotecall_fetch(ident, w[0], 1) == 1


def test_a_put_that_timed_out_keeps_no_references(w: list[int]) -> None:
    """They stayed until the next take, because the item waited in the queue of the channel."""

    def try_to_put(channel: Any, owner: int) -> None:
        with pytest.raises(TimeoutError):
            channel.put(RemoteChannel(pid=owner), timeout=0.2)

    local = Channel(1).put(0)
    try_to_put(local, w[1])
    for pid in (1, w[0]):
        channel = RemoteChannel(lambda: Channel(1), pid).put(0)
        try_to_put(channel, w[1])
        remotecall_fetch(try_to_put, w[0], channel, w[1])
        wait_until(lambda: not distpool.debug.refs(w[1]))
        assert channel.take() == 0 and not channel.isready()
    assert local.take() == 0 and not local.isready()


def test_C052_eltype_is_the_declared_type(w: list[int]) -> None:
    assert Channel(1).eltype is object and Channel(1, int).eltype is int
    for pid in (1, w[0]):
        for make, kind in ((lambda: Channel(2, str), str), (lambda: Channel(0, int | None), int | None)):
            channel = RemoteChannel(make, pid)
            assert channel.eltype == kind
            assert remotecall_fetch(lambda c: c.eltype, w[1], channel) == kind
        assert RemoteChannel(pid).eltype is object
        assert RemoteChannel(DictChannel, pid).eltype is object


def test_C059_a_dead_handle_keeps_the_type(w: list[int]) -> None:
    class Local:
        pass

    for pid in (1, w[0]):
        typed = RemoteChannel(lambda: Channel(1, int), pid)
        assert pickle.loads(pickle.dumps(typed)).eltype is int
        assert pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(typed)))).eltype is int
        dead = pickle.loads(pickle.dumps(typed))
        assert remotecall_fetch(lambda c: c.eltype, w[1], dead) is int
        assert pickle.loads(pickle.dumps(RemoteChannel(lambda: Channel(1, Local), pid))).where == 0
        typed.finalize()
        assert pickle.loads(pickle.dumps(typed)).where == 0
        with pytest.raises(RuntimeError, match="dead handle"):
            dead.put(1)
    assert distpool.channel_from_id(remoteref_id(typed := RemoteChannel(lambda: Channel(1, str)))).eltype is str
