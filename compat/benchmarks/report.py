"""Turns the cells of a run into Markdown and JSON."""

from __future__ import annotations

from typing import Any

from compat.benchmarks.runner import Cell
from compat.benchmarks.targets import Row

TITLES = {
    "W1": "W1: import, start, first result of every worker, stop",
    "W2": "W2: submit(no-op).result(), one at a time",
    "W3": "W3: many submits, then all results",
    "W4": "W4: map over ints, items per second",
    "W5": "W5: 80 MB array in, out, both ways; 1 KB both ways",
    "W6": "W6: a function that holds 80 MB, 200 calls in one map",
    "W7": "W7: uneven tasks, mean 1 ms: share of the ideal",
    "W8": "W8: memory",
    "W9": "W9: 32 workers",
    "X1": "X1: scaling with the number of workers",
    "X2": "X2: library time per task against the length of the task",
    "X3": "X3: many submitting threads",
    "X4": "X4: as_completed",
    "X5": "X5: asyncio.run_in_executor",
    "X6": "X6: a done-callback on every future",
    "X7": "X7: lazy maps over a range",
    "J1": "J1: remotecall_fetch of a no-op",
    "J2": "J2: put and take between two processes",
    "J3": "J3: 100,000 references made, forwarded and dropped",
    "J4": "J4: 128 idle workers",
}
# (figure, column heading, True if more is better); the first one is compared with distpool's.
COLUMNS: dict[str, list[tuple[str, str, bool]]] = {
    "W1": [("ms", "all, ms", False), ("ready_ms", "ready, ms", False), ("stop_ms", "stop, ms", False),
           ("import_ms", "import, ms", False)],
    "W2": [("us", "mean, us", False), ("p50_us", "p50", False), ("p99_us", "p99", False),
           ("cpu_parent_us", "CPU parent, us", False), ("cpu_workers_us", "CPU workers, us", False)],
    "W3": [("per_s", "tasks/s", True), ("cpu_us", "CPU per task, us", False), ("cpu_parent_us", "parent", False),
           ("cpu_workers_us", "workers", False)],
    "W4": [("chunk1_per_s", "chunksize 1", True), ("chunk100_per_s", "chunksize 100", True),
           ("default_per_s", "library's choice", True), ("chunk1_cpu_us", "CPU per item, chunksize 1, us", False)],
    "W5": [("in_ms", "in, ms", False), ("out_ms", "out, ms", False), ("both_ms", "both, ms", False),
           ("kb_ms", "1 KB, ms", False), ("memcpy_ms", "memcpy, ms", False),
           ("memcpy_fresh_ms", "memcpy to fresh pages, ms", False), ("socket_ms", "socket copy, ms", False)],
    "W6": [("s", "s", False), ("cpu_s", "CPU, s", False), ("workers_rss_growth_mb", "workers' RSS growth, MB", False)],
    "W7": [("cpu_map", "cpu, map", True), ("cpu_submit", "cpu, submit", True), ("sleep_map", "sleep, map", True),
           ("sleep_submit", "sleep, submit", True), ("cpu_bare", "cpu, bare fork", True),
           ("behind_long_ms", "200 tasks behind one of 600 ms, ms", False)],
    "W8": [("bytes_per_pending", "parent bytes per pending task", False),
           ("parent_growth_kb", "parent growth, KiB", False), ("workers_growth_kb", "workers growth, KiB", False),
           ("tasks", "over tasks", False)],
    "W9": [("ready_ms", "ready, ms", False), ("stop_ms", "stop, ms", False), ("idle_cpu_percent", "idle CPU, %", False),
           ("uss_mb", "USS per worker, MB", False)],
    "X4": [("per_s", "tasks/s", True), ("cpu_us", "CPU per task, us", False)],
    "X5": [("per_s", "tasks/s", True), ("cpu_us", "CPU per task, us", False)],
    "X6": [("per_s", "tasks/s", True), ("cpu_us", "CPU per task, us", False)],
    "X7": [
        ("imap_per_s", "imap, items/s", True),
        ("imap_cpu_us", "CPU per item, us", False),
        ("imap_unordered_per_s", "imap_unordered, items/s", True),
        ("imap_unordered_cpu_us", "CPU per item, us", False),
        ("pmap_per_s", "pmap, items/s", True),
    ],
    "J1": [("fetch_us", "from the master, us", False), ("worker_us", "from a worker, us", False),
           ("executor_us", "the executor's lonely call, us", False)],
    "J2": [("channel_per_s", "RemoteChannel, items/s", True), ("queue_per_s", "multiprocessing.Queue", True),
           ("manager_per_s", "Manager().Queue()", True)],
    "J3": [("per_s", "references/s", True), ("empty_s", "until the table is empty, s", False),
           ("owner_growth_kb", "the owner's growth, KiB", False)],
    "J4": [("threads", "threads of the master", False), ("idle_cpu_percent", "idle CPU, %", False)],
}  # fmt: skip


