"""A job queue with two remote channels, as in the manual of Julia: who is free takes the next job.

    python examples/job_queue.py [--jobs 40] [--workers 3]

The channels live on the master; workers take from one and put into the other, for as long as the first is open. Jobs
of very different length spread by themselves, and the number of jobs need not be known beforehand.
"""

import argparse
import collections
import threading

from distpool import Channel, RemoteChannel, addprocs, myid, remote_do, rmprocs


def collatz(number):
    """Steps until `number` has become 1: nobody knows beforehand how many."""
    steps = 0
    while number != 1:
        number = number // 2 if number % 2 == 0 else 3 * number + 1
        steps += 1
    return steps


def work(jobs, results):
    """On every worker: one job after the other until the queue is closed and empty."""
    for first in jobs:
        longest = max(range(first, first + 1000), key=collatz)
        results.put((first, longest, collatz(longest), myid()))


def make_jobs(jobs, count):
    """On a thread of the master, while the workers are at it: `put` waits when the queue is full."""
    for number in range(count):
        jobs.put(1 + 1000 * number)
    jobs.close()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=40)
    parser.add_argument("--workers", type=int, default=3)
    options = parser.parse_args()

    pids = addprocs(options.workers)
    jobs = RemoteChannel(lambda: Channel(8))
    results = RemoteChannel(lambda: Channel(8))
    threading.Thread(target=make_jobs, args=(jobs, options.jobs)).start()
    for pid in pids:
        remote_do(work, pid, jobs, results)

    done = [results.take() for _ in range(options.jobs)]
    rmprocs(pids)

    first, longest, steps, _ = max(done, key=lambda result: result[2])
    shares = collections.Counter(pid for *_, pid in done)
    print(f"{len(done)} jobs: {', '.join(f'{shares[pid]} by worker {pid}' for pid in pids)}")
    print(f"longest way to 1: {steps} steps, from {longest}")
    assert sorted(job for job, *_ in done) == [1 + 1000 * number for number in range(options.jobs)], "each job once"
    assert steps == collatz(max(range(first, first + 1000), key=collatz)), "the same as here"
    print("checked: every job was done once, and the record is the one that this process finds")


if __name__ == "__main__":
    main()
