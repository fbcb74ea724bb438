"""Values with references that nobody opens: the references go back, and none of the user's code runs for that."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import gc
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from wires import wait_until

import distpool
from distpool import Channel, RemoteChannel, remotecall, remotecall_fetch
from distpool.node import node as nodes
from distpool.refs.lent import Lent, carries_references, received, references_in
from distpool.refs.refs import Outcome
from distpool.replies import request
from distpool.transport.journal import Journal
from distpool.wire import codec
from distpool.wire.frames import Kind
from distpool.wire.messages import VALUE

WAIT = 30.0
RAN: list[str] = []


@pytest.fixture(scope="module")
def team() -> Iterator[list[int]]:
    pids = distpool.addprocs(2)
    yield pids
    distpool.rmprocs(pids)


class Own:
    """A class whose rebuilding leaves a trace."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __setstate__(self, state: dict[str, Any]) -> None:
        RAN.append("set state")
        self.__dict__ = state

    def __hash__(self) -> int:
        RAN.append("hash")
        return 1

    def __eq__(self, other: object) -> bool:
        return self is other


class Reduced:
    def __reduce__(self) -> Any:
        return RAN.append, ("reduced",), {"a": 1}, iter([1, 2]), iter([("k", "v")])


def holds(owner: int) -> int:
    """How many references to its values the owner counts for this process."""
    return sum(1 in holders for holders in distpool.debug.refs(owner).values())


def values(inner: Any) -> list[Any]:
    local = 3
    return [
        inner,
        [inner, (1, inner)],
        {"key": inner, inner: "value"},
        {"set": {1, 2}, "bytes": b"x" * 100_000, "more": bytearray(5)},
        [Own(inner), Own([inner])],
        {Own(1): inner},
        lambda: (inner, local),
        collections.OrderedDict(a=inner),
        collections.deque([inner], maxlen=3),
        Reduced(),
        [Reduced(), inner],
        contextlib.nullcontext(inner),
        ValueError(inner),
    ]


def test_reading_runs_nothing_and_finds_the_references(team: list[int]) -> None:
    """For each sort of value: the count goes up when its references are made, and down when they are dropped."""
    owner = team[0]
    refs = nodes.current().references()
    for number in range(len(values(None))):
        inner = RemoteChannel(lambda: Channel(1), owner)
        seen: list[Any] = []
        data, buffers = codec.encode(values(inner)[number], 1, seen)
        refs.lend(seen, 1)  # as if somebody had sent it to us
        del seen
        RAN.clear()  # of making it
        read = references_in(VALUE, data, buffers)
        assert not RAN, number
        del read, inner
        wait_until(lambda: not holds(owner))


def test_numpy_arrays_and_buffers() -> None:
    numpy = pytest.importorskip("numpy")
    data, buffers = codec.encode({"a": numpy.arange(100_000.0), "b": [numpy.arange(3), "distpool.refs."]})
    assert buffers
    references_in(VALUE, data, buffers)


def test_what_is_lent() -> None:
    plain = codec.encode([1, 2])[0]
    assert type(received(VALUE, plain, (), 2)) is Outcome
    loaded = codec.encode("distpool.refs.")[0]
    assert carries_references(loaded) and not carries_references(plain)
    assert type(received(-1, OSError(loaded), (), 2)) is Outcome
    outcome = received(VALUE, loaded, (), 2)
    assert type(outcome) is Lent and not outcome.opened
    assert outcome.status == VALUE and outcome.data == loaded and outcome.pid == 2
    assert outcome.buffers == () and outcome.opened


def make(owner: int) -> Any:
    """On a worker: something with references to the values of `owner`."""
    return [RemoteChannel(lambda: Channel(1), owner), remotecall(abs, owner, -1)]


def test_executor_results(team: list[int]) -> None:
    owner = team[0]
    with distpool.ClusterExecutor(1) as executor:
        for read in (False, True):
            future = executor.submit(make, owner)
            wait_until(future.done)
            assert not read or len(future.result()) == 2
            assert holds(owner)
            del future
            wait_until(lambda: not distpool.debug.refs(owner))
        list(executor.map(make, [owner] * 3))
        wait_until(lambda: not distpool.debug.refs(owner))
        found = executor.map(make, [owner] * 20)
        next(found)
        del found
        executor.submit(abs, 1).result(WAIT)
        wait_until(lambda: not distpool.debug.refs(owner))


