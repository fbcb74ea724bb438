"""Runs one measured program in its own process group under a time limit and brings back its JSON answer.

The child prints one line ``@@RESULT {json}``; everything else it prints is kept for the error report. The group is
killed at the end whatever happened, so that a peer which leaves workers behind cannot disturb the next measurement.
Runs on the caller's thread; several threads may call it at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARK = "@@RESULT "


@dataclass
class Outcome:
    """How one child program ended: its answer, or why there is none."""

    result: dict[str, Any] | None
    returncode: int | None
    timed_out: bool
    seconds: float
    stdout: str = field(default="", repr=False)
    stderr: str = field(default="", repr=False)

    @property
    def problem(self) -> str:
        """One line that says why there is no result; empty if there is one."""
        if self.result is not None:
            return ""
        if self.timed_out:
            return f"no end within {self.seconds:.0f} s"
        lines = [line for line in (self.stderr or self.stdout).strip().splitlines() if line.strip()]
        return f"exit {self.returncode}: {lines[-1][:300] if lines else 'no output'}"


def run(
    argv: list[str], timeout: float, *, env: dict[str, str] | None = None, cwd: str | os.PathLike[str] | None = None
) -> Outcome:
    """Run ``argv`` for at most ``timeout`` seconds; output goes to files, so that orphans cannot hold a pipe open."""
    full_env = {**os.environ, **(env or {})}
    full_env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [full_env.get("PYTHONPATH")])])
    started = time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=full_env,
            cwd=cwd or ROOT,
            start_new_session=True,
        )
        timed_out = False
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        seconds = time.monotonic() - started
        out.seek(0)
        err.seek(0)
        stdout, stderr = out.read().decode(errors="replace"), err.read().decode(errors="replace")
    return Outcome(find_result(stdout), process.returncode, timed_out, seconds, stdout, stderr)


def find_result(stdout: str) -> dict[str, Any] | None:
    """The last answer in a child's output (a worker's half line before it does not hide it)."""
    for line in reversed(stdout.splitlines()):
        _, mark, text = line.partition(MARK)
        if mark:
            try:
                answer = json.loads(text)
            except ValueError:
                continue
            if isinstance(answer, dict):
                return answer
    return None


def emit(answer: dict[str, Any]) -> None:
    """Print the answer of this child (one write, so that forwarded worker output cannot split it)."""
    sys.stdout.flush()
    os.write(1, ("\n" + MARK + json.dumps(answer) + "\n").encode())
