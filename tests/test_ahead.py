"""Putting ahead, between real workers: what others see of it, and that nothing is lost, doubled or early.

The owner of a channel is stopped (SIGSTOP) where a test needs puts that have been sent and not answered.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

import distpool
from distpool import (
    Channel,
    ChannelClosedError,
    ProcessExitedException,
    RemoteChannel,
    RemoteException,
    remotecall,
    remotecall_fetch,
)
from distpool.node import node as nodes
from distpool.refs import ahead
from distpool.wire import codec
from distpool.wire.frames import Kind

WAIT = 30.0
BOX: dict[str, Any] = {}


def box() -> dict[str, Any]:
    """Of the process where it is called: what lambdas mention travels with them."""
    return BOX


@pytest.fixture(scope="module")
def team() -> Iterator[list[int]]:
    """Three workers: mostly the owner of a channel, a producer, and somebody else."""
    pids = distpool.addprocs(3)
    for one in pids:
        for other in pids:
            if one != other:
                remotecall_fetch(remotecall_fetch, one, abs, other, 1)
    yield pids
    distpool.rmprocs(pids)


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process does nothing while the block runs."""
    ospid = remotecall_fetch(os.getpid, pid)
    stop(ospid)
    try:
        yield
    finally:
        os.kill(ospid, signal.SIGCONT)


def stop(ospid: int) -> None:
    """The signal is there at once, but threads go on until one of them has been scheduled to take it."""
    os.kill(ospid, signal.SIGSTOP)
    wait_until(lambda: psutil.Process(ospid).status() == psutil.STATUS_STOPPED)


def warm(channel: Any, count: int = 2) -> None:
    """On the producer: get a credit."""
    for number in range(count):
        channel.put(("warm", number))


def drained(channel: Any, count: int = 2) -> None:
    for _ in range(count):
        assert channel.take(timeout=WAIT)[0] == "warm"


def credit(channel: Any) -> int:
    """On the producer: how much it has."""
    return channel._ahead.credit if channel._ahead is not None else 0


def ready_channel(owner: int, producer: int, size: int = 1000) -> RemoteChannel:
    """A channel in which `producer` has room."""
    channel = RemoteChannel(lambda: Channel(size), owner)
    remotecall_fetch(warm, producer, channel)
    drained(channel)
    # By another object, so that the producer keeps the channel and with it the credit.
    remotecall_fetch(keep, producer, f"channel {channel.id}", channel)
    remotecall_fetch(warm, producer, channel)
    drained(channel)
    assert remotecall_fetch(credit, producer, channel) > 0
    return channel


def keep(name: str, value: Any) -> None:
    BOX[name] = value


def feed(channel: Any, count: int, start: int = 0) -> int:
    for number in range(start, start + count):
        channel.put(number)
    return count


def wait_until(holds: Any) -> None:
    """Distributed collection has no event to wait for."""
    deadline = time.monotonic() + WAIT
    while not holds():
        gc.collect()
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.01)


# -- credits ---------------------------------------------------------------------------------------------------------


def test_puts_do_not_wait_for_the_owner(team: list[int]) -> None:
    owner, producer, _ = team
    channel = ready_channel(owner, producer)

    def put_and_tell(channel: Any) -> tuple[int, int]:
        feed(channel, 100)
        group = nodes.current().ahead
        return len(group.busy), sum(len(one.batch) for one in group.busy)

    def put_inside(channel: Any) -> Any:
        box()["seen"] = put_and_tell(channel)

    with stopped(owner):
        call = remotecall(put_inside, producer, channel)
        with pytest.raises(TimeoutError):
            call.wait(0.2)
    call.wait(WAIT)
    busy, waiting = remotecall_fetch(lambda: box()["seen"], producer)
    assert busy == 1 and waiting > 0, "it put 100 items without an answer"
    assert [channel.take(timeout=WAIT) for _ in range(100)] == list(range(100))


