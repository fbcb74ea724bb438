"""`python -m distpool hosts` and `run` on hosts that are reached by SSH."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from distpool import __version__, nprocs
from distpool.hostcheck import check_hosts

from .sshd import Server, options


def run(server: Server, ssh: Any, *arguments: Any) -> subprocess.CompletedProcess[str]:
    words = [f"-o={name}={value!r}" for name, value in options(server, ssh).items() if value is not None]
    command = [sys.executable, "-m", "distpool", arguments[0], *words, *map(str, arguments[1:])]
    return subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)


def test_hosts(server: Server, ssh: Any, tmp_path: Path) -> None:
    path = tmp_path / "machines"
    path.write_text("4*127.0.0.1\nauto*host1\n")
    done = run(server, ssh, "hosts", path)
    assert done.returncode == 0, done.stderr
    header, first, second = done.stdout.splitlines()
    assert header.split()[:6] == ["HOST", "WORKERS", "LOGIN", "PYTHON", "DISTPOOL", "CORES"]
    assert first.split()[:2] == ["127.0.0.1", "4"] and second.split()[:2] == ["host1", "auto"]
    for line in (first, second):
        assert ".".join(map(str, sys.version_info[:3])) in line and __version__ in line and sys.executable in line
        assert "GiB" in line and " ms " in line and int(line.split()[-1]) > 0


def test_a_host_that_fails_has_its_error_in_its_row(server: Server, ssh: Any, tmp_path: Path) -> None:
    path = tmp_path / "machines"
    path.write_text("nosuchhost.invalid\n127.0.0.1\n")
    began = time.monotonic()
    done = run(server, ssh, "hosts", "--timeout", 20, path)
    assert time.monotonic() - began < 45
    assert done.returncode == 1
    _, first, second = done.stdout.splitlines()
    assert first.startswith("nosuchhost.invalid  1        ERROR: ")
    assert "resolve" in first.lower() or "not known" in first.lower(), first
    assert second.startswith("127.0.0.1") and "GiB" in second


def test_reports(server: Server, ssh: Any) -> None:
    good, bad = check_hosts(["127.0.0.1", ("nosuchhost.invalid", 3), ("127.0.0.1", 2)], options(server, ssh), 20)
    assert good.workers == 3 and good.error == "" and good.cores > 0 and good.memory > good.free > 0
    assert 0 < good.login < 20 and 0 < good.round_trip < 5 and good.bandwidth > 1e5
    assert bad.workers == 3 and bad.error
    assert check_hosts([], {}, 1) == []
    assert nprocs() == 1 or nprocs() == 2, "its worker is gone, or going"


def test_a_python_that_is_not_there(server: Server, ssh: Any) -> None:
    given = {**options(server, ssh), "exename": "/no/such/python"}
    (report,) = check_hosts(["127.0.0.1"], given, 20)
    assert "/no/such/python" in report.error


def test_run(server: Server, ssh: Any, tmp_path: Path) -> None:
    path = tmp_path / "machines"
    path.write_text("2*127.0.0.1\n")
    code = "import distpool; print(distpool.workers(), distpool.pmap(lambda x: x * x, range(5)))"
    for where in (("--machine-file", path), ("--hosts", "host1,127.0.0.1")):
        done = run(server, ssh, "run", *where, "-c", code)
        assert done.stdout == "[2, 3] [0, 1, 4, 9, 16]\n", done.stderr
        assert done.stderr == "" and done.returncode == 0


def test_run_without_the_host(server: Server, ssh: Any) -> None:
    done = run(server, ssh, "run", "--hosts", "nosuchhost.invalid,host1", "-c", "print('not reached')")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("distpool: could not launch worker on nosuchhost.invalid: "), done.stderr
