"""Count primes on several machines, lose one of them half-way, and get the right number all the same.

    python examples/many_hosts.py me@node1 node2 node3 node4     machines that you can log in to by ssh
    python examples/many_hosts.py                                four logins to this very machine
    python examples/many_hosts.py --keep ...                     without the loss

Each machine needs a login without a password (key or agent), and Python of the same minor version; --ssh-config and
--python say where to find what is not in its usual place. One machine is "switched off" when half of the work is done:
all of distpool's processes there are killed at once. What ran there runs again elsewhere, and only that.
"""

import argparse
import collections
import math
import os
import signal
import time

from distpool import ClusterExecutor, ProcessExitedException, myid

STEP = 250_000


def primes_between(first, last):
    """How many primes there are in this range, and which worker has counted them."""
    small = bytearray([1]) * (math.isqrt(last) + 1)
    found = bytearray([1]) * (last - first)
    for number in range(2, len(small)):
        if small[number]:
            small[number * number :: number] = bytes(len(range(number * number, len(small), number)))
            start = max(number * number, -first % number + first)
            found[start - first :: number] = bytes(len(range(start - first, len(found), number)))
    return sum(found), myid()


def switch_off():
    """Kill what the login to this machine has started: that is the parent of all workers here."""
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hosts", nargs="*", help="machine specs: [user@]host[:port]")
    parser.add_argument("--workers", type=int, default=1, help="on each host")
    parser.add_argument("--limit", type=int, default=10_000_000)
    parser.add_argument("--keep", action="store_true", help="no machine is lost")
    parser.add_argument("--ssh-config", help="a file like ~/.ssh/config")
    parser.add_argument("--python", help="the interpreter there")
    options = parser.parse_args()
    hosts = options.hosts or [f"127.0.0.{number}" for number in range(1, 5)]
    flags = ["-F", options.ssh_config] if options.ssh_config else []
    began = time.perf_counter()
    machines = [(host, options.workers) for host in hosts]
    with ClusterExecutor(machines, retries=3, sshflags=flags, exename=options.python) as executor:
        firsts = range(2, options.limit, STEP)
        lasts = [min(first + STEP, options.limit) for first in firsts]
        total, done, counted, loss = 0, 0, collections.Counter(), None
        for count, worker in executor.imap_unordered(primes_between, firsts, lasts):
            total, done = total + count, done + 1
            counted[worker] += 1
            if done == len(lasts) // 2:
                print("half of the work is done", flush=True)
            if done == len(lasts) // 2 and not options.keep:
                victim = executor.workers[-1]
                host = {row["pid"]: row["host"] for row in executor.stats()}[victim]
                loss = executor.options(pids=[victim], retries=0).submit(switch_off)
                print(f"the machine of worker {victim} ({host}) goes down")
        if loss is not None:
            assert isinstance(loss.exception(), ProcessExitedException)
        print(f"{total:,} primes below {options.limit:,}, counted in {time.perf_counter() - began:.1f} s")
        print("pieces by worker: " + ", ".join(f"{worker}: {number}" for worker, number in sorted(counted.items())))


if __name__ == "__main__":
    main()