def test_no_credit_for_small_and_typed_channels_and_for_the_master(team: list[int]) -> None:
    owner, producer, _ = team
    for make in (lambda: Channel(1), lambda: Channel(4), lambda: Channel(100, tuple)):
        channel = RemoteChannel(make, owner)
        for _ in range(3):
            remotecall_fetch(warm, producer, channel, 1)
            drained(channel, 1)
        assert remotecall_fetch(credit, producer, channel) == 0
    channel = RemoteChannel(lambda: Channel(100), owner)
    warm(channel)
    drained(channel)
    assert credit(channel) == 0 and nodes.current().ahead is None


def test_errors_of_serialising_are_raised_by_put(team: list[int]) -> None:
    owner, producer, _ = team
    channel = ready_channel(owner, producer)

    def put_badly(channel: Any) -> str:
        channel.put(1)
        try:
            channel.put(threading.Lock())
        except distpool.SerializationError as error:
            channel.put(2)
            return str(error)
        return ""

    assert "cannot be serialised" in remotecall_fetch(put_badly, producer, channel)
    assert [channel.take(timeout=WAIT) for _ in range(2)] == [1, 2]


def test_what_is_put_is_copied(team: list[int]) -> None:
    owner, producer, _ = team
    channel = ready_channel(owner, producer)

    def put_and_change(channel: Any) -> None:
        for number in range(50):
            value = [number]
            channel.put(value)
            value.append("changed")

    remotecall_fetch(put_and_change, producer, channel)
    assert [channel.take(timeout=WAIT) for _ in range(50)] == [[number] for number in range(50)]


# -- (a) room of others ----------------------------------------------------------------------------------------------


def test_reserved_room_is_called_back(team: list[int]) -> None:
    """A producer that puts nothing more does not keep its room from the owner, another worker, or the master."""
    owner, producer, other = team
    size = 100
    for who in (owner, other, 1):
        channel = ready_channel(owner, producer, size)
        assert remotecall_fetch(feed, who, channel, size) == size
        with pytest.raises(TimeoutError):
            channel.put("one too many", timeout=0.05)
        assert remotecall_fetch(credit, producer, channel) == 0
        assert [channel.take(timeout=WAIT) for _ in range(size)] == list(range(size))
        assert not channel.isready()


def test_a_full_channel_is_never_fuller(team: list[int]) -> None:
    """Several producers put as long as they can: not one item more than there is room for."""
    owner, producer, other = team

    def fill(channel: Any) -> int:
        count = 0
        with contextlib.suppress(TimeoutError):
            while True:
                channel.put(count, timeout=0.1)
                count += 1
        return count

    for size in (8, 20, 300):
        channel = ready_channel(owner, producer, size)
        calls = [remotecall(fill, pid, channel) for pid in (producer, other, owner)]
        counts = [call.fetch(WAIT) for call in calls]
        assert sum(counts) == size
        for _ in range(size):
            channel.take(timeout=WAIT)
        assert not channel.isready()


def test_a_stopped_producer_keeps_nobody_waiting(team: list[int]) -> None:
    owner, producer, _ = team
    channel = ready_channel(owner, producer, 100)
    with stopped(producer):
        begin = time.monotonic()
        remotecall_fetch(feed, owner, channel, 100)
        assert time.monotonic() - begin < WAIT / 2
    assert [channel.take(timeout=WAIT) for _ in range(100)] == list(range(100))
    remotecall_fetch(feed, producer, channel, 10)
    assert [channel.take(timeout=WAIT) for _ in range(10)] == list(range(10))


# -- (b) close -------------------------------------------------------------------------------------------------------


def produce_until_closed(channel: Any) -> int:
    """How many puts returned."""
    count = 0
    try:
        while True:
            channel.put(count)
            count += 1
    except ChannelClosedError:
        return count


def test_close_loses_nothing(team: list[int]) -> None:
    """What a producer has put before it hears of the close is taken; then takers and the producer hear of it."""
    owner, producer, other = team
    for _ in range(10):
        channel = RemoteChannel(lambda: Channel(200), owner)
        counts = [remotecall(produce_until_closed, pid, channel) for pid in (producer, other)]
        taken = [remotecall(lambda c: list(c), pid, channel) for pid in (owner, 1)]
        for _ in range(100):
            channel.take(timeout=WAIT)
        channel.close()
        found = sum(len(call.fetch(WAIT)) for call in taken)
        assert found + 100 == sum(call.fetch(WAIT) for call in counts)


