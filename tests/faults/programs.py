"""Whole programs under test: started in a session of their own, watched, and searched for what they leave behind.

    with Program(SOURCE, args=[...]) as program:   # own session, own TMPDIR, a mark in the environment
        program.interrupt() / program.kill()
        program.finish().assert_clean()            # exit code, stderr, processes, temporary files, segments

Every process that a program starts inherits the mark, so that orphans are found whoever has adopted them. Output goes
to files and not to pipes: an orphan that keeps a pipe open would otherwise keep the test waiting.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

import distpool

from .helpers import PATIENCE

MARK = "DISTPOOL_FAULTS_PROGRAM"
GONE_WITHIN = 2.0
"""Seconds after the end of a program by which everything it started is gone (row F10)."""

SHM = Path("/dev/shm")

PRELUDE = """\
import os, signal, sys, threading, time
import distpool, helpers

class Runner:
    '''One face for both classes, as in runners.py; `kind` is the first argument of the program.'''
    def __init__(self, kind, workers=2, **options):
        self.kind = kind
        self.raw = (distpool.ClusterExecutor if kind == "executor" else distpool.DistPool)(workers, **options)
        self.executor = self.raw if kind == "executor" else self.raw.executor
    def submit(self, function, /, *args):
        return self.raw.submit(function, *args) if self.kind == "executor" else self.raw.apply_async(function, args)
    def value(self, handle, seconds=30):
        return handle.result(seconds) if self.kind == "executor" else handle.get(seconds)
    def call(self, function, /, *args):
        return self.value(self.submit(function, *args))
    def error(self, handle, seconds=30):
        try:
            value = self.value(handle, seconds)
        except BaseException as error:
            return error
        raise AssertionError(f"should have failed, but gave {value!r}")
    def close(self):
        if self.kind == "executor":
            self.raw.shutdown(wait=True)
        else:
            self.raw.close()
            self.raw.join()

"""


FOREIGN = ("sem.", "psm_", "joblib", "pulse-")
"""Beginnings of names in /dev/shm that other libraries give, of which other programs may run at the same time."""


def segments() -> set[str]:
    """Names in /dev/shm that could be ours."""
    return {name for name in os.listdir(SHM) if not name.startswith(FOREIGN)} if SHM.is_dir() else set()


def unused(names: set[str]) -> set[str]:
    """Those which no living process maps or holds open: other tests that run now use theirs."""
    left = set(names)
    for process in psutil.process_iter():
        if not left:
            break
        try:
            used = {Path(item.path).name for item in process.memory_maps(grouped=True)}
            used |= {Path(item.path).name for item in process.open_files()}
        except (psutil.Error, OSError, NotImplementedError):
            continue
        left -= used
    return left & segments()


def marked(mark: str) -> list[psutil.Process]:
    """Living processes that carry the mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


@dataclass
class Outcome:
    """How a program ended, and what it left."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float
    survivors: list[str]
    files: list[str]
    segments: set[str]

    def assert_nothing_left(self) -> None:
        assert not self.survivors, f"processes outlived the program: {self.survivors}\n{self.stderr}"
        assert not self.files, f"files outlived the program: {self.files}"
        assert not self.segments, f"shared segments outlived the program: {self.segments}"

    def assert_clean(self, returncode: int = 0) -> None:
        """Exit code as expected, nothing on stderr, nothing left."""
        assert self.stderr == ""
        assert self.returncode == returncode, self.stdout
        self.assert_nothing_left()


class Program:
    """A Python program in a session of its own. Leaving the block ends whatever is left of it."""

    def __init__(
        self,
        source: str,
        args: Sequence[object] = (),
        env: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
        prefix: Sequence[str] = (),
        prelude: bool = True,
        cwd: Path | None = None,
    ) -> None:
        # Not under pytest's tmp_path: paths of Unix sockets may have about 100 characters.
        self.home = Path(tempfile.mkdtemp(prefix="dpf-", dir="/tmp"))
        self.temporary = self.home / "tmp"
        self.temporary.mkdir()
        script = self.home / "program.py"
        script.write_text((PRELUDE if prelude else "") + source)
        self.mark = uuid.uuid4().hex
        here = Path(__file__).parent
        paths = [str(here), str(Path(distpool.__file__).parents[1])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "TMPDIR": str(self.temporary),
            "XDG_RUNTIME_DIR": str(self.temporary),
            MARK: self.mark,
            **(env or {}),
        }
        self._before = segments()
        self._begin = time.monotonic()
        self._ended = 0.0
        with (self.home / "out").open("wb") as out, (self.home / "err").open("wb") as err:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, *options, str(script), *map(str, args)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment,
                cwd=cwd or self.home,
                start_new_session=True,
            )

    def interrupt(self) -> None:
        """What Ctrl-C does: SIGINT to the whole foreground process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def send(self, number: int) -> None:
        """A signal to the program itself and nobody else."""
        self.process.send_signal(number)

    def finish(self, seconds: float = PATIENCE, gone_within: float = GONE_WITHIN) -> Outcome:
        """Wait for its end and look at what is left."""
        try:
            returncode = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs after {seconds:.1f} s\n{self.output()}") from None
        ended = time.monotonic()
        # Looked for again and again: the dying may be replaced, and orphans may stay zombies if nobody reaps them.
        while (alive := marked(self.mark)) and time.monotonic() < ended + gone_within:
            psutil.wait_procs(alive, timeout=0.05)
        return Outcome(
            returncode,
            self.read("out"),
            self.read("err"),
            ended - self._begin,
            [_describe(process) for process in alive],
            sorted(str(path.relative_to(self.temporary)) for path in self.temporary.rglob("*")),
            unused(segments() - self._before),
        )

    def read(self, which: str) -> str:
        return (self.home / which).read_text(errors="replace")

    def output(self) -> str:
        return f"--- stdout\n{self.read('out')[-3000:]}\n--- stderr\n{self.read('err')[-6000:]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            print(f"the program, at the failure of its test: {self.process.poll()}\n{self.output()}")
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for process in marked(self.mark):
            try:
                process.kill()
            except psutil.Error:
                continue
        shutil.rmtree(self.home, ignore_errors=True)


def run(source: str, *args: object, seconds: float = PATIENCE, **options: object) -> Outcome:
    """A program that ends by itself."""
    with Program(source, args, **options) as program:  # type: ignore[arg-type]
        return program.finish(seconds)


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} ({process.status()}) {' '.join(process.cmdline())[:160]}"
    except psutil.Error as error:
        return str(error)
