"""Threads of one program that use everything at the same time, while workers die, come, go, and are interrupted.

    python tests/faults/turmoil.py SEED [SECONDS]       # prints "ok" and how many uses there were, or raises

Each use ends in time with the right value or with the error that its bad luck allows; afterwards nothing is left.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import faulthandler
import gc
import itertools
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import distpool
from distpool import remotecall, remotecall_fetch
from distpool.errors import BrokenProcessPool, ProcessExitedException, RemoteException

PATIENCE = 60.0
"""Seconds after which a wait is a hang."""

LUCK = ProcessExitedException, KeyboardInterrupt
"""What may happen to any call here, as others kill its worker or interrupt it."""


def square(number: int) -> int:
    return number * number


def fail(number: int) -> None:
    raise LookupError(number)


def seven_and_an_error() -> Iterator[int]:
    yield from range(7)
    raise LookupError("no more")


SQUARES = [square(number) for number in range(50)]


def is_luck(error: BaseException | None) -> bool:
    if isinstance(error, RemoteException):
        return is_luck(error.captured.ex)
    return isinstance(error, LUCK)


def signalled(ospid: int, *signals: int) -> None:
    for number in signals:
        try:
            os.kill(ospid, number)
        except ProcessLookupError:
            return


class Turmoil:
    """What the threads share. `lock` protects `spare`; `borrowing` one executor's right to all of `base`."""

    def __init__(self) -> None:
        self.executor, self.pool = distpool.ClusterExecutor(2), distpool.DistPool(2)
        self.base = distpool.addprocs(2)  # nobody does these any harm
        self.channels = [distpool.RemoteChannel(lambda: distpool.Channel(100), pid) for pid in (1, *self.base)]
        self.spare: list[int] = []  # workers that come and go
        self.lock, self.borrowing = threading.Lock(), threading.Lock()

    def spares(self) -> list[int]:
        with self.lock:
            return list(self.spare)

    def without(self, pid: int) -> None:
        with self.lock:
            if pid in self.spare:
                self.spare.remove(pid)

    # -- the executor: its workers are killed, stopped and interrupted -------------------------------------------

    def submits(self, rng: random.Random) -> None:
        calls = [self.executor.submit(square, number) for number in range(50)]
        for number, call in enumerate(calls):
            assert is_luck(call.exception(PATIENCE)) or call.result() == SQUARES[number]

    def maps(self, rng: random.Random) -> None:
        assert list(self.executor.map(square, range(50), chunksize=rng.choice([1, 3, 50]))) == SQUARES

    def retried_map(self, rng: random.Random) -> None:
        batch_size = rng.choice([1, 4, "auto"])
        assert self.executor.pmap(square, range(50), batch_size=batch_size, retry_delays=[0] * 20) == SQUARES

    def unordered(self, rng: random.Random) -> None:
        results = self.executor.imap_unordered(square, itertools.count())
        assert len({next(results) for _ in range(20)}) == 20

    def bad_input(self, rng: random.Random) -> None:
        found = []
        try:
            for value in self.executor.map(square, seven_and_an_error(), buffersize=3):
                found.append(value)
        except LookupError:
            assert found == SQUARES[:7]
            return
        raise AssertionError("the input had an error")

    def bad_tasks(self, rng: random.Random) -> None:
        error = self.executor.submit(fail, 3).exception(PATIENCE)
        assert is_luck(error) or isinstance(error, LookupError)
        assert is_luck(self.executor.submit(os._exit, 3).exception(PATIENCE))
        error = self.executor.options(timeout=0.2).submit(time.sleep, 100).exception(PATIENCE)
        assert is_luck(error) or isinstance(error, TimeoutError)
        error = self.executor.submit(threading.Lock).exception(PATIENCE)
        assert is_luck(error) or isinstance(error, distpool.SerializationError)

    def cancels(self, rng: random.Random) -> None:
        calls = [self.executor.submit(square, number) for number in range(50)]
        for number, cancelled in enumerate([call.cancel() for call in calls]):
            call = calls[number]
            assert call.cancelled() if cancelled else is_luck(call.exception(PATIENCE)) or call.result() == number**2

    def recursion(self, rng: random.Random) -> None:
        task = self.executor.submit(lambda handle: handle.submit(square, 5).result(50), self.executor)
        assert task.result(PATIENCE) == 25

    def big_values(self, rng: random.Random) -> None:
        size = rng.choice([10, 300_000, 3_000_000])
        assert self.executor.submit(bytes, bytearray(size)).result(PATIENCE) == bytes(size)

    def coroutines(self, rng: random.Random) -> None:
        async def gather() -> list[Any]:
            calls = [self.executor.submit(square, number) for number in range(10)]
            return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), PATIENCE)

        for number, value in enumerate(asyncio.run(gather())):
            assert is_luck(value) or value == SQUARES[number]

    def scales(self, rng: random.Random) -> None:
        self.executor.scale(rng.choice([1, 2, 3]))

    def harms(self, rng: random.Random) -> None:
        pid = rng.choice(self.executor.workers or [self.base[0]])
        if pid in self.base:
            return
        try:
            if rng.random() < 0.3:
                distpool.interrupt(pid)
                return
            ospid = remotecall_fetch(os.getpid, pid)
        except ValueError:  # it has been replaced: the executor's own affair
            return
        bad = [signal.SIGKILL], [signal.SIGTERM], [signal.SIGSEGV], [signal.SIGSTOP, signal.SIGCONT]
        signalled(ospid, *rng.choice(bad))

    # -- the rest ------------------------------------------------------------------------------------------------

    def pool_maps(self, rng: random.Random) -> None:
        assert (
            self.pool.map(square, range(50), rng.choice([None, 1, 7]))
            == SQUARES
            == [*self.pool.imap(square, range(50))]
        )
        try:
            self.pool.apply_async(os._exit, (1,)).get(PATIENCE)
        except ProcessExitedException:
            return
        raise AssertionError("a dead worker has answered")

    def comes_and_goes(self, rng: random.Random) -> None:
        spare = self.spares()
        if len(spare) < 3:
            pids = distpool.addprocs_async(rng.choice([1, 2])).result(PATIENCE)
            with self.lock:
                self.spare.extend(pids)
            return
        pid = rng.choice(spare)
        self.without(pid)
        if rng.random() < 0.5:
            distpool.rmprocs(pid, waitfor=rng.choice([None, 0]))
        else:
            signalled(remotecall_fetch(os.getpid, pid), signal.SIGKILL)

    def spare_calls(self, rng: random.Random) -> None:
        for pid in self.spares():
            other = rng.choice([1, *self.base])
            assert remotecall_fetch(lambda pid: remotecall_fetch(distpool.myid, pid), pid, other) == other
            channel = distpool.RemoteChannel(lambda: distpool.Channel(1), pid)
            channel.put(5, timeout=PATIENCE)
            assert channel.take(timeout=PATIENCE) == 5

    def references(self, rng: random.Random) -> None:
        future = distpool.Future(rng.choice(self.base))
        readers = [remotecall(lambda future: future.fetch(50), pid, future) for pid in self.base]
        future.put(rng.random())
        assert {reader.fetch(PATIENCE) for reader in readers} == {future.fetch(PATIENCE)}
        channel = rng.choice(self.channels)
        takers = [remotecall(lambda channel: channel.take(timeout=50), pid, channel) for pid in self.base * 2]
        for _ in takers:
            channel.put(remotecall(square, rng.choice(self.base), 6), timeout=PATIENCE)
        assert [taker.fetch(PATIENCE).fetch(PATIENCE) for taker in takers] == [36] * 4

    def own_executor(self, rng: random.Random) -> None:
        executor = distpool.ClusterExecutor(1)
        calls = [executor.submit(square, number) for number in range(20)]
        way = rng.choice(["wait", "later", "cancel", "kill"])
        executor.kill_workers() if way == "kill" else executor.shutdown(way == "wait", cancel_futures=way == "cancel")
        concurrent.futures.wait(calls, PATIENCE)
        for number, call in enumerate(calls):
            if not call.cancelled() and not isinstance(call.exception(), BrokenProcessPool):
                assert call.result() == SQUARES[number]

    def borrows(self, rng: random.Random) -> None:
        with self.borrowing, distpool.ClusterExecutor(distpool.WorkerPool(self.base)) as executor:
            assert list(executor.map(square, range(50))) == SQUARES

    def inner_executor(self, rng: random.Random) -> None:
        def inner() -> int:
            with distpool.ClusterExecutor(1) as executor:
                return executor.submit(pow, 2, 4).result(50)

        assert self.executor.submit(inner).result(PATIENCE) == 16

    def forks(self, rng: random.Random) -> None:
        child = os.fork()
        if child == 0:
            try:
                self.executor.submit(square, 1)
            except RuntimeError:
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    # -- the whole -----------------------------------------------------------------------------------------------

    def run(self, seed: int, seconds: float) -> Counter[str]:
        rare = [self.inner_executor, self.own_executor, self.borrows, self.scales, self.bad_tasks]
        if hasattr(os, "fork") and sys.version_info < (3, 12):  # later ones warn of every fork beside threads
            rare.append(self.forks)
        uses: list[Callable[[random.Random], None]] = [*rare, *2 * [self.harms, self.pool_maps, self.comes_and_goes]]
        uses += 2 * [self.submits, self.maps, self.retried_map, self.unordered, self.bad_input, self.cancels]
        uses += 2 * [self.recursion, self.big_values, self.coroutines, self.spare_calls, self.references]
        ends, counts = time.monotonic() + seconds, Counter[str]()

        def use(number: int) -> None:
            rng = random.Random(f"{seed} {number}")
            while time.monotonic() < ends:
                chosen = rng.choice(uses)
                try:
                    chosen(rng)
                except BaseException as error:
                    if not is_luck(error):
                        raise RuntimeError(f"seed {seed}, thread {number}: {chosen.__name__}") from error
                counts[chosen.__name__] += 1

        with concurrent.futures.ThreadPoolExecutor(5) as threads:
            for thread in [threads.submit(use, number) for number in range(5)]:
                thread.result()
        return counts

    def end(self) -> None:
        self.executor.shutdown()
        self.pool.close()
        self.pool.join()
        distpool.rmprocs(*self.spares())
        self.channels.clear()
        deadline = time.monotonic() + 10
        while gc.collect() >= 0 and (left := [distpool.debug.refs(pid) for pid in self.base]) != [{}, {}]:
            assert time.monotonic() < deadline, left
            time.sleep(0.02)
        distpool.rmprocs(*distpool.workers())
        assert distpool.workers() == [1]


def main(seed: int, seconds: float = 8.0) -> None:
    faulthandler.dump_traceback_later(seconds + 2 * PATIENCE, exit=True)
    turmoil = Turmoil()
    counts = turmoil.run(seed, seconds)
    turmoil.end()
    print("ok:", counts.total(), "uses")


if __name__ == "__main__":
    main(int(sys.argv[1]), *map(float, sys.argv[2:]))