def test_close_while_the_producer_is_stopped(team: list[int]) -> None:
    owner, producer, _ = team
    channel = ready_channel(owner, producer)
    with ThreadPoolExecutor(1) as threads:
        with stopped(producer):
            channel.close()
            assert not channel.isopen()
            taking = threads.submit(channel.take)
            with pytest.raises(TimeoutError):
                channel.take(timeout=0.05)
            assert not taking.done(), "that process may have put something"
        with pytest.raises(ChannelClosedError):
            taking.result(WAIT)
    with pytest.raises(RemoteException) as info:
        remotecall_fetch(feed, producer, channel, 1)
    assert isinstance(info.value.captured.ex, ChannelClosedError)


# -- (c) what others see ---------------------------------------------------------------------------------------------


def put_then(channel: Any, then: str, other: int, extra: Any) -> Any:
    """On the producer: put something, then do something that others can see. `extra`: belongs to this process."""
    feed(channel, 20)
    if then == "return":
        return "done"
    if then == "raise":
        raise KeyError("done")
    if then == "call":
        return remotecall_fetch(abs, other, -1)
    if then == "start":
        return remotecall(abs, other, -1).fetch()
    if then == "do":
        distpool.remote_do(keep, other, "told", True)
    elif then == "elsewhere":
        box()["elsewhere"].put("seen")
    elif then == "own":
        box()["own"].put("seen")
    elif then == "own close":
        box()["own"].close()
    elif then == "own take":
        return box()["own"].take()
    elif then == "future":
        box()["future"].put("seen")
    elif then == "memory":
        box()["seen"] = True
        box()["let go"].wait(WAIT)
    return "done"


@pytest.mark.parametrize("then", ["return", "raise", "call", "start", "do", "elsewhere", "own close", "own take"])
def test_nothing_is_seen_before_the_items(team: list[int], then: str) -> None:
    """While the owner does not answer, nothing that the producer does after its puts gets out."""
    owner, producer, other = team
    channel = ready_channel(owner, producer)
    elsewhere = ready_channel(other, producer)
    own = RemoteChannel(lambda: Channel(10), producer)
    own.put("there")
    remotecall_fetch(keep, producer, "elsewhere", elsewhere)
    remotecall_fetch(keep, producer, "own", own)
    remotecall_fetch(keep, other, "told", False)
    with stopped(owner):
        call = remotecall(put_then, producer, channel, then, other, None)
        with pytest.raises(TimeoutError):
            call.wait(0.15)
        assert not remotecall_fetch(lambda: box()["told"], other)
        assert not elsewhere.isready()
    if then == "raise":
        with pytest.raises(RemoteException):
            call.fetch(WAIT)
    else:
        call.fetch(WAIT)
    assert [channel.take(timeout=WAIT) for _ in range(20)] == list(range(20))


def wait_for_others(seconds: float) -> None:
    ahead.OTHERS = seconds


@pytest.fixture
def patient(team: list[int]) -> Iterator[None]:
    """The producer waits for as long as it takes for what its other threads have put."""
    before = ahead.OTHERS
    remotecall_fetch(wait_for_others, team[1], WAIT)
    yield
    remotecall_fetch(wait_for_others, team[1], before)


def test_a_stopped_owner_holds_up_only_who_put_something_there(team: list[int]) -> None:
    owner, producer, _ = team
    channel = ready_channel(owner, producer)
    own = RemoteChannel(lambda: Channel(10), producer)
    with stopped(owner):
        call = remotecall(feed, producer, channel, 20)
        for _ in range(5):
            assert remotecall_fetch(abs, producer, -1) == 1
            assert own.put(1).isready() and own.take(timeout=WAIT) == 1
        assert not call.isready()
    assert call.fetch(WAIT) == 20
    assert [channel.take(timeout=WAIT) for _ in range(20)] == list(range(20))