def test_answers_of_remote_calls(team: list[int]) -> None:
    owner, other = team
    future = request(make, other, (owner,))
    wait_until(future.done)
    wait_until(lambda: holds(owner))
    del future
    wait_until(lambda: not distpool.debug.refs(owner))
    request(make, other, (owner,))  # dropped before it has come
    remotecall_fetch(abs, other, 1)
    wait_until(lambda: not distpool.debug.refs(owner))
    fetched = remotecall(make, other, owner)
    with contextlib.suppress(TimeoutError):
        fetched.fetch(timeout=0)
    wait_until(fetched.done)
    del fetched
    wait_until(lambda: not distpool.debug.refs(owner) and not distpool.debug.refs(other))


def test_answers_that_nobody_waits_for(team: list[int]) -> None:
    """The asker has given up (as by an interrupt); then the answer comes."""
    owner, other = team
    gate = RemoteChannel(lambda: Channel(1))

    def make_late(gate: Any, owner: int) -> Any:
        gate.take(timeout=WAIT)
        made = make(owner)
        done.put("made")
        return made

    done = RemoteChannel(lambda: Channel(1))
    future = request(make_late, other, (gate, owner))
    requests = nodes.current().peers.requests
    for number in list(requests._waiting):
        requests.forget(number)
    gate.put("go")
    assert done.take(timeout=WAIT) == "made"
    remotecall_fetch(abs, other, 1)
    wait_until(lambda: not distpool.debug.refs(owner))
    assert not future.done()


def test_channels(team: list[int]) -> None:
    owner, other = team
    channel = RemoteChannel(lambda: Channel(2), other)
    key = distpool.remoteref_id(channel)
    with ThreadPoolExecutor(1) as threads:
        fetching = channel._ask("fetch")
        threads.submit(lambda: channel.put(make(owner))).result(WAIT)
        wait_until(fetching.done)
        del fetching
        wait_until(lambda: not holds(owner))
        assert len(channel.take(timeout=WAIT)) == 2
    wait_until(lambda: not distpool.debug.refs(owner))
    assert set(distpool.debug.refs(other)) == {key}


def test_handles_of_executors(team: list[int]) -> None:
    """A task submits something and drops the future."""
    owner = team[0]

    def drop(executor: Any) -> int:
        future = executor.submit(make, owner)
        while not future.done():
            time.sleep(0.001)
        return 5

    with distpool.ClusterExecutor(2) as executor:
        assert executor.submit(drop, executor).result(WAIT) == 5
        wait_until(lambda: not distpool.debug.refs(owner))


def wait_and_say(seconds: float, value: Any) -> Any:
    time.sleep(seconds)
    return value


def fetched(reference: Any) -> Any:
    return reference.fetch(timeout=WAIT)


@pytest.mark.parametrize("way", ["fetched", "finalized", "kept"])
def test_a_reference_that_is_not_needed_here_any_more_when_it_is_sent(team: list[int], way: str) -> None:
    """It was written into the message when its value was elsewhere, and the message waits behind a call that runs.

    The value stays at its owner until the receiver is counted, whatever has become of the object here.
    """
    owner = team[0]
    before = set(distpool.debug.refs(1))  # the default pool, if anybody has asked for it
    with distpool.ClusterExecutor(1) as executor:
        executor.submit(abs, 1).result(WAIT)
        with distpool.ClusterExecutor(1) as keeper:
            reference: Any
            if way == "kept":
                reference = keeper.options(keep=True).submit(wait_and_say, 0.0, "value")
                wait_until(reference.done)
            else:
                reference = remotecall(wait_and_say, owner, 0.2, "value")
            executor.submit(wait_and_say, 1.0, None)  # what sleeps gives nothing away
            waiting = executor.submit(fetched, reference)
            if way == "finalized":
                distpool.finalize(reference)
            else:
                assert reference.fetch(timeout=WAIT) == "value"
            del reference
            assert waiting.result(WAIT) == "value"
            del waiting
            wait_until(lambda: not any(set(distpool.debug.refs(pid)) - before for pid in (1, owner, *keeper.workers)))


# -- results of workers that die -------------------------------------------------------------------------------------


