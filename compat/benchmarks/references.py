"""J1-J4: Julia's half: remote calls, channels, references, many idle workers. Only distpool has it: the peers within a
row are its own executor and the queues of `multiprocessing`.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil

import distpool
from compat.benchmarks import tasks
from compat.benchmarks.peers import NotApplicable
from compat.benchmarks.workloads import Answer, Params, check


def only_distpool(peer_name: str) -> None:
    """No peer has references."""
    if peer_name != "distpool":
        raise NotApplicable("no references")


def mean_us(call: Callable[[], object], count: int) -> float:
    """Microseconds per call."""
    begin = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - begin) / count * 1e6


def lonely(pid: int, count: int) -> float:
    """On a worker: a no-op on another one, again and again."""
    return mean_us(lambda: distpool.remotecall_fetch(tasks.noop, pid), count)


def j1(peer_name: str, workers: int, params: Params) -> Answer:
    """remotecall_fetch of a no-op from the master and from a worker, and the executor's lonely call, in turns."""
    only_distpool(peer_name)
    count = params["calls"] // 10
    rounds: dict[str, list[float]] = {"fetch_us": [], "worker_us": [], "executor_us": []}
    with distpool.ClusterExecutor(2) as executor:
        executor.submit(tasks.noop).result()
        while len(executor.workers) < 2:
            executor.submit(tasks.noop).result()
        one, two = executor.workers
        distpool.remotecall_fetch(lonely, one, two, 50)
        for _ in range(10):
            rounds["executor_us"].append(mean_us(lambda: executor.submit(tasks.noop).result(), count))
            rounds["fetch_us"].append(mean_us(lambda: distpool.remotecall_fetch(tasks.noop, one), count))
            rounds["worker_us"].append(distpool.remotecall_fetch(lonely, one, two, count))
    return {name: statistics.median(values) for name, values in rounds.items()}


def feed(put: Callable[[Any], object], count: int) -> None:
    """The producer's side."""
    for number in range(count):
        put(number)


def drain(take: Callable[[], Any], count: int) -> float:
    """The consumer's side: items per second from the first one on."""
    check(take() == 0, "the first item is not 0")
    begin = time.perf_counter()
    for number in range(1, count):
        check(take() == number, f"item {number} is not {number}")
    return (count - 1) / (time.perf_counter() - begin)


def between_processes(queue: Any, count: int) -> float:
    """Items per second through a queue of multiprocessing, from one child process to another."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    producer = context.Process(target=feed, args=(queue.put, count))
    consumer = context.Process(target=lambda: theirs.send(drain(queue.get, count)))
    for process in (consumer, producer):
        process.start()
    rate = float(ours.recv())
    for process in (consumer, producer):
        process.join()
    return rate


def through_channel(owner: int, producer: int, consumer: int, count: int) -> float:
    """Items per second through a channel on `owner`: the median of three."""
    rates = []
    for _ in range(3):
        channel = distpool.RemoteChannel(lambda: distpool.Channel(1000), owner)
        taken = distpool.remotecall(lambda channel=channel: drain(channel.take, count), consumer)
        put = distpool.remotecall(lambda channel=channel: feed(channel.put, count), producer)
        rates.append(taken.result())
        put.wait()
    return statistics.median(rates)


def j2(peer_name: str, workers: int, params: Params) -> Answer:
    """put and take between two processes: RemoteChannel, Manager().Queue(), multiprocessing.Queue.

    `channel_per_s`: the channel lives where its items are taken. Elsewhere each take is a round trip (`refs.channels`
    says why), so there are fewer items. The master neither puts nor takes.
    """
    only_distpool(peer_name)
    count, context = params["items"], multiprocessing.get_context("fork")
    queue_rate = between_processes(context.Queue(), count)
    with context.Manager() as manager:
        manager_rate = between_processes(manager.Queue(), count // 10)
    producer, consumer = distpool.addprocs(2)
    answer = {
        "channel_per_s": through_channel(consumer, producer, consumer, count),
        "at_producer_per_s": through_channel(producer, producer, consumer, count // 10),
        "at_master_per_s": through_channel(1, producer, consumer, count // 10),
        "queue_per_s": queue_rate,
        "manager_per_s": manager_rate,
    }
    distpool.rmprocs(producer, consumer)
    return answer


def pass_on(refs: list[Any]) -> int:
    """On the third process: it had them, and drops them."""
    return len(refs)


def blocks_in_use() -> int:
    """Of this process, without garbage."""
    gc.collect()
    return sys.getallocatedblocks()


def j3(peer_name: str, workers: int, params: Params) -> Answer:
    """References made on one worker, forwarded to another one, dropped: time until the owner's table is empty.

    A burst of calls leaves library threads behind, as many as ran at a time, which end after 10 s without work. So
    growth is what is left after that: blocks of Python's allocator, and of the process (the C library keeps the stacks
    and arenas of threads that were: up to 2 MB here, more after a burst of more threads).
    """
    only_distpool(peer_name)
    owner, third = distpool.addprocs(2)
    count, size = params["references"], 1000

    def round_trip(number: int) -> float:
        begin = time.perf_counter()
        for _ in range(number // size):
            refs = [distpool.remotecall(tasks.noop, owner) for _ in range(size)]
            check(distpool.remotecall_fetch(pass_on, third, refs) == size, "references were lost")
            refs[-1].wait()  # what is still to be run would be counted as something that is still referred to
            del refs
        return number / (time.perf_counter() - begin)

    def emptied() -> float:
        begin = time.perf_counter()
        while distpool.debug.refs(owner):
            gc.collect()
            check(time.perf_counter() - begin < 30, "the owner's table does not become empty")
            time.sleep(0.005)
        return time.perf_counter() - begin

    def used() -> tuple[float, float]:
        time.sleep(11)
        blocks = distpool.remotecall_fetch(blocks_in_use, owner)
        return blocks, psutil.Process(distpool.remotecall_fetch(os.getpid, owner)).memory_info().rss / 1024

    round_trip(count // 2)
    emptied()
    blocks, memory = used()
    rate = round_trip(count - count // 2)
    seconds = emptied()
    more_blocks, more_memory = used()
    distpool.rmprocs(owner, third)
    growth = {"owner_growth_blocks": more_blocks - blocks, "owner_growth_kb": more_memory - memory}
    return {"per_s": rate, "empty_s": seconds, **growth}


def j4(peer_name: str, workers: int, params: Params) -> Answer:
    """128 idle local workers: threads of the master, and CPU of everybody."""
    only_distpool(peer_name)
    pids = distpool.addprocs(params["workers"])
    ospids = [distpool.remotecall_fetch(os.getpid, pid) for pid in pids]
    time.sleep(11)  # library threads that have nothing to do end after 10 s
    processes = [psutil.Process(), *map(psutil.Process, ospids)]
    before = sum(sum(process.cpu_times()[:2]) for process in processes)
    begin = time.perf_counter()
    time.sleep(params["idle_s"])
    wall = time.perf_counter() - begin
    used = sum(sum(process.cpu_times()[:2]) for process in processes) - before
    threads = threading.active_count()
    distpool.rmprocs(pids)
    return {"threads": threads, "idle_cpu_percent": used / wall * 100}


WORKLOADS = {"J1": j1, "J2": j2, "J3": j3, "J4": j4}
