"""Heat in a rod: each worker has a piece of it, and neighbours exchange their borders at every step.

    python examples/heat_equation.py [--cells 300] [--steps 200] [--workers 3]

A border travels through a channel that lives on the worker which needs it, straight from its neighbour: the master
only hands the channels out. The result must be the one of a single process, to the last digit.
"""

import argparse
import functools

from distpool import Channel, RemoteChannel, addprocs, remotecall, rmprocs

SPEED = 0.4  # how much of a difference flows in one step; below 0.5 the scheme is stable


def start(cells):
    """Cold, with a hot stretch in the middle."""
    return [100.0 if cells // 3 <= index < cells // 2 else 0.0 for index in range(cells)]


def step(left, cells, right):
    """The cells after one step, between these two borders."""
    row = [left, *cells, right]
    return [
        here + SPEED * (before - 2 * here + after) for before, here, after in zip(row, row[1:-1], row[2:], strict=False)
    ]


def alone(cells, steps):
    """The whole rod in one process; its ends are kept cold."""
    for _ in range(steps):
        cells = step(0.0, cells, 0.0)
    return cells


def piece(cells, steps, boxes, to_left, to_right):
    """On a worker: its piece of the rod. `boxes`: where its neighbours put their borders; None at an end of the rod."""
    from_left, from_right = boxes
    for _ in range(steps):
        if to_left is not None:
            to_left.put(cells[0])
        if to_right is not None:
            to_right.put(cells[-1])
        left = 0.0 if from_left is None else from_left.take()
        right = 0.0 if from_right is None else from_right.take()
        cells = step(left, cells, right)
    return cells


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cells", type=int, default=300)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--workers", type=int, default=3)
    options = parser.parse_args()
    rod, last = start(options.cells), options.workers - 1

    pids = addprocs(options.workers)
    box = functools.partial(RemoteChannel, functools.partial(Channel, 2))  # a neighbour is at most one step ahead
    lefts = [box(pid) if index > 0 else None for index, pid in enumerate(pids)]
    rights = [box(pid) if index < last else None for index, pid in enumerate(pids)]
    bounds = [options.cells * index // options.workers for index in range(options.workers + 1)]
    calls = [
        remotecall(piece, pid, rod[bounds[index] : bounds[index + 1]], options.steps, (lefts[index], rights[index]),
                   rights[index - 1] if index > 0 else None, lefts[index + 1] if index < last else None)
        for index, pid in enumerate(pids)
    ]  # fmt: skip
    found = [cell for call in calls for cell in call.result()]
    rmprocs(pids)

    print(f"{options.cells} cells, {options.steps} steps on {options.workers} workers")
    print(f"hottest cell {max(found):.4f}, heat left {sum(found) / sum(rod):.2%}")
    assert found == alone(rod, options.steps)
    print("checked: one process finds the same, to the last digit")


if __name__ == "__main__":
    main()