def test_what_one_thread_tells_another_one_in_memory(team: list[int]) -> None:
    owner, producer, _ = team
    channel = ready_channel(owner, producer)

    def put_and_note(channel: Any, first: int) -> None:
        for number in range(first, first + 100):
            channel.put(number)
            box()["last"] = number

    remotecall_fetch(lambda: box().update(last=-1), producer)
    taken = -1
    for first in range(0, 500, 100):
        call = remotecall(put_and_note, producer, channel, first)
        while taken < first + 99:
            told = remotecall_fetch(lambda: box()["last"], producer)
            while taken < told:
                taken += 1
                assert channel.take(timeout=0) == taken, "it is there"
        call.wait(WAIT)


def test_a_take_of_its_own_is_not_seen_before_the_items(team: list[int], patient: None) -> None:
    """A channel as a semaphore: to take is to give the token back, and whoever gets it then finds what was put."""
    owner, producer, other = team
    channel = ready_channel(owner, producer)
    tokens = RemoteChannel(lambda: Channel(1), producer)
    remotecall_fetch(keep, producer, "tokens", tokens)
    tokens.put("mine")
    remotecall_fetch(lambda: box().update(**{"taken": threading.Event(), "let go": threading.Event()}), producer)

    def put_and_release(channel: Any) -> None:
        feed(channel, 20)
        assert box()["tokens"].take() == "mine"  # does not wait
        box()["taken"].set()
        box()["let go"].wait(WAIT)

    with stopped(owner):
        acquiring = remotecall(lambda tokens: tokens.put("theirs").where, other, tokens)
        call = remotecall(put_and_release, producer, channel)
        with pytest.raises(TimeoutError):
            acquiring.wait(0.2)
        assert not call.isready()
    acquiring.wait(WAIT)
    assert [channel.take(timeout=0) for _ in range(20)] == list(range(20))
    assert remotecall_fetch(lambda: box()["taken"].wait(WAIT), producer)
    remotecall_fetch(lambda: box()["let go"].set(), producer)
    call.wait(WAIT)
    assert tokens.take(timeout=WAIT) == "theirs"


def test_stages_in_a_circle(team: list[int]) -> None:
    """Each takes its own and puts into the next one's channel: their answers do not wait for each other."""
    rings = [RemoteChannel(lambda: Channel(100), pid) for pid in team]

    def pass_round(mine: Any, following: Any, count: int) -> int:
        total = 0
        for _ in range(count):
            number = mine.take(timeout=WAIT)
            total += number
            following.put(number + 1)
        return total

    for _ in range(20):
        rings[0].put(0)
    calls = [remotecall(pass_round, pid, rings[i], rings[(i + 1) % 3], 2000) for i, pid in enumerate(team)]
    for call in calls:
        assert call.fetch(WAIT) > 0
    left = [rings[0].take(timeout=WAIT) for _ in range(20)]
    assert len(left) == 20 and not any(ring.isready() for ring in rings)


def test_another_call_does_not_tell_of_it_either(team: list[int], patient: None) -> None:
    """One call puts and stays; another one of the same process sees that in memory: its answer waits as well."""
    owner, producer, other = team
    channel = ready_channel(owner, producer)
    remotecall_fetch(lambda: box().update(seen=False, **{"let go": threading.Event()}), producer)
    with stopped(owner):
        call = remotecall(put_then, producer, channel, "memory", other, None)
        look = remotecall(lambda: box()["seen"], producer)
        with pytest.raises(TimeoutError):
            while not look.fetch(0.3):
                look = remotecall(lambda: box()["seen"], producer)
    look.wait(WAIT)
    remotecall_fetch(lambda: box()["let go"].set(), producer)
    call.wait(WAIT)
    drained_now = [channel.take(timeout=WAIT) for _ in range(20)]
    assert drained_now == list(range(20))


def test_who_hears_of_it_finds_the_items(team: list[int]) -> None:
    """The same without stopping anybody: a third process is told, and looks."""
    owner, producer, other = team
    channel = ready_channel(owner, producer)

    def look(channel: Any) -> bool:
        return bool(channel.isready())

    def put_and_have_looked(channel: Any, other: int) -> list[bool]:
        found = []
        for _ in range(20):
            feed(channel, 8)
            found.append(remotecall_fetch(look, other, channel))
            for number in range(8):
                assert channel.take() == number
            found.append(not channel.isready())
        return found

    assert all(remotecall_fetch(put_and_have_looked, producer, channel, other))