def make_full() -> RemoteChannel:
    channel = RemoteChannel(lambda: Channel(5))
    channel.put("inside")
    return channel


def give_and_die(owner: int, how: str) -> Any:
    """In a task: its result holds a reference to a channel of `owner`, and this process is killed as soon as that is in
    the journal; or just before it would be ("unwritten"). "unsent": what it says of counts then goes with it, as when
    the link to the owner is being made, or nobody reads it."""
    peers = nodes.current().peers
    channel = remotecall_fetch(make_full, owner)
    append, send = Journal.append, peers.send

    def last(journal: Journal, record: bytes) -> bool:
        if how != "unwritten":
            append(journal, record)
        os.kill(os.getpid(), signal.SIGKILL)
        return True

    def keep_back(pid: int, kind: Any, *rest: Any) -> None:
        if kind != Kind.CLIENTS:
            send(pid, kind, *rest)

    Journal.append = last  # type: ignore[method-assign]
    if how.startswith("unsent"):
        peers.send = keep_back  # type: ignore[method-assign]
    if how == "unsent error":
        raise KeyError(channel)
    return [channel]


@pytest.mark.parametrize("how", ["sent", "unsent", "unsent error", "unwritten"])
@pytest.mark.parametrize("whose", ["of a third process", "of the master"])
def test_references_in_the_last_result_of_a_worker(team: list[int], whose: str, how: str) -> None:
    """Its owner counts right, whatever of the worker's messages has left it: no value goes too early, none stays."""
    owner = team[0] if whose == "of a third process" else 1
    before = set(distpool.debug.refs(owner))
    with distpool.ClusterExecutor(1) as executor:
        future = executor.submit(give_and_die, owner, how)
        error = future.exception(WAIT)
        if how == "unwritten":
            assert isinstance(error, distpool.ProcessExitedException)
        else:
            channel = error.args[0] if error is not None else future.result()[0]
            gc.collect()
            wait_until(lambda: distpool.debug.refs(owner)[distpool.remoteref_id(channel)] == {1})
            assert channel.take(timeout=WAIT) == "inside"
            del channel
        del future, error
    wait_until(lambda: not set(distpool.debug.refs(owner)) - before)


def test_a_result_with_references_that_nobody_wants_any_more(team: list[int]) -> None:
    """The worker has died, and the future was dropped unread."""
    owner = team[1]
    before = set(distpool.debug.refs(owner))
    with distpool.ClusterExecutor(1) as executor:
        future = executor.submit(give_and_die, owner, "unsent")
        concurrent.futures.wait([future], WAIT)
        del future
    wait_until(lambda: not set(distpool.debug.refs(owner)) - before)


def test_references_of_results_are_moved_once(team: list[int]) -> None:
    """A worker that lives: what it has and what the master has got are counted apart."""
    owner = team[1]
    before = set(distpool.debug.refs(owner))

    def give(keep: bool) -> Any:
        channel = remotecall_fetch(make_full, owner)
        if keep:
            nodes.current().kept_by_test = channel
        return [channel, channel, (channel,)]

    with distpool.ClusterExecutor(1) as executor:
        worker = executor.submit(distpool.myid).result(WAIT)
        for keep in (False, True):
            channel = executor.submit(give, keep).result(WAIT)[0]
            holders = {1, worker} if keep else {1}
            key = distpool.remoteref_id(channel)
            wait_until(lambda: distpool.debug.refs(owner)[key] == holders)
            assert channel.take(timeout=WAIT) == "inside"
            del channel
            wait_until(lambda: len(set(distpool.debug.refs(owner)) - before) == int(keep))
    wait_until(lambda: not set(distpool.debug.refs(owner)) - before)


# -- answers of workers that die -------------------------------------------------------------------------------------


def keep(channel: RemoteChannel) -> None:
    nodes.current().kept_by_test = channel


def answer_and_die(how: str) -> Any:
    """The answer holds a reference, and this process is killed as soon as it is sent. "unsent": as above."""
    peers = nodes.current().peers
    send = peers.send

    def last(pid: int, kind: Any, *rest: Any) -> None:
        if kind != Kind.CLIENTS or not how.startswith("unsent"):
            send(pid, kind, *rest)
        if kind == Kind.REPLY:
            os.kill(os.getpid(), signal.SIGKILL)

    peers.send = last  # type: ignore[method-assign]
    if how == "unsent error":
        raise KeyError(nodes.current().kept_by_test)
    return [nodes.current().kept_by_test]


