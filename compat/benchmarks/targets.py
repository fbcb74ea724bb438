"""The targets that distpool set itself, as ratios within one run where possible, and the gross limits for CI."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from compat.benchmarks.runner import Cell

Figure = Callable[[str, str, str], float | None]


@dataclass
class Row:
    """One target: what was found, and whether it is met (None: not measured in this run)."""

    workload: str
    target: str
    found: str
    met: bool | None


@dataclass(frozen=True)
class Target:
    """``numerator / denominator`` compared with a limit; without a denominator the plain figure."""

    workload: str
    text: str
    figure: str
    limit: float
    at_least: bool = False
    peer: str = "distpool"
    other: str = ""
    other_figure: str = ""
    speed: bool = False
    unit: str = ""
    scale: float = 1.0

    def row(self, get: Figure) -> Row:
        """Evaluate on the medians of a run."""
        mine = get(self.workload, self.peer, self.figure)
        theirs = get(self.workload, self.other, self.other_figure or self.figure) if self.other else 1.0
        if mine is None or theirs is None or not theirs or (not mine and self.speed):
            return Row(self.workload, self.text, "not measured", None)
        value = (theirs * self.scale / mine) if self.speed else mine / (theirs * self.scale)
        met = value >= self.limit if self.at_least else value <= self.limit
        suffix = f" x ({mine:,.4g} against {theirs:,.4g})" if self.other else f" {self.unit}"
        return Row(self.workload, self.text, f"{value:.3g}{suffix}", met)


def ratio(workload: str, text: str, figure: str, limit: float, other: str, **more: object) -> Target:
    """Short form for a target against a peer."""
    return Target(workload, text, figure, limit, other=other, **more)  # type: ignore[arg-type]


TARGETS = [
    ratio("W1", "<= 2.5 x ppe (ppe forks, distpool starts safely)", "ms", 2.5, "ppe"),
    ratio("W1", ">= 3 x quicker than loky", "ms", 3, "loky", at_least=True, speed=True),
    ratio("W1", "import no dearer than concurrent.futures.process (5 % noise)", "import_ms", 1.05, "ppe"),
    ratio("W2", "<= 0.55 x pool", "us", 0.55, "pool"),
    ratio("W2", "<= 0.4 x ppe", "us", 0.4, "ppe"),
    ratio("W2", "p99 not worse than ppe", "p99_us", 1.0, "ppe"),
    ratio("W2", "parent CPU <= 0.3 x ppe", "cpu_parent_us", 0.3, "ppe"),
    ratio("W3", ">= 5 x pool", "per_s", 5, "pool", at_least=True),
    ratio("W3", ">= 15 x ppe", "per_s", 15, "ppe", at_least=True),
    Target("W3", "<= 12 us CPU per task, parent and workers", "cpu_us", 12, unit="us"),
    ratio("W4", "chunksize 1: >= 20 x pool", "chunk1_per_s", 20, "pool", at_least=True),
    ratio("W4", "chunksize 1: >= 100 x ppe", "chunk1_per_s", 100, "ppe", at_least=True),
    ratio("W4", "chunksize 100: >= 1.5 x pool", "chunk100_per_s", 1.5, "pool", at_least=True),
    ratio("W4", "library's choice (DistPool): >= 0.9 x pool's", "default_per_s", 0.9, "pool", at_least=True,
          peer="distpool-pool"),
    *(
        ratio("W5", f"80 MB {way}: >= 15 x loky", f"{way}_ms", 15, "loky", at_least=True, speed=True)
        for way in ("in", "out", "both")
    ),
    ratio("W5", "80 MB in: <= 1.5 x memcpy", "in_ms", 1.5, "distpool", other_figure="memcpy_ms"),
    ratio("W5", "80 MB out: <= 1.5 x memcpy", "out_ms", 1.5, "distpool", other_figure="memcpy_ms"),
    ratio("W5", "80 MB both: <= 1.5 x two memcpys", "both_ms", 1.5, "distpool", other_figure="memcpy_ms", scale=2.0),
    ratio("W5", "1 KB: not slower than pool", "kb_ms", 1.0, "pool"),
    Target("W6", "<= 0.15 s on a running pool", "s", 0.15, unit="s"),
    Target("W7", "cpu, submit: >= 0.9 of the ideal", "cpu_submit", 0.9, at_least=True),
    Target("W7", "cpu, map: >= 0.9 of the ideal", "cpu_map", 0.9, at_least=True),
    ratio("W7", "cpu, map: >= 0.9 of a bare fork without messages", "cpu_map", 0.9, "distpool", at_least=True,
          other_figure="cpu_bare"),
    # All of these reach what a bare fork does, which is 2 to 3 % below the ideal here; who is ahead is chance.
    ratio("W7", "sleep, map: not below pool's (1 % noise)", "sleep_map", 0.99, "pool", at_least=True),
    ratio("W7", "cpu, map: not below pool's (1 % noise)", "cpu_map", 0.99, "pool", at_least=True),
    ratio("W7", "DistPool, cpu, map: not below pool's (1 % noise)", "cpu_map", 0.99, "pool", at_least=True,
          peer="distpool-pool"),
    Target("W7", "200 tasks behind one of 600 ms do not wait for it", "behind_long_ms", 400, unit="ms"),
    Target("W8", "<= 500 bytes per pending task", "bytes_per_pending", 500, unit="bytes"),
    Target("W8", "no growth of the parent (second half, < 1 MiB)", "parent_growth_kb", 1024, unit="KiB"),
    Target("W8", "no growth of the workers (second half, < 1 MiB)", "workers_growth_kb", 1024, unit="KiB"),
    Target("W9", "32 workers ready <= 1 s", "ready_ms", 1000, unit="ms"),
    Target("W9", "idle CPU <= 0.5 %", "idle_cpu_percent", 0.5, unit="%"),
    Target("W9", "USS <= 8 MB each", "uss_mb", 8, unit="MB"),
    ratio("W5", "TCP: >= 0.8 x a plain socket copy", "in_ms", 0.8, "distpool-tcp", at_least=True, speed=True,
          peer="distpool-tcp", other_figure="socket_ms"),
    ratio("J1", "remotecall_fetch: <= 1.2 x the executor's lonely call", "fetch_us", 1.2, "distpool",
          other_figure="executor_us"),
    ratio("J1", "worker to worker: <= 1.2 x the executor's lonely call", "worker_us", 1.2, "distpool",
          other_figure="executor_us"),
    ratio("J2", "RemoteChannel: >= 10 x Manager().Queue()", "channel_per_s", 10, "distpool", at_least=True,
          other_figure="manager_per_s"),
    ratio("J2", "RemoteChannel: >= 0.7 x multiprocessing.Queue", "channel_per_s", 0.7, "distpool", at_least=True,
          other_figure="queue_per_s"),
    Target("J3", "owner's table empty <= 1 s after 100,000 references", "empty_s", 1.0, unit="s"),
    Target("J3", "no growth of the owner (< 1 of 100 references)", "owner_growth_blocks", 500, unit="blocks"),
    Target("J4", "<= 4 threads in the master", "threads", 4, unit="threads"),
    Target("J4", "<= 2 % CPU idle", "idle_cpu_percent", 2, unit="%"),
]  # fmt: skip

GROSS = [
    ratio("W1", "start: <= 10 x ppe", "ms", 10, "ppe"),
    ratio("W2", "lonely call: <= 2 x pool", "us", 2.0, "pool"),
    ratio("W3", "submits: >= 1 x ppe", "per_s", 1.0, "ppe", at_least=True),
    ratio("W4", "map, chunksize 1: >= 5 x ppe", "chunk1_per_s", 5, "ppe", at_least=True),
    ratio("W5", "80 MB both ways: >= 1 x loky", "both_ms", 1.0, "loky", at_least=True, speed=True),
    ratio("W6", "function that holds 80 MB: <= 2 x ppe", "s", 2.0, "ppe"),
    ratio("W7", "uneven computing map: >= 0.6 x pool", "cpu_map", 0.6, "pool", at_least=True),
    ratio("W8", "bytes per pending task: <= 2 x ppe", "bytes_per_pending", 2.0, "ppe"),
]


def medians(cells: list[Cell]) -> Figure:
    """Look up the median of a figure in a run."""
    table = {(cell.workload, cell.peer): cell for cell in cells}

    def get(workload: str, peer: str, figure: str) -> float | None:
        cell = table.get((workload, peer))
        return cell.median(figure) if cell else None

    return get


def evaluate(cells: list[Cell]) -> list[Row]:
    """Every target, in order."""
    get = medians(cells)
    return [target.row(get) for target in TARGETS]


def gross(cells: list[Cell]) -> list[str]:
    """What CI must not let through: crashed cells of distpool, and ratios that are far off."""
    wrong = [
        f"CRASH {cell.workload} {cell.peer}: {cell.note}"
        for cell in cells
        if cell.crashed and cell.peer in ("distpool", "distpool-pool")
    ]
    rows = [target.row(medians(cells)) for target in GROSS]
    return wrong + [f"GROSS {row.workload} {row.target}: {row.found}" for row in rows if row.met is False]


def as_text(rows: list[Row]) -> str:
    """The table of targets for a terminal."""
    word = {True: "met", False: "NOT MET", None: "-"}
    lines = [f"{row.workload:3} {word[row.met]:8} {row.target:64} {row.found}" for row in rows]
    count = sum(row.met is True for row in rows)
    return "\n".join([*lines, f"{count} met, {sum(row.met is False for row in rows)} not met of {len(rows)}"])
