"""What `python -m distpool hosts` finds out, and how it is shown. `tests/ssh/test_ssh_command.py` has real logins."""

from __future__ import annotations

import os
import sys
import time

import distpool
from distpool import CompositeException, LaunchWorkerError
from distpool.hostcheck import Report, check_hosts, echo, look, reason, table


def test_what_a_worker_says_of_its_host() -> None:
    (pid,) = distpool.addprocs(1)
    found = distpool.remotecall_fetch(look, pid)
    assert found["python"].split()[0] == ".".join(map(str, sys.version_info[:3]))
    assert found["distpool"] == distpool.__version__
    assert 1 <= found["cores"] <= (os.cpu_count() or 1)
    assert found["memory"] > found["free"] > 0
    assert distpool.remotecall_fetch(echo, pid, b"x") == b"x"
    distpool.rmprocs(pid)


def test_hosts_that_are_not_there() -> None:
    """Nothing is raised, each host has its own row, and they are asked side by side."""
    names = [f"host{number}.invalid" for number in range(8)]
    began = time.monotonic()
    reports = check_hosts([*names, (names[0], 3), (names[1], "auto")], {}, 20.0)
    assert time.monotonic() - began < 40
    assert [report.host for report in reports] == names
    assert [report.workers for report in reports] == [4, "auto", *[1] * 6]
    assert all(report.error and "\n" not in report.error for report in reports)
    assert distpool.procs() == [1]


def test_what_cannot_be_a_host_has_its_row_too() -> None:
    (report,) = check_hosts(["a:b:c"], {}, 5.0)
    assert "not a machine spec" in report.error
    (report,) = check_hosts(["host.invalid"], {"foo": 1}, 5.0)
    assert report.error == "Invalid keyword argument foo"


def test_reasons_fit_into_a_line() -> None:
    one = LaunchWorkerError("node1", "last\nlines", "no route\nto it")
    assert reason(one).startswith("no route | to it") and "\n" not in reason(one)
    assert reason(CompositeException([one, LaunchWorkerError("node1", "", "b")])).endswith("; b")
    assert reason(OSError()) == "OSError"


def test_table() -> None:
    lines = table([Report("a-long-name-of-a-host", 4, error="no route"), Report("b", "auto", 1.5, "3.11.7 /p", "1")])
    header, first, second = lines.splitlines()
    assert first == "a-long-name-of-a-host  4        ERROR: no route"
    assert second.index("auto") == header.index("WORKERS") == first.index("4")
    assert second.index("3.11.7") == header.index("PYTHON")
    assert table([]).startswith("HOST")