def test_results_of_executors(team: list[int]) -> None:
    """Tasks and chunks end after their puts have arrived; in elements of maps each put waits by itself."""
    channel = RemoteChannel(lambda: Channel(2000), team[0])

    def work(number: int) -> int:
        for item in range(5):
            channel.put((number, item))
        return number

    def may_put(where: int) -> bool:
        return bool(nodes.current().ahead.may_put(where))

    seen: dict[int, list[int]] = {}

    def all_there(number: int) -> bool:
        """A task whose put waits gives its slot away, so items of others may come in between."""
        while len(seen.setdefault(number, [])) < 5:
            who, item = channel.take(timeout=0)
            seen.setdefault(who, []).append(item)
        return seen.pop(number) == list(range(5))

    with distpool.ClusterExecutor(1) as executor:
        for number in range(20):
            assert executor.submit(work, number).result(WAIT) == number
            assert all_there(number)
        assert list(executor.map(work, range(20), chunksize=10)) == list(range(20))
        assert all(map(all_there, range(20)))
        assert list(executor.map(may_put, team[:1] * 3)) == [False] * 3, "nothing could wait behind an element"
        assert executor.submit(may_put, team[0]).result(WAIT)


# -- (d) order -------------------------------------------------------------------------------------------------------


def test_order_of_one_producer(team: list[int]) -> None:
    """Small and large items, references, several channels of one owner and of two, and credits that come and go."""
    owner, producer, other = team
    channels = [RemoteChannel(lambda: Channel(30), pid) for pid in (owner, owner, other)]

    def mix(channels: list[Any], count: int) -> None:
        for number in range(count):
            for channel in channels:
                if number % 17 == 5:
                    channel.put((number, b"x" * 400_000))
                elif number % 23 == 7:
                    channel.put((number, channel))
                elif number % 13 == 3:
                    channel.put((number, "t"), timeout=WAIT)
                else:
                    channel.put((number, ""))

    def collect(channel: Any, count: int) -> list[int]:
        return [channel.take(timeout=WAIT)[0] for _ in range(count)]

    count = 300
    done = remotecall(mix, producer, channels, count)
    takers = [
        remotecall(collect, pid, channel, count) for pid, channel in zip((owner, 1, other), channels, strict=True)
    ]
    for taker in takers:
        assert taker.fetch(WAIT) == list(range(count))
    done.wait(WAIT)


def test_order_between_channels(team: list[int]) -> None:
    """Who sees an item in one channel finds what was put before it into another one, wherever that lives."""
    owner, producer, other = team

    def alternate(first: Any, second: Any, count: int) -> None:
        for number in range(count):
            first.put(number)
            second.put(number)

    def follow(first: Any, second: Any, count: int) -> bool:
        return all(second.take(timeout=WAIT) == first.take(timeout=0) for _ in range(count))

    for home in (owner, other):
        first, second = RemoteChannel(lambda: Channel(500), owner), RemoteChannel(lambda: Channel(500), home)
        done = remotecall(alternate, producer, first, second, 300)
        # The owner looks by itself: at once, without a request that could come too late.
        assert remotecall_fetch(follow, owner, first, second, 300)
        done.wait(WAIT)


# -- (e) failures ----------------------------------------------------------------------------------------------------


def test_many_producers_and_takers(team: list[int]) -> None:
    """Each item once, whatever the room, with takers that give up all the time."""
    owner, producer, other = team

    def give_up_often(channel: Any) -> list[int]:
        found = []
        while True:
            try:
                found.append(channel.take(timeout=0.001))
            except TimeoutError:
                continue
            except ChannelClosedError:
                return found

    for size in (8, 64, 1000):
        channel = RemoteChannel(lambda: Channel(size), owner)
        takers = [remotecall(give_up_often, pid, channel) for pid in team]
        makers = [remotecall(feed, pid, channel, 300, start) for pid, start in ((producer, 0), (other, 300), (1, 600))]
        for maker in makers:
            maker.wait(WAIT)
        channel.close()
        found = sorted(sum((taker.fetch(WAIT) for taker in takers), []))
        assert found == list(range(900))


