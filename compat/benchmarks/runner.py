"""Runs the cells: every repetition is a fresh process, and the peers alternate, so that a machine which slows down
slows all of them. Repetitions go round the whole plan, so that a run cut short by its budget has every row."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from compat import _proc
from compat.benchmarks.peers import PEERS

Sizes = dict[str, dict[str, Any]]

QUICK: Sizes = {
    "W1": {"imports": 5, "starts": 3},
    "W2": {"calls": 400, "fast_calls": 1500},
    "W3": {"tasks": 2500, "fast_tasks": 20000},
    "W4": {"items": 100_000, "slow_items": 2000, "repeat": 3},
    "W5": {"elements": 10_000_000, "repeat": 5, "seconds": 0.8, "small": 300},
    "W6": {"elements": 10_000_000, "calls": 200},
    "W7": {"tasks": 600, "fast_tasks": 2000},
    "W8": {"pending": 5000, "fast_pending": 20000, "total": 4000, "fast_total": 60000},
    "W9": {"workers": 32, "idle_s": 1.0},
}
FULL: Sizes = {
    "W1": {"imports": 10, "starts": 7},
    "W2": {"calls": 1500, "fast_calls": 4000},
    "W3": {"tasks": 20000, "fast_tasks": 20000},
    "W4": {"items": 100_000, "slow_items": 10_000, "repeat": 9},
    "W5": {"elements": 10_000_000, "repeat": 9, "seconds": 3.0, "small": 1000},
    "W6": {"elements": 10_000_000, "calls": 200},
    "W7": {"tasks": 2000},
    "W8": {"pending": 10_000, "fast_pending": 100_000, "total": 20_000, "fast_total": 400_000},
    "W9": {"workers": 32, "idle_s": 3.0},
    "X1": {"workers": [1, 2, 4, 8, 16, 32, 64], "tasks": 4000, "calls": 200},
    "X2": {"ms": [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100], "seconds": 0.6},
    "X3": {"threads": [1, 4, 16, 64], "calls": 3000},
    "X4": {"tasks": 5000},
    "X5": {"tasks": 5000},
    "X6": {"tasks": 5000},
    "X7": {"tasks": 20000},
    "J1": {"calls": 3000},
    "J2": {"items": 30_000},
    "J3": {"references": 100_000},
    "J4": {"workers": 128, "idle_s": 5.0},
}
# distpool first: when time runs out in a quick run, a peer's cell is left out and not distpool's.
QUICK_PEERS = ["distpool", "distpool-pool", "ppe", "pool", "loky"]
QUICK_LEFT_OUT = {("distpool-pool", f"W{number}") for number in (1, 2, 3, 5, 6, 8, 9)}
QUICK_LEFT_OUT |= {("loky", "W7"), ("loky", "W8"), ("loky", "W9"), ("ppe", "W9"), ("pool", "W9")}
FULL_PEERS = [name for name in PEERS if name not in ("ppe-spawn",)]
MAIN_PEERS = ["ppe", "pool", "loky", "distpool", "distpool-pool"]
REPEAT_LIMIT = {"W9": 3, "W8": 3, "X1": 1, "X2": 1, "X3": 1, "X4": 2, "X5": 2, "X6": 2, "X7": 2, "J3": 1, "J4": 1}
# Cells that would eat the budget and say nothing new: the peer is measured there by its own rows only.
SKIP = {(peer, "W9") for peer in ("dask", "ray", "joblib", "pathos", "mpire")}
SKIP |= {("ppe-forkserver", "W8"), ("dask", "W4"), ("dask", "W6")}
CLOSE = {(peer, "W1") for peer in ("ppe", "loky", "distpool")}
CLOSE |= {(peer, workload) for peer in ("pool", "distpool", "distpool-pool") for workload in ("W4", "W7")}
CLOSE |= {("distpool", "J1"), ("distpool", "J2")}
"""Cells of which a full run takes two looks per turn: their targets are close to what is found, and one process differs
from the next by a quarter (W4 of `pool`: 2.4 to 3.9 million items/s within an hour)."""
TIMEOUT = 60.0


@dataclass
class Cell:
    """All repetitions of one workload on one peer."""

    workload: str
    peer: str
    params: dict[str, Any]
    answers: list[dict[str, float]] = field(default_factory=list)
    note: str = ""
    crashed: bool = False
    seconds: float = 0.0

    def median(self, figure: str) -> float | None:
        """Median of one figure over the repetitions."""
        values = [answer[figure] for answer in self.answers if isinstance(answer.get(figure), int | float)]
        return statistics.median(values) if values else None

    def spread(self, figure: str) -> float | None:
        """(max - min) / median of one figure; None with fewer than two repetitions."""
        values = [answer[figure] for answer in self.answers if isinstance(answer.get(figure), int | float)]
        if len(values) < 2 or not statistics.median(values):
            return None
        return float((max(values) - min(values)) / abs(statistics.median(values)))


@dataclass
class Plan:
    """What is measured and how long that may take."""

    sizes: Sizes
    peers: list[str]
    workloads: list[str]
    workers: int
    repeat: int
    budget: float
    left_out: set[tuple[str, str]] = field(default_factory=set)
    python: str = sys.executable


def run_cell(cell: Cell, plan: Plan, limit: float) -> None:
    """One repetition of one cell."""
    command = [plan.python, "-m", "compat.benchmarks.cell", cell.workload, cell.peer, str(plan.workers)]
    outcome = _proc.run([*command, json.dumps(cell.params)], limit)
    cell.seconds = max(cell.seconds, outcome.seconds)
    if outcome.result is None:
        cell.crashed, cell.note = True, outcome.problem
    elif "not_applicable" in outcome.result:
        cell.note = str(outcome.result["not_applicable"])
    else:
        cell.answers.append(outcome.result)


def run(plan: Plan, say: Callable[[str], None]) -> list[Cell]:
    """Measure the plan; ``say`` gets one line per repetition."""
    cells = []
    for workload in plan.workloads:
        for name in plan.peers:
            reason = PEERS[name]().available()
            if (name, workload) in SKIP | plan.left_out or (workload.startswith("X") and name not in MAIN_PEERS):
                continue
            cells.append(Cell(workload, name, plan.sizes[workload], note=reason))
    start = time.monotonic()
    for turn in range(plan.repeat):
        for workload in plan.workloads:
            if turn >= REPEAT_LIMIT.get(workload, plan.repeat):
                continue
            row = [cell for cell in cells if cell.workload == workload and not cell.note]
            row = row[turn % max(1, len(row)) :] + row[: turn % max(1, len(row))]
            if plan.repeat > 2:
                row += [cell for cell in row if (cell.peer, workload) in CLOSE]
            for cell in row:
                left = plan.budget - (time.monotonic() - start)
                ours_first = turn == 0 and cell.peer == "distpool"  # without it a row says nothing
                if left < (cell.seconds * 1.2 if turn else 0) and not ours_first:
                    cell.note = cell.note or ("" if turn else "left out: the time was used up")
                    continue
                run_cell(cell, plan, TIMEOUT)
                result = cell.note or " ".join(f"{k}={v:.4g}" for k, v in cell.answers[-1].items() if is_number(v))
                say(f"{time.monotonic() - start:6.0f} s  {workload} {cell.peer:15} {result}")
    return cells


def is_number(value: object) -> bool:
    """Whether a figure can be printed as one (some extras are curves)."""
    return isinstance(value, int | float)
