"""CONFORMANCE 2.2 and 2.3: futures as references, and their distributed collection."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import signal
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor, as_completed
from concurrent.futures import wait as wait_all
from typing import Any

import pytest

import distpool
import distpool.node.node
from distpool import (
    Future,
    RemoteChannel,
    RemoteException,
    fetch,
    finalize,
    isready,
    put,
    remote_do,
    remotecall,
    remotecall_fetch,
    remotecall_wait,
    remoteref_id,
    wait,
)
from distpool.wire.frames import Kind

from .conftest import wait_until
from .helpers import boom, dropped, holders, ident, make_noticed, myid, own_nothing


def both(w: list[int]) -> list[int]:
    return [1, w[0]]


def test_a_finalized_reference_cannot_be_sent(w: list[int]) -> None:
    for reference in (Future(w[0]), RemoteChannel(w[0]), remotecall(myid, w[0])):
        finalize(reference)
        with pytest.raises(distpool.SerializationError, match="finalized"):
            remotecall_fetch(ident, w[0], reference)


def test_C010_future_life(w: list[int]) -> None:
    for pid in both(w):
        f = Future(pid)
        assert not isready(f)
        assert put(f, "OK") is f
        assert isready(f)
        with pytest.raises(RuntimeError) as info:
            f.put("OK")
        assert not isinstance(info.value, RemoteException)
        assert not hasattr(f, "take")
        assert fetch(f) == "OK"


def test_C011_put_and_wait_return_the_future(w: list[int]) -> None:
    for pid in both(w):
        f = Future(pid)
        assert f.put(1) is f
        assert wait(f) is f


def test_C013_cached_fetch_is_local(w: list[int]) -> None:
    f = remotecall(ident, w[3], [1, 2])
    assert fetch(f) == [1, 2]
    ospid = remotecall_fetch(os.getpid, w[3])
    os.kill(ospid, signal.SIGSTOP)
    try:
        assert fetch(f) == [1, 2]
        assert f.result(timeout=1) == [1, 2]
    finally:
        os.kill(ospid, signal.SIGCONT)
    assert remotecall_fetch(myid, w[3]) == w[3]


def test_C014_none_is_a_value(w: list[int]) -> None:
    f = remotecall(lambda: None, w[0])
    assert fetch(f) is None
    assert isready(f)
    assert fetch(remotecall(lambda: 10, w[0])) == 10


def test_C015_ten_threads_fetch_one_future(w: list[int]) -> None:
    release = RemoteChannel(w[1])
    f = remotecall(lambda: release.take(timeout=30), w[0])
    with ThreadPoolExecutor(10) as threads:
        results = [threads.submit(fetch, f) for _ in range(10)]
        release.put(7)
        assert [r.result(30) for r in results] == [7] * 10


def test_C016_fetched_here_and_there(w: list[int]) -> None:
    f = remotecall(ident, w[0], "value")
    with ThreadPoolExecutor(2) as threads:
        here = threads.submit(fetch, f)
        there = threads.submit(remotecall_fetch, fetch, w[1], f)
        assert here.result(30) == there.result(30) == "value"


def test_C017_a_fetched_future_travels_with_its_value(w: list[int]) -> None:
    v = remotecall_wait(lambda: 1, w[0])
    assert fetch(v) == 1
    assert fetch(remotecall_wait(fetch, w[0], v)) == 1


def test_C019_remote_do_sets_a_future(w: list[int]) -> None:
    for pid in both(w):
        f = Future(pid)
        remote_do(lambda fut: fut.put(myid()), pid, f)
        assert f.fetch(timeout=30) == pid


def test_C020_put_is_seen_elsewhere(w: list[int]) -> None:
    channel = RemoteChannel(w[1])

    def there(rc: Any) -> list[Any]:
        future = rc.take(timeout=30)
        wait_until(future.isready)
        try:
            future.put("again")
        except (RuntimeError, RemoteException) as error:
            return [type(error).__name__, future.fetch(timeout=30)]
        return ["no error"]

    for _ in range(20):
        f = Future(w[0])
        reply = remotecall(there, w[1], channel)
        channel.put(f)
        f.put("OK")
        name, value = reply.fetch(timeout=30)
        assert name in ("RuntimeError", "RemoteException")
        assert value == "OK"


def test_what_was_put_does_not_change_any_more(w: list[int], scale: float) -> None:
    size = int(scale * (1 << 20))
    value = [0, bytearray(size)]
    f = Future(w[1]).put(value)
    value.append(1)
    value[1][:] = b"x" * size
    assert remotecall_fetch(lambda f: fetch(f)[0], w[0], f) == 0
    assert fetch(f) == fetch(remotecall(fetch, w[1], f)) == [0, bytearray(size)]


def test_an_array_that_was_put_can_be_written(w: list[int], scale: float) -> None:
    numpy = pytest.importorskip("numpy")
    f = Future(w[1]).put(array := numpy.zeros(int(scale * 100_000)))
    array[:] = 1
    fetch(f)[0] = 5
    assert fetch(f)[:2].tolist() == [5, 0]


def test_a_value_that_cannot_be_sent_does_not_hold_back_its_reference(w: list[int]) -> None:
    for owner in both(w):
        f = wait(remotecall(threading.Lock, owner))
        assert remotecall_fetch(lambda f: f.where, w[1], f) == owner
        with pytest.raises(RemoteException) as info:
            remotecall_fetch(fetch, w[1], f)
        assert "SerializationError" in str(info.value)
    lock = fetch(f := remotecall(threading.Lock, 1))
    assert remotecall_fetch(lambda f: f.isready(), w[0], f) and fetch(f) is lock


def test_C021_one_object_per_reference(w: list[int]) -> None:
    f = Future(w[0])
    back = remotecall_fetch(ident, w[1], f)
    assert back is f
    assert hash(back) == hash(f)
    assert remotecall_fetch(lambda a, b: a is b, w[1], f, f)


def test_C022_identities(w: list[int]) -> None:
    channel = RemoteChannel(w[0])
    assert remoteref_id(channel).whence == 1
    assert channel.where == w[0]
    refs = [Future(w[0]) for _ in range(1000)]
    assert len({remoteref_id(f) for f in refs}) == 1000


def test_C023_channel_from_id(w: list[int]) -> None:
    here = RemoteChannel()
    distpool.channel_from_id(remoteref_id(here)).put(3)
    assert here.take() == 3
    there = RemoteChannel(w[0])
    with pytest.raises(LookupError, match="Local instance of remote reference not found"):
        distpool.channel_from_id(remoteref_id(there))


def test_C025_C026_errors_are_thrown_again_and_again(w: list[int]) -> None:
    for pid in both(w):
        f = remotecall(boom, pid)
        for _ in range(3):
            with pytest.raises(RemoteException) as info:
                fetch(f)
            assert info.value.pid == pid
            assert isinstance(info.value.captured.ex, RuntimeError)
            assert str(info.value).startswith("On worker") == (pid != 1)
        with pytest.raises(RemoteException):
            wait(f)
        with pytest.raises(RemoteException):
            remotecall_fetch(fetch, w[1], f)


def test_C026_an_error_stays_at_its_owner_as_long_as_somebody_may_send_it(w: list[int]) -> None:
    f = remotecall(boom, w[0])
    with pytest.raises(RemoteException):
        fetch(f)
    for _ in range(2):  # round trips to the owner: what this process has given back would be gone
        assert remoteref_id(f) in distpool.debug.refs(w[0])
    with pytest.raises(RemoteException):
        remotecall_fetch(fetch, w[1], f)
    wait_until(lambda: holders(f) == {1})


def test_C019_a_future_that_is_set_and_dropped_before_it_is_asked_for(w: list[int]) -> None:
    for pid in both(w):
        for number in range(200):
            f = Future(pid)
            remotecall_fetch(lambda future, value: future.put(value) and None, pid, f, number)
            assert f.fetch(timeout=30) == number


def test_C027_an_exception_is_a_value(w: list[int]) -> None:
    value = remotecall_fetch(lambda: ValueError("data"), w[0])
    assert isinstance(value, ValueError)
    assert isinstance(fetch(remotecall(lambda: KeyError(1), w[0])), KeyError)


def test_C028_fetch_frees(w: list[int]) -> None:
    for pid in both(w):
        f = remotecall(myid, pid)
        assert holders(f) == {1}
        assert fetch(f) == pid
        wait_until(lambda f=f: holders(f) is None)


def test_C028_black_box_value_is_dropped(w: list[int]) -> None:
    f = remotecall_wait(make_noticed, w[0], "C028")
    assert "C028" not in remotecall_fetch(dropped, w[0])
    del f
    wait_until(lambda: "C028" in remotecall_fetch(dropped, w[0]))


def test_C029_finalize_or_del_frees(w: list[int]) -> None:
    for pid in both(w):
        f = remotecall_wait(myid, pid)
        key, where = remoteref_id(f), f.where
        finalize(f)
        finalize(f)
        with pytest.raises(RuntimeError):
            fetch(f)
        wait_until(lambda key=key, where=where: key not in distpool.debug.refs(where))
        g = remotecall(myid, pid)
        key = remoteref_id(g)
        del g
        wait_until(lambda key=key, where=where: key not in distpool.debug.refs(where))


def test_C031_no_entry_until_touched(w: list[int]) -> None:
    f = Future(w[0])
    assert holders(f) is None
    assert not isready(f)
    assert holders(f) == {1}
    put(f, "OK")
    wait_until(lambda: holders(f) is None)
    assert fetch(f) == "OK"


def test_C032_the_owners_own_handle_does_not_stay(w: list[int]) -> None:
    f = remotecall_wait(ident, w[0], list(range(100_000)))
    for _ in range(2):
        assert remotecall_fetch(lambda r: (fetch(r), True)[1], w[0], f)
        wait_until(lambda: holders(f) == {1})
    key = remoteref_id(f)
    finalize(f)
    wait_until(lambda: key not in distpool.debug.refs(w[0]))


def test_C033_a_fetched_future_registers_nobody(w: list[int]) -> None:
    f = remotecall(ident, w[0], 5)
    assert fetch(f) == 5
    assert remotecall_fetch(fetch, w[1], f) == 5
    wait_until(lambda: holders(f) is None)


def test_C034_value_arrives_for_a_handle(w: list[int]) -> None:
    channel = RemoteChannel(lambda: distpool.Channel(2), w[1])
    f = remotecall_wait(ident, w[0], "v")

    def there(rc: Any) -> Any:
        handle = rc.take(timeout=30)
        rc2 = rc.take(timeout=30)
        assert handle is rc2
        return handle.fetch(timeout=30)

    reply = remotecall(there, w[1], channel)
    channel.put(f)
    wait_until(lambda: holders(f) is not None and w[1] in (holders(f) or ()))
    fetch(f)
    channel.put(f)
    assert reply.fetch(timeout=30) == "v"
    wait_until(lambda: holders(f) is None)


def test_C035_not_freed_too_early(w: list[int]) -> None:
    for number in range(200):
        f = remotecall(ident, w[0], number)
        reply = remotecall(fetch, w[1], f)
        assert fetch(f) == number
        del f
        assert reply.fetch(timeout=30) == number


def test_C037_a_dead_client_holds_nothing(w: list[int]) -> None:
    executor = distpool.ClusterExecutor(1)
    assert executor.submit(abs, 1).result(60) == 1
    (victim,) = executor.workers
    from .helpers import keep

    here = RemoteChannel()
    there = RemoteChannel(w[0])
    remotecall_fetch(keep, victim, "refs", [here, there])
    keys = [(remoteref_id(here), 1), (remoteref_id(there), w[0])]
    del here, there
    for key, pid in keys:
        wait_until(lambda key=key, pid=pid: distpool.debug.refs(pid).get(key) == {victim})
    os.kill(remotecall_fetch(os.getpid, victim), signal.SIGKILL)
    for key, pid in keys:
        wait_until(lambda key=key, pid=pid: key not in distpool.debug.refs(pid))
    executor.shutdown()


def test_C038_calls_leave_nothing(w: list[int]) -> None:
    before = len(distpool.debug.refs(1)), len(distpool.debug.refs(w[0]))
    for _ in range(300):
        remotecall_fetch(myid, w[0])
        remotecall_wait(myid, w[0])
    wait_until(lambda: (len(distpool.debug.refs(1)), len(distpool.debug.refs(w[0]))) <= before)


def test_C039_dropping_in_awkward_places(w: list[int]) -> None:
    class Holder:
        def __init__(self, ref: Any) -> None:
            self.ref = ref
            self.me = self

        def __del__(self) -> None:
            self.ref = None

    lock = threading.Lock()
    for _ in range(50):
        holder = Holder(remotecall(myid, w[0]))
        with lock:
            del holder
    wait_until(lambda: len(distpool.debug.refs(w[0])) == 0)


def test_C040_back_and_forth(w: list[int]) -> None:
    for _ in range(20):
        channel = RemoteChannel(lambda: distpool.Channel(1))
        key = remoteref_id(channel)
        reply = remotecall(ident, w[1], channel)
        finalize(channel)
        back = reply.fetch(timeout=30)
        back.put(1)
        assert back.take() == 1
        assert remoteref_id(back) == key
        del back, reply, channel
        wait_until(lambda key=key: key not in distpool.debug.refs(1))


def test_futures_work_with_the_standard_library(w: list[int]) -> None:
    futures = [remotecall(pow, pid, pid, 2) for pid in w for _ in range(5)]
    assert len(wait_all(futures, timeout=30).done) == 20
    assert sorted(f.result() for f in as_completed(futures, timeout=30)) == sorted(p * p for p in w for _ in range(5))

    async def main() -> Any:
        return await remotecall(pow, w[0], 2, 5), await asyncio.wrap_future(remotecall(pow, w[0], 2, 6))

    assert asyncio.run(main()) == (32, 64)
    seen: list[Any] = []
    called = threading.Event()
    remotecall(ident, w[0], 9).add_done_callback(lambda f: (seen.append(f.result()), called.set()))
    assert called.wait(30)
    assert seen == [9]


def test_C059_pickled_outside_it_is_a_dead_handle(w: list[int]) -> None:
    f = Future(w[0])
    for ref in (f, RemoteChannel(w[0]), remotecall(myid, w[0])):
        copy = pickle.loads(pickle.dumps({"ref": ref}))["ref"]
        assert (copy.where, copy.whence, copy.id) == (0, 0, 0)
        with pytest.raises(RuntimeError):
            fetch(copy)
    assert holders(f) is None


def test_cancel_of_a_remote_call_is_false(w: list[int]) -> None:
    f = remotecall(ident, w[0], 1)
    assert f.cancel() is False
    assert f.result(30) == 1


def test_C035_executors_inside_tasks_pass_references_on() -> None:
    """Arguments and results that carry references go through the executor's owner: alive, then freed everywhere."""
    before = distpool.debug.refs(1)  # the default pool, for one
    with distpool.ClusterExecutor(2) as executor:

        def use(ref: Any) -> Any:
            return ref, fetch(ref).name

        def act(ref: Any) -> str:
            back, name = executor.submit(use, ref).result(20)
            return f"{name} {fetch(back).name}"

        assert executor.submit(abs, -1).result(20) == 1
        for number in range(5):
            ref = remotecall(make_noticed, executor.workers[number % len(executor.workers)], f"n{number}")
            assert executor.submit(act, ref).result(20) == f"n{number} n{number}"
            del ref
        wait_until(lambda: own_nothing([1, *executor.workers], before))


