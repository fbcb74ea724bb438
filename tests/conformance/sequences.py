"""Random sequences of what one program can do with its group, each step checked against a model of what must hold.

    python tests/conformance/sequences.py SEED [STEPS] [-v]        # prints "ok" and what it did, or raises

The cases of the other modules begin with an empty group. Here launches, topologies, executors, pools, deaths,
references and calls follow each other in any order: what one leaves behind is what the next one finds.
"""

from __future__ import annotations

import collections
import concurrent.futures
import faulthandler
import gc
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import distpool
from distpool import remotecall, remotecall_fetch
from distpool.errors import ProcessExitedException, RemoteException, TopologyError

PATIENCE = 60.0
"""Seconds after which a wait is a hang."""


def square(number: int) -> int:
    return number * number


SQUARES = [square(number) for number in range(50)]


class Sequence:
    """The group of this process and the model of it. One thread uses it; `_exited` is called by library threads."""

    def __init__(self, seed: int, verbose: bool) -> None:
        self.random, self.verbose = random.Random(seed), verbose
        self.did: list[str] = []
        self.members: set[int] = set()  # pids of addprocs
        self.executors: list[distpool.ClusterExecutor] = []
        self.pools: list[distpool.DistPool] = []
        self.topology = ("all_to_all", True)  # and whether links are lazy; holds while anybody lives
        self.channels: list[tuple[distpool.RemoteChannel, int, collections.deque[int]]] = []
        self.futures: list[tuple[Any, int, int]] = []  # the future, its owner, its value
        self._exits = threading.Condition()  # protects _gone
        self._gone: set[int] = set()
        distpool.on_worker_exited(self._exited)

    def _exited(self, info: Any) -> None:
        with self._exits:
            self._gone.add(info.pid)
            self._exits.notify_all()

    # -- the model ---------------------------------------------------------------------------------------------

    def say(self, *what: object) -> None:
        self.did.append(" ".join(map(str, what)))
        if self.verbose:
            print(self.did[-1], file=sys.stderr, flush=True)

    def some(self, things: Iterable[Any]) -> Any:
        return self.random.choice(list(things))

    def is_empty(self) -> bool:
        return not (self.members or self.executors or self.pools)

    def refusal(self, topology: str, lazy: bool) -> type[Exception] | None:
        """The error of a launch with these, by API 8.9."""
        if self.is_empty() or (topology, lazy and topology == "all_to_all") == self.topology:
            return None
        return RuntimeError if topology != self.topology[0] else ValueError

    def hold(self, topology: str = "all_to_all", lazy: bool = True) -> None:
        if self.is_empty():
            self.topology = topology, lazy and topology == "all_to_all"

    def lost(self, pids: Iterable[int]) -> None:
        """These workers are gone, with what they own."""
        gone = set(pids)
        self.members -= gone
        self.channels = [entry for entry in self.channels if entry[1] not in gone]
        self.futures = [entry for entry in self.futures if entry[1] not in gone]

    def connected(self, one: int, other: int) -> bool:
        return one == other or 1 in (one, other) or self.topology[0] == "all_to_all"

    def check(self) -> None:
        living = set(distpool.workers())
        assert self.members <= living, (self.members, living)
        assert set(distpool.default_worker_pool().workers()) - {1} == self.members

    # -- steps: membership -------------------------------------------------------------------------------------

    def launch(self) -> None:
        count = self.some([1, 1, 2, 3])
        topology, lazy = self.some(["all_to_all"] * 5 + ["master_worker"]), self.some([True] * 4 + [False])
        refusal = self.refusal(topology, lazy)
        self.say("addprocs", count, topology, lazy, refusal)
        try:
            pids = distpool.addprocs(count, topology=topology, lazy=lazy)
        except (RuntimeError, ValueError) as error:
            assert type(error) is refusal, (refusal, self.topology)
            return
        assert refusal is None and len(pids) == count, (refusal, self.topology)
        self.hold(topology, lazy)
        self.members.update(pids)

    def remove(self) -> None:
        pids = self.random.sample(sorted(self.members), self.random.randint(1, len(self.members)))
        waitfor = self.some([None, 0, 30])
        self.say("rmprocs", pids, waitfor)
        gone = distpool.rmprocs(*pids, waitfor=waitfor)
        self.lost(pids)
        assert not set(pids) & set(distpool.workers())
        if self.random.random() < 0.5:
            gone.result(PATIENCE)
        try:
            remotecall_fetch(os.getpid, pids[0])
        except ProcessExitedException:
            return
        raise AssertionError("a removed worker has answered")

    def kill(self) -> None:
        pid = self.some(self.members)
        self.say("kill", pid)
        call = remotecall(time.sleep, pid, 100)
        os.kill(remotecall_fetch(os.getpid, pid), signal.SIGKILL)
        assert isinstance(call.exception(PATIENCE), ProcessExitedException)
        with self._exits:
            assert self._exits.wait_for(lambda: pid in self._gone, PATIENCE)
        self.lost([pid])

    def open_executor(self) -> None:
        asked: dict[str, Any] = {}
        if self.random.random() < 0.2:
            asked = {"topology": self.some(["all_to_all", "master_worker"]), "lazy": self.some([True, False])}
        refusal = self.refusal(**asked) if asked else None
        self.say("ClusterExecutor", asked, refusal)
        try:
            executor = distpool.ClusterExecutor(self.some([1, 2]), **asked)
        except (RuntimeError, ValueError) as error:
            assert type(error) is refusal, (refusal, self.topology)
            return
        assert refusal is None, self.topology
        self.hold(**asked)
        self.executors.append(executor)
        assert executor.submit(square, 7).result(PATIENCE) == 49  # from now on its worker holds the topology

    def open_pool(self) -> None:
        self.say("DistPool")
        self.hold()
        self.pools.append(distpool.DistPool(self.some([1, 2])))
        assert self.pools[-1].apply(square, (7,)) == 49

    def close(self) -> None:
        chosen = self.some([*self.executors, *self.pools])
        how = self.some(["wait", "later", "kill"])
        self.say("close", type(chosen).__name__, how)
        if chosen in self.executors:
            pids = chosen.workers
            call = chosen.submit(square, 3)
            if how == "kill":
                chosen.kill_workers()
                concurrent.futures.wait([call], PATIENCE)
                assert call.cancelled() or isinstance(call.exception(), ProcessExitedException | None)
            else:
                chosen.shutdown(wait=how == "wait")
                assert call.result(PATIENCE) == 9
            chosen.shutdown()
            self.executors.remove(chosen)
        else:
            pids = chosen.executor.workers
            chosen.terminate() if how == "kill" else chosen.close()
            chosen.join()
            self.pools.remove(chosen)
        self.lost(pids)

    # -- steps: work -------------------------------------------------------------------------------------------

    def use_executor(self) -> None:
        executor, way = (
            self.some(self.executors),
            self.some(["map", "submit", "die", "pmap", "scale", "inside", "cancel"]),
        )
        self.say("executor:", way)
        if way == "map":
            assert list(executor.map(square, range(50), chunksize=self.some([1, 3, 100]))) == SQUARES
        elif way == "submit":
            calls = [executor.submit(square, number) for number in range(50)]
            assert [call.result(PATIENCE) for call in calls] == SQUARES
        elif way == "die":
            bad, calls = executor.submit(os._exit, 3), [executor.submit(square, number) for number in range(5)]
            error = bad.exception(PATIENCE)
            assert isinstance(error, ProcessExitedException)
            assert [call.result(PATIENCE) for call in calls] == SQUARES[:5]
            self.lost([error.worker_id])
        elif way == "pmap":
            assert executor.pmap(square, range(50), batch_size=self.some([1, 4, "auto"])) == SQUARES
        elif way == "scale":
            executor.scale(self.some([1, 2, 3]))
            assert executor.submit(square, 2).result(PATIENCE) == 4
        elif way == "inside":
            assert executor.submit(lambda handle: handle.submit(square, 5).result(50), executor).result(PATIENCE) == 25
        else:
            calls = [executor.submit(square, number) for number in range(30)]
            for number, cancelled in enumerate([call.cancel() for call in calls]):
                assert calls[number].cancelled() if cancelled else calls[number].result(PATIENCE) == number**2

    def use_pool(self) -> None:
        pool = self.some(self.pools)
        self.say("pool")
        assert pool.map(square, range(50)) == SQUARES == list(pool.imap(square, range(50), 7))
        assert sorted(pool.imap_unordered(square, range(50))) == SQUARES

    def call(self) -> None:
        one = self.some(self.members)
        other = self.some([1, *self.members, *(pid for executor in self.executors for pid in executor.workers)])
        self.say("call", one, other)
        try:
            assert remotecall_fetch(lambda pid: remotecall_fetch(distpool.myid, pid), one, other) == other
        except RemoteException as error:
            inner = error.captured.ex
            if isinstance(inner, TopologyError):
                assert not self.connected(one, other)
            else:  # an executor replaces its workers and lets go of them when it likes
                assert isinstance(inner, ProcessExitedException) and other not in self.members
            return
        assert self.connected(one, other)

    def define(self) -> None:
        value, pids = self.random.randrange(1000), [1, *self.members]
        self.say("everywhere", pids)
        distpool.everywhere("defined = value", pids, value=value)
        for pid in pids:
            assert distpool.remotecall_eval("__main__", pid, "defined") == value

    def maps(self) -> None:
        self.say("pmap, distributed")
        assert distpool.pmap(square, range(50), batch_size=self.some([1, 5])) == SQUARES
        assert distpool.distributed(square, range(50), lambda one, other: one + other) == sum(SQUARES)

    def borrow(self) -> None:
        self.say("WorkerPool")
        pool = distpool.WorkerPool(sorted(self.members))
        taken = pool.take()
        assert taken in self.members
        pool.put(taken)
        with distpool.ClusterExecutor(pool) as executor:
            assert list(executor.map(square, range(50))) == SQUARES
        assert pool.workers() == sorted(self.members)

    def interrupt(self) -> None:
        pid = self.some(self.members)
        self.say("interrupt", pid)
        begun = distpool.RemoteChannel()

        def wait() -> None:
            begun.put(1)
            time.sleep(100)

        call = remotecall(wait, pid)
        assert begun.take(timeout=PATIENCE) == 1
        distpool.interrupt(pid)
        error = call.exception(PATIENCE)
        assert isinstance(error, RemoteException) and isinstance(error.captured.ex, KeyboardInterrupt)

    # -- steps: references -------------------------------------------------------------------------------------

    def make_future(self) -> None:
        owner, value = self.some(self.members), self.random.randrange(1000)
        setter = self.some(pid for pid in self.members if self.connected(owner, pid))
        self.say("future", owner, setter)
        if self.random.random() < 0.5:
            future = distpool.Future(owner)
            assert remotecall_fetch(lambda future, value: future.put(value) and None, setter, future, value) is None
        else:
            future = remotecall(abs, owner, value)
        self.futures.append((future, owner, value))

    def read_future(self) -> None:
        future, owner, value = self.futures.pop(self.random.randrange(len(self.futures)))
        self.say("fetch", owner)
        if self.random.random() < 0.5:
            concurrent.futures.wait([future], PATIENCE)
            assert future.done()
        assert future.fetch(PATIENCE) == value and future.isready()

    def make_channel(self) -> None:
        owner = self.some([1, *self.members])
        self.say("channel", owner)
        channel = distpool.RemoteChannel(lambda: distpool.Channel(50), owner)
        self.channels.append((channel, owner, collections.deque()))

    def use_channel(self) -> None:
        entry = channel, owner, items = self.some(self.channels)
        self.say("use channel", owner)
        for _ in range(self.random.randint(1, 5)):
            if self.random.random() < 0.6 and len(items) < 50:
                items.append(self.random.randrange(100))
                channel.put(items[-1], timeout=PATIENCE)
            elif items:
                assert channel.take(timeout=PATIENCE) == items.popleft()
        assert channel.isready() == bool(items)
        takers = [pid for pid in self.members if self.connected(owner, pid)]
        if takers and items:
            taken = remotecall_fetch(lambda channel: channel.take(timeout=50), self.some(takers), channel)
            assert taken == items.popleft()
        if self.random.random() < 0.2:
            self.channels.remove(entry)

    # -- the whole ---------------------------------------------------------------------------------------------

    def run(self, steps: int) -> None:
        always = [self.launch] * 4 + [self.make_channel, self.maps, self.define]
        while len(self.did) < steps:
            possible: list[Callable[[], None]] = list(always)
            if len(self.executors) < 3:
                possible += [self.open_executor] * 2
            if len(self.pools) < 2:
                possible.append(self.open_pool)
            if self.executors or self.pools:
                possible += [self.close] * 2
            if self.executors:
                possible += [self.use_executor] * 5
            if self.pools:
                possible += [self.use_pool] * 2
            if self.members:
                possible += [self.remove] * 2 + [self.call] * 3 + [self.make_future] * 2
                possible += [self.kill, self.borrow, self.interrupt]
            if self.futures:
                possible += [self.read_future] * 2
            if self.channels:
                possible += [self.use_channel] * 3
            faulthandler.dump_traceback_later(1.5 * PATIENCE, exit=True)
            self.some(possible)()
            self.check()

    def end(self) -> None:
        """Everything that is let go of goes: workers, and values at their owners (within 10 s, C28)."""
        faulthandler.dump_traceback_later(1.5 * PATIENCE, exit=True)
        for executor in self.executors:
            executor.shutdown()
        for pool in self.pools:
            pool.terminate()
            pool.join()
        self.futures.clear()
        self.channels.clear()
        deadline = time.monotonic() + 10
        while left := self.references():
            assert time.monotonic() < deadline, left
            time.sleep(0.02)
        distpool.rmprocs(*self.members)
        assert distpool.workers() == [1]

    def references(self) -> dict[int, Any]:
        """What is owned anywhere, but for the channel of the default pool."""
        gc.collect()
        own = repr(distpool.default_worker_pool())  # ... id=N)
        tables = {pid: distpool.debug.refs(pid) for pid in [1, *self.members]}
        found = {
            pid: {rrid: clients for rrid, clients in table.items() if pid != 1 or f"id={rrid.id})" not in own}
            for pid, table in tables.items()
        }
        return {pid: table for pid, table in found.items() if table}


def main(seed: int, steps: int = 60, verbose: bool = False) -> None:
    sequence = Sequence(seed, verbose)
    try:
        sequence.run(steps)
        sequence.end()
    except BaseException:
        print(f"seed {seed}, after:", *sequence.did[-20:], sep="\n  ", file=sys.stderr, flush=True)
        raise
    print("ok:", len(sequence.did), "steps")


if __name__ == "__main__":
    main(*map(int, [word for word in sys.argv[1:] if word != "-v"]), verbose="-v" in sys.argv)
