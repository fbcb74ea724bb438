"""W2-W9 of the benchmark. Each function runs in a process of its own, gets a peer's name, the number of workers and
its sizes, asserts that the answers are right and returns plain numbers. To add one: write it and list it below."""

from __future__ import annotations

import gc
import os
import random
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from compat.benchmarks import tasks
from compat.benchmarks.measure import Meter, meet, rss, uss, worker_pids
from compat.benchmarks.peers import PEERS, NotApplicable, Peer

Params = dict[str, Any]
Answer = dict[str, Any]


@contextmanager
def opened(peer_name: str, workers: int) -> Iterator[tuple[Peer, set[int]]]:
    """A running peer and the ospids of its processes."""
    peer = PEERS[peer_name]()
    peer.open(workers)
    try:
        yield peer, meet(peer, workers)
    finally:
        peer.close()


def check(condition: bool, what: str) -> None:
    """A wrong answer ends the measurement."""
    if not condition:
        raise AssertionError(what)


def percentile(values: list[float], share: float) -> float:
    """The value below which ``share`` of all lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def w2(peer_name: str, workers: int, params: Params) -> Answer:
    """submit(no-op).result(), one at a time: two passes."""
    count = PEERS[peer_name]().count(params, "calls")
    with opened(peer_name, workers) as (peer, pids):
        for _ in range(50):
            peer.call(tasks.noop)
        passes, latencies = [], []
        with Meter(pids) as meter:
            for _ in range(2):
                start = time.perf_counter()
                for _ in range(count):
                    before = time.perf_counter()
                    peer.call(tasks.noop)
                    latencies.append(time.perf_counter() - before)
                passes.append((time.perf_counter() - start) / count)
        check(peer.call(tasks.increment, 1) == 2, "wrong result")
    return {
        "us": statistics.mean(passes) * 1e6,
        "first_pass_us": passes[0] * 1e6,
        "second_pass_us": passes[1] * 1e6,
        "p50_us": percentile(latencies, 0.5) * 1e6,
        "p99_us": percentile(latencies, 0.99) * 1e6,
        "cpu_parent_us": meter.parent / count / 2 * 1e6,
        "cpu_workers_us": meter.workers / count / 2 * 1e6,
    }


def w3(peer_name: str, workers: int, params: Params) -> Answer:
    """Many submits, then all results."""
    count = PEERS[peer_name]().count(params, "tasks")
    with opened(peer_name, workers) as (peer, pids):
        peer.all(tasks.increment, [(index,) for index in range(200)])
        calls: list[tuple[Any, ...]] = [()] * count
        with Meter(pids) as meter:
            results = peer.all(tasks.noop, calls)
        check(results == [None] * count, "wrong results")
    return {
        "tasks": count,
        "per_s": count / meter.wall,
        "cpu_us": (meter.parent + meter.workers) / count * 1e6,
        "cpu_parent_us": meter.parent / count * 1e6,
        "cpu_workers_us": meter.workers / count * 1e6,
    }


def w4(peer_name: str, workers: int, params: Params) -> Answer:
    """map over ints with chunksize 1, 100 and the library's own choice."""
    answer: Answer = {}
    fast = PEERS[peer_name]().fast
    with opened(peer_name, workers) as (peer, pids):
        peer.map(tasks.increment, range(500), 1)
        for label, chunksize in (("chunk1", 1), ("chunk100", 100), ("default", None)):
            count = params["items"] if fast or (chunksize == 100 and peer.scale == 1) else params["slow_items"]
            try:
                runs: list[Meter] = []
                while not runs or (sum(run.wall for run in runs) < 1.0 and len(runs) < params["repeat"]):
                    with Meter(pids) as meter:
                        results = peer.map(tasks.increment, range(count), chunksize)
                    runs.append(meter)
                    check(results == list(range(1, count + 1)), "wrong results")
                meter = sorted(runs, key=lambda run: run.wall)[len(runs) // 2]
            except NotApplicable:
                continue
            answer[f"{label}_per_s"] = count / meter.wall
            answer[f"{label}_cpu_us"] = (meter.parent + meter.workers) / count * 1e6
    if not answer:
        raise NotApplicable("no map")
    return answer


def w5(peer_name: str, workers: int, params: Params) -> Answer:
    """A big array in, out, both ways; one kilobyte both ways."""
    import numpy

    answer: Answer = {}
    elements, repeat = params["elements"], params["repeat"]
    if not PEERS[peer_name]().arrays:
        raise NotApplicable("sends only plain Python values")
    array = numpy.full(elements, 7.0)
    answer.update(memcpy(array, repeat))
    with opened(peer_name, workers) as (peer, _):
        moves: dict[str, Callable[[], Any]] = {
            "in": lambda: peer.call(tasks.size_of, array) == elements,
            "out": lambda: peer.call(tasks.kept_array, elements)[-1] == 7.0,
            "both": lambda: peer.call(tasks.identity, array)[0] == array[0],
        }
        for name, move in moves.items():
            began = time.perf_counter()
            for _ in range(workers):  # every worker once; a slow peer has no such first time worth a second move
                move()
                if time.perf_counter() - began > 0.3:
                    break
            times: list[float] = []
            while len(times) < (2 if sum(times) > params["seconds"] else repeat):
                array[0] = len(times)  # not the same bytes again: a cached copy would not count
                start = time.perf_counter()
                right = move()
                times.append(time.perf_counter() - start)
                check(bool(right), f"array {name}: wrong answer (an earlier content of the array?)")
            answer[f"{name}_ms"] = statistics.median(times) * 1e3
        payload, times = os.urandom(1024), list[float]()
        for _ in range(params["small"]):
            start = time.perf_counter()
            back = peer.call(tasks.identity, payload)
            times.append(time.perf_counter() - start)
            check(back == payload, "1 KB: wrong answer")
        answer["kb_ms"] = statistics.mean(times) * 1e3
    return answer


def memcpy(array: Any, repeat: int) -> Answer:
    """The limit on this machine now: copying the same array, into kept and into fresh memory."""
    import numpy

    target, times, fresh = numpy.empty_like(array), [], []
    numpy.copyto(target, array)
    for _ in range(repeat):
        start = time.perf_counter()
        numpy.copyto(target, array)
        middle = time.perf_counter()
        again = array.copy()
        fresh.append(time.perf_counter() - middle)
        times.append(middle - start)
        del again
    return {
        "memcpy_ms": statistics.median(times) * 1e3,
        "memcpy_fresh_ms": statistics.median(fresh) * 1e3,
        "socket_ms": socket_copy(array, repeat) * 1e3,
    }


def socket_copy(array: Any, repeat: int) -> float:
    """Seconds for the same bytes over plain loopback TCP into a kept buffer of another process, acknowledged."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        child = os.fork()
        if child == 0:
            with server.accept()[0] as peer:
                buffer = memoryview(bytearray(array.nbytes))
                for _ in range(repeat + 1):
                    got = 0
                    while got < len(buffer):
                        got += peer.recv_into(buffer[got:])
                    peer.sendall(b"k")
            os._exit(0)
        times = []
        with socket.create_connection(server.getsockname()) as connection:
            for _ in range(repeat + 1):
                start = time.perf_counter()
                connection.sendall(memoryview(array).cast("B"))
                connection.recv(1)
                times.append(time.perf_counter() - start)
        os.waitpid(child, 0)
    return statistics.median(times[1:])


def w6(peer_name: str, workers: int, params: Params) -> Answer:
    """A function that holds a big array, called 200 times in one map on a running pool."""
    import numpy

    if not PEERS[peer_name]().arrays:
        raise NotApplicable("sends only functions by name")
    count = params["calls"]
    with opened(peer_name, workers) as (peer, pids):
        holder = tasks.Holder(numpy.full(params["elements"], 7.0))
        peer.map(tasks.increment, range(workers * 4), peer.holder_chunk)
        memory = sum(rss(pid) for pid in pids)
        with Meter(pids) as meter:
            results = peer.map(holder, range(count), peer.holder_chunk)
        check(results == [7.0 + index for index in range(count)], "wrong results")
        growth = sum(rss(pid) for pid in pids if psutil.pid_exists(pid)) - memory
    return {"s": meter.wall, "cpu_s": meter.parent + meter.workers, "workers_rss_growth_mb": growth / 1e6}


def uneven(count: int, mean: float) -> list[float]:
    """The same uneven task lengths for everybody."""
    chance = random.Random(20240501)
    return [min(chance.expovariate(1 / mean), mean * 20) for _ in range(count)]


def w7(peer_name: str, workers: int, params: Params) -> Answer:
    """Uneven short tasks: share of the ideal, sleeping and computing, by submit and by map; and a long one in front."""
    lengths = uneven(PEERS[peer_name]().count(params, "tasks"), 0.001)
    ideal = sum(lengths) / workers
    answer: Answer = {"cpu_bare": bare_share(lengths, workers)}
    with opened(peer_name, workers) as (peer, pids):
        peer.all(tasks.sleep, [(0.0001,)] * 200)
        for kind, function in (("sleep", tasks.sleep), ("cpu", tasks.burn)):
            with Meter(pids) as meter:
                results = peer.all(function, [(length,) for length in lengths])
            check(results == lengths, "wrong results")
            answer[f"{kind}_submit"] = ideal / meter.wall
            try:
                with Meter(pids) as meter:
                    results = peer.map(function, lengths, peer.uneven_chunk)
            except NotApplicable:
                continue
            check(results == lengths, "wrong results")
            answer[f"{kind}_map"] = ideal / meter.wall
        answer["behind_long_ms"] = behind_long(peer)
    return answer


def bare_share(lengths: list[float], workers: int) -> float:
    """What two forked processes with a perfect split and no messages reach now: the machine's own ceiling."""
    start = time.perf_counter()
    children = []
    for index in range(workers):
        child = os.fork()
        if child == 0:
            for length in lengths[index::workers]:
                tasks.burn(length)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return sum(lengths) / workers / (time.perf_counter() - start)


def behind_long(peer: Peer) -> float:
    """Milliseconds until 200 short tasks are done that were submitted after one of 0.6 s (the other worker is free)."""
    try:
        long = peer.start(tasks.sleep, 0.6)
    except NotApplicable:
        return float("nan")
    start = time.perf_counter()
    for handle in [peer.start(tasks.sleep, 0.0005) for _ in range(200)]:
        peer.finish(handle)
    elapsed = time.perf_counter() - start
    peer.finish(long)
    return elapsed * 1e3


def w8(peer_name: str, workers: int, params: Params) -> Answer:
    """Parent bytes per pending task, and growth over many tasks."""
    pending, total = (PEERS[peer_name]().count(params, name) for name in ("pending", "total"))
    with opened(peer_name, workers) as (peer, pids), tempfile.TemporaryDirectory() as directory:
        gate = os.path.join(directory, "open")
        peer.all(tasks.increment, [(index,) for index in range(200)])
        gc.collect()
        before = rss()
        blockers = [peer.start(tasks.wait_for_file, gate) for _ in range(workers)]
        handles = [peer.start(tasks.noop) for _ in range(pending)]
        held = rss() - before
        open(gate, "w").close()
        for handle in blockers + handles:
            peer.finish(handle)
        del handle, handles, blockers
        gc.collect()
        rounds = 20
        sizes = []
        for _ in range(rounds):
            peer.all(tasks.increment, [(index,) for index in range(total // rounds)])
            gc.collect()
            sizes.append((rss(), sum(rss(pid) for pid in pids if psutil.pid_exists(pid))))
    # Python takes and returns memory by the MiB, so one look may be a MiB off: the middle one of three.
    half = [statistics.median(column) for column in zip(*sizes[rounds // 2 - 3 : rounds // 2], strict=True)]
    end = [statistics.median(column) for column in zip(*sizes[-3:], strict=True)]
    return {
        "bytes_per_pending": held / pending,
        "pending": pending,
        "tasks": total,
        "parent_growth_kb": (end[0] - half[0]) / 1024,
        "workers_growth_kb": (end[1] - half[1]) / 1024,
    }


def w9(peer_name: str, workers: int, params: Params) -> Answer:
    """Many workers: time until all are ready, what they cost while idle."""
    peer = PEERS[peer_name]()
    count = params["workers"]
    start = time.perf_counter()
    peer.open(count)
    with tempfile.TemporaryDirectory() as directory:
        told = peer.all(tasks.rendezvous, [(directory, count, index) for index in range(count)])
    ready = time.perf_counter() - start
    check(len(set(told)) == count, f"{len(set(told))} workers instead of {count}")
    time.sleep(0.5)
    with Meter(worker_pids(told)) as meter:
        time.sleep(params["idle_s"])
    sizes = [uss(pid) for pid in set(told)]
    start = time.perf_counter()
    peer.close()
    stop = time.perf_counter() - start
    return {
        "ready_ms": ready * 1e3,
        "stop_ms": stop * 1e3,
        "idle_cpu_percent": (meter.parent + meter.workers) / meter.wall * 100,
        "uss_mb": statistics.median(sizes) / 1e6,
    }


WORKLOADS = {"W2": w2, "W3": w3, "W4": w4, "W5": w5, "W6": w6, "W7": w7, "W8": w8, "W9": w9}
