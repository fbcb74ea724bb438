"""Fit a line with a parameter server: data stays on the workers, gradients come through a channel.

    python examples/parameter_server.py [--steps 400] [--workers 3]

Each worker makes its share of the data and keeps it: the master holds a Future to it, which is never fetched. A worker
asks the server's channel for the present parameters, computes the gradient over its own share and puts it into another
channel. The server applies gradients as they come, unless they are too old: nobody waits for the slowest, whose
gradient of the first parameters would lead away from where the others have got meanwhile.
"""

import argparse
import random

from distpool import Channel, RemoteChannel, addprocs, fetch, remotecall, rmprocs

SLOPE, OFFSET, NOISE, POINTS, RATE, TOO_OLD = 2.5, -1.0, 0.1, 2000, 0.05, 40


def make_share(seed):
    """On a worker: points near the line that is to be found."""
    numbers = random.Random(seed)
    points = [numbers.uniform(-1.0, 1.0) for _ in range(POINTS)]
    return [(x, SLOPE * x + OFFSET + numbers.gauss(0.0, NOISE)) for x in points]


def gradient(share, slope, offset):
    """Of the mean squared error over this share."""
    errors = [(x, slope * x + offset - y) for x, y in share]
    return 2 * sum(x * error for x, error in errors) / len(share), 2 * sum(error for _, error in errors) / len(share)


def train(share, parameters, gradients):
    """On the worker that owns `share` (so that fetching it moves nothing), until the server closes its channel."""
    points, steps = fetch(share), 0
    for step, slope, offset in parameters:
        gradients.put((step, *gradient(points, slope, offset)))
        steps += 1
    return steps


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--workers", type=int, default=3)
    options = parser.parse_args()

    pids = addprocs(options.workers)
    shares = [remotecall(make_share, pid, seed).wait() for seed, pid in enumerate(pids)]
    parameters = RemoteChannel(lambda: Channel(len(pids)))
    gradients = RemoteChannel(lambda: Channel(len(pids)))
    trainers = [remotecall(train, pid, share, parameters, gradients) for pid, share in zip(pids, shares, strict=True)]

    slope, offset = 0.0, 0.0
    for _ in pids:
        parameters.put((0, slope, offset))
    for step in range(options.steps):
        asked, by_slope, by_offset = gradients.take(timeout=30)
        if step - asked < TOO_OLD:
            slope, offset = slope - RATE * by_slope, offset - RATE * by_offset
        if step < options.steps - len(pids):
            parameters.put((step, slope, offset))
    parameters.close()
    steps = [trainer.result(30) for trainer in trainers]
    assert all(share.where == pid for share, pid in zip(shares, pids, strict=True))
    rmprocs(pids)

    print(f"y = {slope:.3f} x {offset:+.3f} after {sum(steps)} gradients ({', '.join(map(str, steps))} per worker)")
    assert sum(steps) == options.steps
    assert abs(slope - SLOPE) < 0.05 and abs(offset - OFFSET) < 0.05
    print(f"checked: the line was y = {SLOPE} x {OFFSET}")


if __name__ == "__main__":
    main()