def test_C035_a_value_that_carries_references(w: list[int]) -> None:
    """A Future set with references, read by several processes: each has its own, and in the end nobody has any."""
    before = distpool.debug.refs(1)
    ref = remotecall(make_noticed, w[0], "inside")
    box = Future(w[1])
    remotecall_wait(lambda box, ref: (box.put([ref]), None)[1], w[2], box, ref)
    del ref
    for pid in (w[3], w[0], w[2]):
        assert remotecall_fetch(lambda box: fetch(fetch(box)[0]).name, pid, box) == "inside"
    assert fetch(fetch(box)[0]).name == "inside"
    del box
    wait_until(lambda: own_nothing([1, *w], before))


def test_a_finalized_future_refuses_any_use_however_it_was_made(w: list[int]) -> None:
    """Seen: one made by `Future()` was a plain future to `finalize`, so its `fetch` waited for ever."""

    def seen_elsewhere() -> Future:
        f = Future()
        assert remotecall_fetch(lambda g: g.where, w[0], f) == 1
        return f

    for make in (Future, seen_elsewhere, lambda: Future().put(1), lambda: Future(1), lambda: Future(w[0])):
        f = make()
        finalize(f)
        finalize(f)
        helpers = (lambda f: wait_all([f], 30), lambda f: list(as_completed([f], 30)), lambda f: f.done())
        for use in (fetch, wait, isready, lambda f: put(f, 1), lambda f: f.add_done_callback(print), *helpers):
            with pytest.raises(RuntimeError, match="finalized"):
                use(f)
        with pytest.raises(distpool.SerializationError, match="finalized"):
            remotecall_fetch(ident, w[0], f)