def ask_and_take(worker: int, how: str) -> Any:
    """In the process that asks: the item of the channel, when the worker is known to be gone."""
    try:
        channel = remotecall_fetch(answer_and_die, worker, how)[0]
    except distpool.RemoteException as error:
        channel = error.captured.ex.args[0]
    wait_until(lambda: worker in nodes.current().peers.dead)
    return channel.take(timeout=WAIT)


@pytest.mark.parametrize("how", ["first contact", "unsent", "unsent error"])
def test_references_in_the_last_answer_of_a_worker(team: list[int], how: str) -> None:
    """Its owner counts right. The master tells owners of the reference and of the death; another process does not get
    the answer before there is a link on which the owner hears of it."""
    owner, other = team
    before = set(distpool.debug.refs(owner))
    (worker,) = distpool.addprocs(1)
    channel = remotecall_fetch(make_full, owner)
    key = distpool.remoteref_id(channel)
    remotecall_fetch(keep, worker, channel)
    del channel
    wait_until(lambda: distpool.debug.refs(owner)[key] == {worker})
    asks = remotecall_fetch if how == "first contact" else lambda f, pid, *args: f(*args)
    assert asks(ask_and_take, other, worker, how) == "inside"
    gc.collect()
    wait_until(lambda: not set(distpool.debug.refs(owner)) - before)
    assert not remotecall_fetch(lambda: set(nodes.current().refs.owner._entries), owner) - before


def pass_on_and_die(other: int) -> None:
    """The call of another process is sent, and this one is killed."""
    distpool.remote_do(keep, other, nodes.current().kept_by_test)
    os.kill(os.getpid(), signal.SIGKILL)


def test_references_in_the_last_call_of_a_worker(team: list[int]) -> None:
    owner, other = team
    (worker,) = distpool.addprocs(1)
    remotecall_fetch(lambda: remotecall_fetch(abs, other, 1), worker)  # there is a link between these two
    channel = remotecall_fetch(make_full, owner)
    key = distpool.remoteref_id(channel)
    remotecall_fetch(keep, worker, channel)
    del channel
    wait_until(lambda: distpool.debug.refs(owner)[key] == {worker})
    with pytest.raises(distpool.ProcessExitedException):
        remotecall_fetch(pass_on_and_die, worker, other)
    wait_until(lambda: distpool.debug.refs(owner)[key] == {other})
    wait_until(lambda: remotecall_fetch(lambda: hasattr(nodes.current(), "kept_by_test"), other))  # the call has begun
    assert remotecall_fetch(lambda: nodes.current().kept_by_test.take(timeout=WAIT), other) == "inside"
    remotecall_fetch(lambda: delattr(nodes.current(), "kept_by_test"), other)
    wait_until(lambda: key not in distpool.debug.refs(owner))


# -- what cannot be opened -------------------------------------------------------------------------------------------


class Bad:
    """It cannot be rebuilt."""

    def __init__(self, kind: str = "1/0") -> None:
        self.kind = kind

    def __reduce__(self) -> Any:
        return eval, (self.kind,)


def own_channel(how: str) -> Any:
    """References to a channel of this process, before and behind what spoils them."""
    channel, other = make_full(), make_full()
    if how == "error":
        raise KeyError([channel, Bad(), other])
    return [channel, Bad(), other]


def parts(how: str, team: list[int], executor: Any) -> list[tuple[Any, ...]]:
    """What fails on its way there; then on its way back."""
    spoilt = [make_full(), Bad(), make_full()]
    function = lambda: spoilt  # noqa: E731
    box = RemoteChannel(lambda: Channel(1), team[0])
    return {
        "argument": [(remotecall_fetch, len, team[0], spoilt)],
        "argument beside a bad function": [(remotecall_fetch, lambda x, y=spoilt: x, team[0], [make_full()])],
        "function": [(remotecall_fetch, function, team[0])],
        "item": [(box.put, spoilt)],
        "value": [(distpool.Future(team[0]).put, spoilt)],
        "factory": [(RemoteChannel, function, team[0])],
        "task": [(lambda: executor.submit(len, spoilt).result(WAIT),)],
        "task's function": [(lambda: executor.submit(function).result(WAIT),)],
        "task of a bad function": [(lambda: executor.submit(lambda x: spoilt, [make_full()]).result(WAIT),)],
        "span": [(lambda: list(executor.map(len, [spoilt, spoilt])),)],
        "answer": [(remotecall_fetch, own_channel, team[0], how)],
        "fetched": [(lambda: remotecall(own_channel, team[0], how).fetch(timeout=WAIT),)],
        "error": [(remotecall_fetch, own_channel, team[0], how)],
        "result": [(lambda: executor.options(pids=None).submit(own_channel, how).result(WAIT),)],
    }[how]


