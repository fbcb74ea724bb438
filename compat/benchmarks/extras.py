"""X1-X7: scaling, task length, submitting threads, as_completed, asyncio, callbacks, lazy maps."""

from __future__ import annotations

import asyncio
import concurrent.futures
import statistics
import threading
import time
from typing import Any

from compat.benchmarks import tasks
from compat.benchmarks.measure import Meter, meet
from compat.benchmarks.peers import PEERS, Executor, NotApplicable
from compat.benchmarks.workloads import Answer, Params, check, opened


def x1(peer_name: str, _: int, params: Params) -> Answer:
    """Throughput, latency and parent CPU with 1 to 64 workers."""
    throughput, latency, parent = {}, {}, {}
    for count in params["workers"]:
        with opened(peer_name, count) as (peer, pids):
            peer.all(tasks.noop, [()] * 200)
            with Meter(pids) as meter:
                peer.all(tasks.noop, [()] * params["tasks"])
            times = []
            for _ in range(params["calls"]):
                start = time.perf_counter()
                peer.call(tasks.noop)
                times.append(time.perf_counter() - start)
        throughput[str(count)] = params["tasks"] / meter.wall
        parent[str(count)] = meter.parent / params["tasks"] * 1e6
        latency[str(count)] = statistics.median(times) * 1e6
    return {"tasks_per_s_by_workers": throughput, "latency_us_by_workers": latency, "parent_cpu_us_by_workers": parent}


def x2(peer_name: str, workers: int, params: Params) -> Answer:
    """What the library adds to a task of 0.01 to 100 ms: CPU beyond the task's own, and the share of the ideal time."""
    cost: dict[str, dict[str, float]] = {"submit": {}, "map": {}}
    share: dict[str, dict[str, float]] = {"submit": {}, "map": {}}
    with opened(peer_name, workers) as (peer, pids):
        peer.all(tasks.noop, [()] * 200)
        for length in params["ms"]:
            seconds = length / 1e3
            count = max(workers * 2, min(5000, int(params["seconds"] * workers / seconds)))
            for way in ("submit", "map"):
                with Meter(pids) as meter:
                    if way == "submit":
                        peer.all(tasks.burn, [(seconds,)] * count)
                    else:
                        peer.map(tasks.burn, [seconds] * count, peer.usual_chunk)
                cost[way][str(length)] = max(0.1, ((meter.parent + meter.workers) / count - seconds) * 1e6)
                share[way][str(length)] = seconds * count / workers / meter.wall
    return {
        "submit_cpu_us_by_task_ms": cost["submit"],
        "map_cpu_us_by_task_ms": cost["map"],
        "submit_share_of_ideal_by_task_ms": share["submit"],
        "map_share_of_ideal_by_task_ms": share["map"],
    }


def x3(peer_name: str, workers: int, params: Params) -> Answer:
    """Calls per second when many threads each wait for their own call."""
    rate = {}
    with opened(peer_name, workers) as (peer, _):
        for count in params["threads"]:
            each = params["calls"] // count
            wrong: list[object] = []

            def loop(each: int = each, wrong: list[object] = wrong) -> None:
                for index in range(each):
                    value = peer.call(tasks.increment, index)
                    if value != index + 1:
                        wrong.append(value)

            threads = [threading.Thread(target=loop) for _ in range(count)]
            start = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            rate[str(count)] = each * count / (time.perf_counter() - start)
            check(not wrong, f"wrong results {wrong[:3]}")
    return {"calls_per_s_by_threads": rate}


def executor_of(peer_name: str) -> Executor:
    """The peer, if it has the interface of concurrent.futures."""
    peer = PEERS[peer_name]()
    if not isinstance(peer, Executor):
        raise NotApplicable("not a concurrent.futures executor")
    return peer


def rates(count: int, meter: Meter) -> Answer:
    """Rate and CPU per task."""
    return {"per_s": count / meter.wall, "cpu_us": (meter.parent + meter.workers) / count * 1e6}


def x4(peer_name: str, workers: int, params: Params) -> Answer:
    """concurrent.futures.as_completed over all futures."""
    peer, count = executor_of(peer_name), params["tasks"]
    peer.open(workers)
    with Meter(meet(peer, workers)) as meter:
        futures = [peer.start(tasks.increment, index) for index in range(count)]
        total = sum(future.result() for future in concurrent.futures.as_completed(futures))
    peer.close()
    check(total == count * (count + 1) // 2, "wrong sum")
    return rates(count, meter)


def x5(peer_name: str, workers: int, params: Params) -> Answer:
    """asyncio: gather over run_in_executor."""
    peer, count = executor_of(peer_name), params["tasks"]
    peer.open(workers)

    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        calls = [loop.run_in_executor(peer.executor, tasks.increment, index) for index in range(count)]
        return await asyncio.gather(*calls)

    with Meter(meet(peer, workers)) as meter:
        results = asyncio.run(main())
    peer.close()
    check(results == list(range(1, count + 1)), "wrong results")
    return rates(count, meter)


def x6(peer_name: str, workers: int, params: Params) -> Answer:
    """A done-callback on every future."""
    peer, count = executor_of(peer_name), params["tasks"]
    peer.open(workers)
    lock, everything, seen = threading.Lock(), threading.Event(), [0, 0]

    def done(future: concurrent.futures.Future[Any]) -> None:
        with lock:
            seen[0] += 1
            seen[1] += future.result()
            if seen[0] == count:
                everything.set()

    with Meter(meet(peer, workers)) as meter:
        for index in range(count):
            peer.start(tasks.increment, index).add_done_callback(done)
        check(everything.wait(60), f"{seen[0]} of {count} callbacks came")
    peer.close()
    check(seen[1] == count * (count + 1) // 2, "wrong sum")
    return rates(count, meter)


def x7(peer_name: str, workers: int, params: Params) -> Answer:
    """Lazy maps over a range: imap, imap_unordered; pmap where there is one."""
    peer, count = PEERS[peer_name](), params["tasks"]
    peer.open(workers)
    pids = meet(peer, workers)
    source = getattr(peer, "executor", None) or getattr(peer, "pool", None)
    answer: Answer = {}
    for name in ("imap", "imap_unordered", "pmap"):
        if not hasattr(source, name):
            continue
        with Meter(pids) as meter:
            results = sorted(getattr(source, name)(tasks.increment, range(count)))
        check(results == list(range(1, count + 1)), f"{name}: wrong results")
        answer[f"{name}_per_s"] = count / meter.wall
        answer[f"{name}_cpu_us"] = (meter.parent + meter.workers) / count * 1e6
    peer.close()
    if not answer:
        raise NotApplicable("no lazy map")
    return answer


WORKLOADS = {"X1": x1, "X2": x2, "X3": x3, "X4": x4, "X5": x5, "X6": x6, "X7": x7}