def test_finalize_gives_back_a_future_made_by_hand(w: list[int]) -> None:
    f = Future()
    rrid = remoteref_id(f)
    assert rrid in distpool.debug.refs()
    finalize(f)
    wait_until(lambda: rrid not in distpool.debug.refs())


def test_a_future_that_is_finalized_here_goes_on_for_others(w: list[int]) -> None:
    f, go = Future(), RemoteChannel()
    other = remotecall(lambda g, go: (go.take(), put(g, 1), fetch(g))[-1], w[0], f, go)
    wait_until(lambda: w[0] in distpool.debug.refs().get(remoteref_id(f), ()))
    finalize(f)
    go.put(None)
    assert fetch(other) == 1


def test_verbs_of_what_has_none_are_type_errors() -> None:
    """Seen: AttributeError, which does not say that the argument is to blame."""
    for verb in (isready, wait, finalize, distpool.take, lambda x: put(x, 1)):
        with pytest.raises(TypeError, match="int"):
            verb(3)


def test_the_repr_says_how_the_call_ended(w: list[int]) -> None:
    """Seen: "raised an error" of every value that is here or at its owner."""
    for pid in both(w):
        f = remotecall(ident, pid, 1)
        wait(f)
        assert "state=finished returned " in repr(f)
        failed = remotecall(boom, pid)
        wait_until(failed.done)
        assert "state=finished raised " in repr(failed)