def number(value: float | None) -> str:
    """Three significant digits, thousands separated."""
    if value is None or value != value:
        return "-"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def table(workload: str, cells: list[Cell]) -> list[str]:
    """One workload: a row per peer, medians with spread, ratio to distpool."""
    columns = COLUMNS[workload]
    reference = next((cell for cell in cells if cell.peer == "distpool" and cell.answers), None)
    used = [column for column in columns if any(cell.median(column[0]) is not None for cell in cells)]
    if not used:
        return ["nothing measured: " + "; ".join(f"{cell.peer}: {cell.note}" for cell in cells), ""]
    lines = ["| peer | " + " | ".join(heading for _, heading, _ in used) + " | spread | distpool is better by |"]
    lines.append("|" + " --- |" * (len(used) + 3))
    for cell in cells:
        if not cell.answers:
            continue
        main, _, more = used[0]
        spread, factor, mine = cell.spread(main), "-", cell.median(main)
        base = reference.median(main) if reference else None
        if mine and base:
            factor = f"{base / mine if more else mine / base:.3g} x"
        figures = " | ".join(number(cell.median(name)) for name, _, _ in used)
        percent = f"{spread:.0%}" if spread is not None else "-"
        lines.append(f"| {cell.peer} | {figures} | {percent} (n={len(cell.answers)}) | {factor} |")
    lines.append("")
    lines.extend(f"- {cell.peer}: {cell.note}" for cell in cells if cell.note and "not installed" not in cell.note)
    return [*lines, ""]


def curve_table(workload: str, cells: list[Cell]) -> list[str]:
    """A workload whose answer is a curve: a column per point."""
    lines: list[str] = []
    done = [cell for cell in cells if cell.answers]
    names = sorted({name for cell in done for name, value in cell.answers[-1].items() if isinstance(value, dict)})
    for name in names:
        curves = {cell.peer: cell.answers[-1][name] for cell in done if name in cell.answers[-1]}
        points = list(next(iter(curves.values())))  # type: ignore[call-overload]
        lines += [f"{name.replace('_', ' ')}:", "", "| peer | " + " | ".join(points) + " |"]
        lines.append("|" + " --- |" * (len(points) + 1))
        for peer, curve in curves.items():
            lines.append(f"| {peer} | " + " | ".join(number(curve.get(point)) for point in points) + " |")  # type: ignore[attr-defined]
        lines.append("")
    lines.extend(f"- {cell.peer}: {cell.note}" for cell in cells if cell.note)
    return [*lines, ""]


def markdown(cells: list[Cell], machine: dict[str, Any], rows: list[Row]) -> str:
    """The whole report."""
    lines = ["# distpool and its peers", ""]
    lines.append(", ".join(f"{key} {value}" for key, value in machine.items()))
    lines += [
        "",
        "Medians over fresh processes in alternation; spread is (max - min) / median of the first column.",
        "",
    ]
    missing = sorted({f"{cell.peer} ({cell.note})" for cell in cells if "not installed" in cell.note})
    if missing:
        lines += ["Not measured: " + ", ".join(missing), ""]
    for workload in dict.fromkeys(cell.workload for cell in cells):
        mine = [cell for cell in cells if cell.workload == workload]
        lines += [f"## {TITLES[workload]}", ""]
        lines += table(workload, mine) if workload in COLUMNS else curve_table(workload, mine)
    lines += ["## Targets", "", "| workload | target | found | |", "| --- | --- | --- | --- |"]
    word = {True: "met", False: "**not met**", None: "-"}
    lines += [f"| {row.workload} | {row.target} | {row.found} | {word[row.met]} |" for row in rows]
    return "\n".join(lines) + "\n"


def as_json(cells: list[Cell], machine: dict[str, Any], rows: list[Row]) -> dict[str, Any]:
    """Everything that was measured, repetition by repetition."""
    return {
        "machine": machine,
        "cells": [
            {"workload": c.workload, "peer": c.peer, "params": c.params, "note": c.note, "answers": c.answers}
            for c in cells
        ],
        "targets": [vars(row) for row in rows],
    }
