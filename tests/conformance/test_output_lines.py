"""CONFORMANCE 2.20: what workers print."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

import distpool
import distpool.node.node
from distpool import addprocs, rmprocs
from distpool.calls import remote_do, remotecall_fetch

from .clusters import ByCommand, others
from .conftest import wait_until


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    assert others() == []
    yield
    rmprocs(others())
    distpool.set_output_hook(None)


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", "import distpool.calls as calls, distpool, sys, os\n" + code],
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_C280_lines_with_their_prefix() -> None:
    out = run(
        "distpool.addprocs(2)\n"
        "for pid in (2, 3):\n"
        "    calls.remotecall_fetch(lambda: (print('out\\nlines'), print('err', file=sys.stderr)), pid)\n"
    )
    expected = [f"      From worker {pid}:\t{text}" for pid in (2, 3) for text in ("out", "lines", "err")]
    assert sorted(out.splitlines()) == sorted(expected)


def test_C280_a_line_that_carries_the_prefix_gets_no_second_one() -> None:
    out = run("distpool.addprocs(1); calls.remotecall_fetch(print, 2, '      From worker 9:\\trelayed')")
    assert out == "      From worker 9:\trelayed\n"


def test_C280_lines_are_not_mixed() -> None:
    out = run(
        "pids = distpool.addprocs(3)\n"
        "work = lambda n: [print(str(n) * 200) for _ in range(300)] and None\n"
        "futures = [calls.remotecall(work, pid, pid) for pid in pids]\n"
        "[f.result() for f in futures]\n"
    )
    lines = out.splitlines()
    assert len(lines) == 900
    assert set(lines) == {f"      From worker {pid}:\t{str(pid) * 200}" for pid in (2, 3, 4)}


def test_C281_output_before_the_exit_is_not_lost() -> None:
    out = run(
        "distpool.addprocs(1)\n"
        "calls.remote_do(lambda: (os.write(1, b'last words without end'), os._exit(0)), 2)\n"
        "import time\n"
        "while distpool.nprocs() > 1: time.sleep(0.01)\n"
    )
    assert out == "      From worker 2:\tlast words without end\n"


def test_C281_much_output_blocks_nothing() -> None:
    out = run(
        "distpool.addprocs(1)\n"
        "f = calls.remotecall(lambda: [print('x' * 1000) for _ in range(8000)] and 5, 2)\n"
        "assert calls.remotecall_fetch(abs, 2, -1) == 1\n"
        "assert f.result() == 5\n"
    )
    assert out == ("      From worker 2:\t" + "x" * 1000 + "\n") * 8000


def test_hook(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    seen: list[tuple[int, str]] = []

    def hook(pid: int, line: str) -> str | None:
        seen.append((pid, line))
        if line == "fail":
            raise RuntimeError("a defect of the hook")
        return None if line == "secret" else f"<{line}>"

    distpool.set_output_hook(hook)
    (pid,) = addprocs(1)
    remotecall_fetch(print, pid, "secret\nfail\nshown")
    wait_until(lambda: len(seen) == 3)
    distpool.set_output_hook(None)
    remotecall_fetch(print, pid, "plain")
    rmprocs(pid)
    distpool.node.node.current().notices.join(10)
    prefix = f"      From worker {pid}:\t"
    assert capsys.readouterr().out == f"{prefix}fail\n<shown>\n{prefix}plain\n"
    assert "the output hook failed" in caplog.text
    with pytest.raises(TypeError):
        distpool.set_output_hook(5)  # type: ignore[arg-type]


def test_the_banner_is_not_shown_and_later_lines_are(capsys: pytest.CaptureFixture[str]) -> None:
    code = "print('welcome'); from distpool.cli import main; main(['worker', '--bind-to', '127.0.0.1'])"
    (pid,) = addprocs(ByCommand(1, [sys.executable, "-c", code]))
    remotecall_fetch(print, pid, "work")
    remote_do(print, pid, "more")
    rmprocs(pid)
    distpool.node.node.current().notices.join(10)
    assert sorted(capsys.readouterr().out.splitlines()) == [
        f"      From worker {pid}:\tmore",
        f"      From worker {pid}:\twork",
    ]