def test_the_first_exception_is_not_the_first_value(w: list[int]) -> None:
    """Seen: a value that is still at its owner passed for an exception, so `wait` came back at the first one."""
    first, second = RemoteChannel(), RemoteChannel()
    quick, slow = remotecall(first.take, w[0]), remotecall(second.take, w[1])
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(wait_all, [quick, slow], 30, "FIRST_EXCEPTION")
        wait_until(lambda: quick._waiters and slow._waiters)
        first.put(1)
        wait_until(quick.done)
        assert not waiting.done()
        second.put(2)
        done, left = waiting.result(30)
    assert done == {quick, slow} and not left


def keeps(what: str, pid: int) -> bool:
    """Whether a function that meets this error leaves its locals to the collector when it returns."""

    class Local:
        pass

    gone = threading.Event()

    def meet() -> weakref.ref[Any]:
        local = Local()
        try:
            FAILURES[what](pid)
        except (RemoteException, distpool.ChannelClosedError, TimeoutError, ValueError):
            return weakref.ref(local, lambda _: gone.set())
        raise AssertionError("there was no error")

    gc.collect()
    gc.disable()  # and `wait_until` collects
    try:
        there = meet()
        return not gone.wait(5) and there() is not None
    finally:
        gc.enable()


def closed_channel(pid: int) -> RemoteChannel:
    made = RemoteChannel(pid)
    made.close()
    return made