def test_interrupted_producer(team: list[int]) -> None:
    """KeyboardInterrupt at any moment: what was put before is there, in order, once; at most one item more."""
    owner, producer, _ = team
    channel = RemoteChannel(lambda: Channel(50), owner)

    def put_for_ever(channel: Any, base: int) -> None:
        number = base
        try:
            while True:
                channel.put(number)
                number += 1
        except KeyboardInterrupt:
            box()["put"] = number

    base = 0
    for round_number in range(15):
        call = remotecall(put_for_ever, producer, channel, base)
        first = base
        for number in range(first, first + 40 + round_number * 7):
            assert channel.take(timeout=WAIT) == number
            base = number + 1
        distpool.interrupt([producer])
        expected = base
        while True:  # what it has put and we have not taken
            ended = call.isready()
            try:
                assert channel.take(timeout=0.5 if not ended else 0.0) == expected
            except TimeoutError:
                if ended:
                    break
                continue
            expected += 1
        with contextlib.suppress(RemoteException):
            call.fetch(WAIT)
        put = remotecall_fetch(lambda: box().get("put", -1), producer)
        assert put <= expected <= put + 1
        base = expected
        remotecall_fetch(lambda: box().pop("put", None), producer)


def test_owner_dies() -> None:
    """Puts that the owner has not acknowledged fail with it: in the call that made them."""
    owner, producer = distpool.addprocs(2)
    try:
        channel = ready_channel(owner, producer)
        ospid = remotecall_fetch(os.getpid, owner)
        stop(ospid)
        call = remotecall(feed, producer, channel, 50)
        with pytest.raises(TimeoutError):
            call.wait(0.1)
        os.kill(ospid, signal.SIGKILL)
        with pytest.raises(RemoteException) as info:
            call.fetch(WAIT)
        assert isinstance(info.value.captured.ex, ProcessExitedException)
        assert remotecall_fetch(abs, producer, -1) == 1, "later calls are not told again"
        with pytest.raises(RemoteException):
            remotecall_fetch(feed, producer, channel, 1)
        busy = remotecall_fetch(lambda: len(nodes.current().ahead.busy), producer)
        assert busy == 0
    finally:
        distpool.rmprocs([producer])


def put_without_memory(channel: Any, item: Any) -> int:
    """As if there was none for a batch of items."""
    pack = ahead.structs.pack_items

    def refuse(items: list[bytes]) -> bytes:
        ahead.structs.pack_items = pack
        raise MemoryError

    ahead.structs.pack_items = refuse
    try:
        channel.put(item)
    finally:
        ahead.structs.pack_items = pack
    return len(nodes.current().ahead.busy)


def test_a_batch_that_there_is_no_memory_for(team: list[int]) -> None:
    """The call that has put the items fails; neither it nor a later one waits for an answer that cannot come."""
    owner, producer = team[:2]
    channel = ready_channel(owner, producer)
    with pytest.raises(RemoteException) as info:
        remotecall(put_without_memory, producer, channel, "lost").fetch(WAIT)
    assert isinstance(info.value.captured.ex, MemoryError)
    assert remotecall(feed, producer, channel, 3).fetch(WAIT) == 3
    assert [channel.take(timeout=WAIT) for _ in range(3)] == [0, 1, 2]


def test_a_large_item_is_in_no_batch(team: list[int]) -> None:
    """That would be another copy of it; and its length might not fit into what is written there."""
    owner, producer = team[:2]
    channel = ready_channel(owner, producer)
    item = bytes(ahead.UNANSWERED_BYTES)
    assert remotecall(put_without_memory, producer, channel, item).fetch(WAIT) == 0
    assert channel.take(timeout=WAIT) == item


