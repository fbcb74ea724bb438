"""`python -m distpool hosts FILE`: logs in to each host and reports what is there, or why not (layer 10).

    machines --> one thread for each host, side by side: addprocs (one worker) -> look -> round trips -> bytes -> Report
    reports, in the order of the file --> table

Bounded: the login has its time-out, and so has all that is asked of the worker.
"""

from __future__ import annotations

import concurrent.futures
import os
import platform
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from distpool.calls import remotecall
from distpool.cluster import addprocs, rmprocs
from distpool.errors import CompositeException, LaunchWorkerError

_ROUND_TRIPS = 20
_BYTES = 4 << 20  # sent there and back to see how fast the link is
_MOST = 32  # hosts that are asked at the same time


@dataclass
class Report:
    """What was found out about one host; `error` is empty if it can be used."""

    host: str
    workers: int | str = 1
    login: float = 0.0  # seconds until a worker was there
    python: str = ""
    distpool: str = ""
    cores: int = 0
    memory: int = 0  # bytes
    free: int = 0  # bytes
    round_trip: float = 0.0  # seconds
    bandwidth: float = 0.0  # bytes per second
    error: str = ""


def look() -> dict[str, Any]:
    """What a worker says of its host."""
    try:
        import psutil
    except ImportError:  # a host that was sent distpool alone
        page = os.sysconf("SC_PAGE_SIZE")
        total = os.sysconf("SC_PHYS_PAGES") * page
        free = os.sysconf("SC_AVPHYS_PAGES") * page if "SC_AVPHYS_PAGES" in os.sysconf_names else 0
    else:
        memory = psutil.virtual_memory()
        total, free = memory.total, memory.available
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "python": f"{platform.python_version()} {sys.executable}",
        "distpool": str(vars(sys.modules["distpool"])["__version__"]),
        "cores": usable or 1,
        "memory": total,
        "free": free,
    }


def echo(data: Any) -> Any:
    """It comes back as it is."""
    return data


def check_hosts(machines: Iterable[Any], options: Mapping[str, Any], seconds: float) -> list[Report]:
    """A report for each machine, in their order; the same host is asked once. `seconds`: for the login, and again for
    what is asked then. Nothing is raised for a host that cannot be used.

    Example: `check_hosts([("node1", 4), "node2"], {}, 30.0)`
    """
    counts: dict[str, int | str] = {}
    for machine in machines:
        spec, count = machine if isinstance(machine, tuple) else (machine, 1)
        known = counts.get(spec, 0)
        counts[spec] = "auto" if "auto" in (known, count) else int(known) + int(count)
    if not counts:
        return []
    with concurrent.futures.ThreadPoolExecutor(min(_MOST, len(counts))) as threads:
        return list(threads.map(lambda spec: check_host(spec, counts[spec], options, seconds), counts))


def check_host(spec: str, workers: int | str, options: Mapping[str, Any], seconds: float) -> Report:
    """The report for one machine. On a thread of its own."""
    report = Report(spec, workers)
    began = time.monotonic()
    try:
        (pid,) = addprocs([spec], **{**options, "timeout": seconds})
    except Exception as error:  # whatever it is, it belongs into its row
        report.error = reason(error)
        return report
    report.login = time.monotonic() - began
    try:
        _ask(report, pid, time.monotonic() + seconds)
    except TimeoutError:
        report.error = f"logged in, but no answer within {seconds:g} seconds"
    except Exception as error:
        report.error = f"logged in, but: {reason(error)}"
    finally:
        rmprocs(pid, waitfor=0)
    return report


def _ask(report: Report, pid: int, deadline: float) -> None:
    def call(function: Any, *args: Any) -> Any:
        return remotecall(function, pid, *args).result(max(0.001, deadline - time.monotonic()))

    for name, value in call(look).items():
        setattr(report, name, value)
    times = []
    for _ in range(_ROUND_TRIPS):
        began = time.monotonic()
        call(echo, None)
        times.append(time.monotonic() - began)
    report.round_trip = median(times)
    data = os.urandom(_BYTES)  # not zeros, which a compressing login would make light of
    began = time.monotonic()
    call(echo, data)
    report.bandwidth = 2 * _BYTES / max(1e-9, time.monotonic() - began - report.round_trip)


def reason(error: BaseException) -> str:
    """In one line: what a person can act on, without what the row says anyway."""
    if isinstance(error, CompositeException):
        return "; ".join(reason(each) for each in error.exceptions)
    text = str(error)
    if isinstance(error, LaunchWorkerError):
        text = text.removeprefix(f"could not launch worker on {error.host}: ")
    return " | ".join(line.strip() for line in text.splitlines() if line.strip()) or type(error).__name__


_HEADER = ("HOST", "WORKERS", "LOGIN", "PYTHON", "DISTPOOL", "CORES", "MEMORY", "FREE", "ROUND TRIP", "MB/S")


def table(reports: Sequence[Report]) -> str:
    """The reports as lines of text, one for each host, under a header.

    Example: `print(table(check_hosts(["node1"], {}, 30.0)))`
    """
    rows = [_row(report) for report in reports]
    full = [_HEADER, *(row for row in rows if len(row) == len(_HEADER))]
    widths = [max(len(row[column]) for row in full) for column in range(len(_HEADER))]
    widths[0] = max(widths[0], *(len(row[0]) for row in rows)) if rows else widths[0]
    widths[1] = max(widths[1], *(len(row[1]) for row in rows)) if rows else widths[1]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in [_HEADER, *rows])


def _row(report: Report) -> tuple[str, ...]:
    start = (report.host, str(report.workers))
    if report.error:
        return (*start, f"ERROR: {report.error}")
    return (
        *start,
        f"{report.login:.2f} s",
        report.python,
        report.distpool,
        str(report.cores),
        f"{report.memory / 2**30:.1f} GiB",
        f"{report.free / 2**30:.1f} GiB",
        f"{report.round_trip * 1e3:.2f} ms",
        f"{report.bandwidth / 1e6:.0f}",
    )


__all__ = ["Report", "check_hosts", "table"]