FAILURES: dict[str, Any] = {
    "remotecall_fetch": lambda pid: remotecall_fetch(boom, pid),
    "remotecall_wait": lambda pid: remotecall_wait(boom, pid),
    "fetch": lambda pid: fetch(remotecall(boom, pid)),
    "wait": lambda pid: wait(remotecall(boom, pid)),
    "Future.fetch": lambda pid: remotecall(boom, pid).fetch(),
    "Future.wait": lambda pid: remotecall(boom, pid).wait(),
    "take closed": lambda pid: closed_channel(pid).take(),
    "put closed": lambda pid: closed_channel(pid).put(1),
    "take late": lambda pid: RemoteChannel(pid).take(timeout=0.01),
    "fold": lambda pid: distpool.distributed(lambda i: boom(), [1], max),
}


@pytest.mark.parametrize("what", FAILURES)
def test_an_error_does_not_keep_what_its_callers_hold(w: list[int], what: str) -> None:
    """Neither big arrays nor references, which would stay counted at their owners until the collector comes by."""
    for pid in both(w):
        assert not keeps(what, pid)


def test_an_interrupted_remotecall_leaves_no_value(w: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C behind the sending of the request: the owner has heard of the reference."""
    peers = distpool.node.node.current().peers
    send = peers.send

    def struck(pid: int, kind: Any, *rest: Any) -> None:
        send(pid, kind, *rest)
        if kind is Kind.REQUEST:
            raise KeyboardInterrupt

    before = set(distpool.debug.refs(w[0]))
    monkeypatch.setattr(peers, "send", struck)
    with pytest.raises(KeyboardInterrupt):
        remotecall(ident, w[0], "value")
    monkeypatch.undo()
    assert remotecall_fetch(ident, w[0], 1) == 1
    wait_until(lambda: set(distpool.debug.refs(w[0])) <= before)


@pytest.mark.skipif(not hasattr(signal, "raise_signal"), reason="no signals")
def test_references_are_lent_with_the_message_or_not_at_all(w: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between the two would leave them counted for a process that never hears of them."""
    peers = distpool.node.node.current().peers
    send = peers.send

    def struck(pid: int, kind: Any, *rest: Any) -> None:
        send(pid, kind, *rest)
        if kind is Kind.CLIENTS and threading.current_thread() is threading.main_thread():
            monkeypatch.undo()
            signal.raise_signal(signal.SIGINT)

    for use in (lambda rc: remote_do(ident, w[0], rc), lambda rc: put(RemoteChannel(w[0]), rc)):
        rc = RemoteChannel(w[1])
        key = remoteref_id(rc)
        monkeypatch.setattr(peers, "send", struck)
        with pytest.raises(KeyboardInterrupt):
            use(rc)
        del rc
        wait_until(lambda key=key: key not in distpool.debug.refs(w[1]))