def test_producer_dies() -> None:
    """What it had put and sent is there, its room is free, and nobody waits for it."""
    owner, producer = distpool.addprocs(2)
    try:
        for _ in range(2):
            channel = ready_channel(owner, producer, 100)

            def put_and_die(channel: Any) -> None:
                feed(channel, 4)  # as many as are sent without an answer
                os.kill(os.getpid(), signal.SIGKILL)

            with pytest.raises(ProcessExitedException):
                remotecall_fetch(put_and_die, producer, channel)
            assert [channel.take(timeout=WAIT) for _ in range(4)] == list(range(4))
            remotecall_fetch(feed, owner, channel, 100)
            channel.close()
            assert remotecall_fetch(lambda c: len(list(c)), owner, channel) == 100
            (producer,) = distpool.addprocs(1)
    finally:
        distpool.rmprocs([owner, producer])


def test_producer_is_removed() -> None:
    owner, producer = distpool.addprocs(2)
    channel = ready_channel(owner, producer, 100)
    remotecall_fetch(feed, producer, channel, 30)
    distpool.rmprocs([producer])
    assert [channel.take(timeout=WAIT) for _ in range(30)] == list(range(30))
    remotecall_fetch(feed, owner, channel, 100)
    distpool.rmprocs([owner])


def test_threads_of_a_removed_producer() -> None:
    """A thread of the user's own puts while its process is asked to go: what it had put has arrived."""
    owner, producer = distpool.addprocs(2)
    channel = ready_channel(owner, producer, 100_000)

    def put_beside(channel: Any) -> None:
        for number in range(100_000):
            channel.put(number)
            box()["last"] = number

    remotecall_fetch(lambda c: threading.Thread(target=put_beside, args=(c,), daemon=True).start(), producer, channel)
    for number in range(1000):
        assert channel.take(timeout=WAIT) == number
    distpool.rmprocs([producer])
    channel.close()
    rest = remotecall_fetch(lambda c: list(c), owner, channel)
    assert rest == list(range(1000, 1000 + len(rest)))
    distpool.rmprocs([owner])


def test_references_in_items(team: list[int]) -> None:
    """They are lent as before, between items that go ahead; in the end nobody owns anything."""
    owner, producer, other = team
    channel = ready_channel(owner, producer)
    inner = RemoteChannel(lambda: Channel(2), other)
    key = distpool.remoteref_id(inner)

    def put_mixed(channel: Any, inner: Any) -> None:
        for number in range(20):
            channel.put(number)
            channel.put((number, inner))

    remotecall_fetch(put_mixed, producer, channel, inner)
    del inner
    for number in range(20):
        assert channel.take(timeout=WAIT) == number
        found, reference = channel.take(timeout=WAIT)
        assert found == number
        assert reference.put(number).take() == number
        del reference
    wait_until(lambda: key not in distpool.debug.refs(other))


def test_who_drops_the_channel_has_put_before(team: list[int]) -> None:
    """The last reference goes with items on their way: the channel lives until they have come, and they live on."""
    owner, producer, _ = team

    def put_by_thread(source: Any) -> None:
        """Outside of any call: nothing waits for the items but the news that the reference is gone."""
        channel = source.take()
        channel.put(-1)
        channel.put(-1)
        feed(channel, 100)

    for _ in range(5):
        channel = RemoteChannel(lambda: Channel(1000), owner)
        source = RemoteChannel(lambda: Channel(1), producer)
        source.put(channel)
        remotecall_fetch(lambda s: threading.Thread(target=put_by_thread, args=(s,)).start(), producer, source)
        assert [channel.take(timeout=WAIT) for _ in range(102)] == [-1, -1, *range(100)]
        key = distpool.remoteref_id(channel)
        wait_until(lambda key=key: producer not in distpool.debug.refs(owner).get(key, set()))
        remotecall_fetch(feed, owner, channel, 1000)  # its room is free
        del channel
        wait_until(lambda key=key: key not in distpool.debug.refs(owner))


def test_finalized_channels(team: list[int]) -> None:
    owner, producer, _ = team
    channel = ready_channel(owner, producer)

    def put_and_finalize(channel: Any) -> str:
        feed(channel, 50)
        channel.finalize()
        try:
            channel.put(50)
        except RuntimeError as error:
            return str(error)
        return ""

    assert "finalized" in remotecall_fetch(put_and_finalize, producer, channel)
    assert [channel.take(timeout=WAIT) for _ in range(50)] == list(range(50))
    remotecall_fetch(feed, producer, channel, 10)
    assert [channel.take(timeout=WAIT) for _ in range(10)] == list(range(10))