@pytest.mark.parametrize(
    "how",
    [
        *("argument", "argument beside a bad function", "function", "item", "value", "factory", "task"),
        *("task's function", "task of a bad function", "span", "answer", "fetched", "error", "result"),
    ],
)
def test_references_beside_what_cannot_be_loaded(team: list[int], how: str) -> None:
    """All of them go back: those that had arrived by then, and those that never will."""
    with distpool.ClusterExecutor(1) as executor:
        worker = executor.submit(distpool.myid).result(WAIT)
        owners = 1, team[0], worker
        before = {owner: set(distpool.debug.refs(owner)) for owner in owners}
        for function, *arguments in parts(how, team, executor):
            with pytest.raises(Exception, match="division by zero"):
                function(*arguments)
            del function, arguments

        def is_clean() -> bool:
            for owner in owners:
                remotecall_fetch(gc.collect, owner)
            return all(not set(distpool.debug.refs(owner)) - before[owner] for owner in owners)

        wait_until(is_clean)


class Struck:
    """Ctrl-C comes when it is rebuilt, the first time."""

    struck = False

    def __reduce__(self) -> Any:
        return strike, ()


def strike() -> str:
    Struck.struck = not Struck.struck
    if Struck.struck:
        raise KeyboardInterrupt
    return "whole"


def around(count: int) -> Any:
    return [make_full(), Struck(), *(make_full() for _ in range(count))]


@pytest.mark.parametrize("then", ["again", "dropped"])
@pytest.mark.parametrize("way", ["call", "task"])
def test_a_value_whose_opening_was_interrupted(team: list[int], way: str, then: str) -> None:
    """It can be opened again, and each reference counts once; or its references go back."""
    with distpool.ClusterExecutor(1) as executor:
        owner = team[1] if way == "call" else executor.submit(distpool.myid).result(WAIT)
        before = set(distpool.debug.refs(owner))
        future = remotecall(around, owner, 2) if way == "call" else executor.submit(around, 2)
        Struck.struck = False
        with pytest.raises(KeyboardInterrupt):
            future.result(WAIT)
        if then == "again":
            first, text, *rest = future.result(WAIT)
            assert text == "whole" and first.take(timeout=WAIT) == "inside" == rest[1].take(timeout=WAIT)
            del first, rest
        else:
            Struck.struck = True
        del future
        gc.collect()
        wait_until(lambda: not set(distpool.debug.refs(owner)) - before)
        assert not set(remotecall_fetch(lambda: set(nodes.current().refs.owner._entries), owner)) - before


# -- functions of executors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["submit", "retries", "map", "policy"])
def test_references_of_functions_go_with_them(how: str) -> None:
    """Each function that is made of the bytes has counts of its own, and the worker keeps nothing for one that nobody
    can call any more."""
    with distpool.ClusterExecutor(1) as executor:
        channel = make_full()
        key = distpool.remoteref_id(channel)

        def use(argument: int, channel: RemoteChannel = channel) -> int:
            assert channel.isready()
            if how == "retries":
                raise KeyError(argument)
            return argument

        if how == "submit":
            assert executor.submit(use, 1).result(WAIT) == 1
        elif how == "retries":
            assert isinstance(executor.options(retries=3).submit(use, 1).exception(WAIT), KeyError)
        else:
            view = executor if how == "map" else executor.options(timeout=WAIT)
            assert list(view.map(use, range(20))) == list(range(20))
        counts = nodes.current().refs.owner.get(key).clients
        assert min(counts.values()) > 0
        del use
        gc.collect()
        wait_until(lambda: counts == {1: 1})
        assert channel.take(timeout=WAIT) == "inside"
        del channel
        wait_until(lambda: key not in distpool.debug.refs(1))