def test_nothing_is_left(team: list[int]) -> None:
    """After all of the above: no batch, no flight, nobody who waits."""
    for pid in team:
        left = remotecall_fetch(
            lambda: (
                (
                    [(one.batch, one.flying) for one in nodes.current().ahead.busy],
                    nodes.current().ahead._landings,
                )
                if nodes.current().ahead is not None
                else ([], [])
            ),
            pid,
        )
        assert left == ([], [])


def test_settling_in_the_master_is_nothing() -> None:
    assert nodes.current().ahead is None
    ahead.settle_puts()
    assert ahead.group_of(nodes.current()) is None


def come_back(name: str) -> int:
    """On the producer: its object of a channel goes; between the look that finds none and the news to the owner there
    is another one, whose first item is on its way before that news. How much credit it has then."""
    node = nodes.current()
    first = box().pop(name)
    seen: list[Any] = []
    data, _ = codec.encode(first, node.pid, seen)
    node.references().lend(seen, node.pid)  # as if it had been sent here once more
    del seen
    old, old_send, peers = first._ahead, first._ahead.send, node.peers
    asked, done, threads = threading.Event(), threading.Event(), []

    def noting(pid: int, kind: Any, *rest: Any) -> None:
        type(peers).send(peers, pid, kind, *rest)
        if kind == Kind.CHANNEL:
            asked.set()

    def put() -> None:
        second = codec.decode(data)
        box()[name] = second
        second.put(("warm", 0))
        done.set()

    def send() -> None:
        old_send()
        if not threads:
            threads.append(threading.Thread(target=put, daemon=True))
            threads[0].start()
            asked.wait(30)

    old.send, peers.send = send, noting
    try:
        del first
        assert done.wait(30)
    finally:
        del old.send, peers.send
    return credit(box()[name])


def length(channel: Any) -> int:
    """On the owner."""
    return len(nodes.current().references().owner.get(channel._handle.rrid).channel)


def test_who_goes_gives_back_its_own_credit_only(team: list[int]) -> None:
    """Not that of an object of the same channel that has come meanwhile: it would be used without room for it."""
    owner, producer, _ = team
    size = 100
    channel = RemoteChannel(lambda: Channel(size), owner)
    name = f"channel {channel.id}"
    remotecall_fetch(keep, producer, name, channel)
    remotecall_fetch(feed, owner, channel, 60)  # so that the first object gets a small credit, and the second one more
    remotecall_fetch(lambda: warm(box()[name], 1), producer)
    assert [channel.take(timeout=WAIT) for _ in range(60)] == list(range(60))
    drained(channel, 1)
    assert remotecall_fetch(come_back, producer, name) > 0
    drained(channel, 1)

    def fill(channel: Any) -> None:
        with contextlib.suppress(TimeoutError):
            for number in range(size):
                channel.put(number, timeout=0.1)

    remotecall_fetch(fill, owner, channel)
    remotecall_fetch(lambda: fill(box()[name]), producer)
    assert remotecall_fetch(length, owner, channel) == size


def test_credits_that_come_late_are_given_back(team: list[int]) -> None:
    """All room that was reserved for a process is free when it holds the channel no more, whatever was on its way."""
    owner, producer, _ = team
    channel = ready_channel(owner, producer)
    name = f"channel {channel.id}"

    def last_words(name: str) -> None:
        channel = box().pop(name)
        for number in range(5):  # answered, each with a credit, when there is no object any more
            channel.put(number)

    def reserved(channel: Any) -> int:
        return nodes.current().references().owner.get(channel._handle.rrid).channel._room.taken

    remotecall_fetch(last_words, producer, name)
    assert [channel.take(timeout=WAIT) for _ in range(5)] == list(range(5))
    wait_until(lambda: remotecall_fetch(reserved, owner, channel) == 0)
