"""Further workers of a host: commands that come up or do not, and whose output that is."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from wires import PATIENCE, until

from distpool import siblings
from distpool.siblings import Siblings
from distpool.wire import messages
from distpool.wire.frames import Frame, Kind

#: Plays `python -m distpool worker`: reads the cookie, says where it listens, and what it was given.
WORKER = """if True:
    import sys
    cookie = sys.stdin.readline().strip()
    print("a banner line")
    print("distpool_worker:9123#127.0.0.1", flush=True)
    print("cookie", cookie, "arguments", *sys.argv[1:], flush=True)
"""


class Host:
    """A worker that is asked to start others."""

    def __init__(self, bound_to: str = "") -> None:
        self.handlers: dict[int, Any] = {}
        self.on_fork: list[Any] = []
        self.cookie = "c" * 16
        self.answers: list[messages.Launched] = []
        self.answered = threading.Event()
        self.threads: list[threading.Thread] = []
        self.siblings = Siblings(self, self, bound_to)  # type: ignore[arg-type]

    def deliver(self, function: Any) -> None:
        thread = threading.Thread(target=function)
        self.threads.append(thread)
        thread.start()

    def send(self, kind: Kind, control: bytes) -> None:
        assert kind is Kind.LAUNCHED
        self.answers.append(messages.Launched.unpack(control))
        self.answered.set()

    def launch(self, count: int | str, command: list[str], timeout: float = PATIENCE) -> messages.Launched:
        self.answered.clear()
        frame = Frame(Kind.LAUNCH, messages.Launch(count, command, timeout).pack(), b"", [])
        self.handlers[Kind.LAUNCH](self, frame)
        assert self.answered.wait(PATIENCE)
        return self.answers[-1]

    def name(self, pids: list[list[int]]) -> None:
        self.handlers[Kind.NAMED](self, Frame(Kind.NAMED, messages.Named(pids).pack(), b"", []))

    def join(self) -> None:
        for thread in self.threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()


@contextlib.contextmanager
def descriptor_1(path: Path) -> Iterator[None]:
    """Lines of siblings are written to descriptor 1; pytest's own must be back before the test ends."""
    kept = os.dup(1)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.close(descriptor)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def command(tmp_path: Path, code: str) -> list[str]:
    """A command for LAUNCH: `-m distpool worker` and what follows are arguments of the code."""
    script = tmp_path / "worker.py"
    script.write_text(code)
    return [sys.executable, str(script)]


def test_they_come_up_and_print_under_their_names(tmp_path: Path) -> None:
    host = Host("127.0.0.9")
    stdout = tmp_path / "stdout"
    with descriptor_1(stdout):
        launched = host.launch(2, command(tmp_path, WORKER))
        assert launched.problems == [] and [worker[1:] for worker in launched.workers] == [["127.0.0.1", 9123]] * 2
        first, second = (worker[0] for worker in launched.workers)
        host.name([[second, 8], [first, 7], [99, 9]])
        host.join()
    expected = "cookie cccccccccccccccc arguments -m distpool worker --bind-to 127.0.0.9\n"
    assert sorted(stdout.read_text().splitlines(True)) == [f"      From worker {pid}:\t{expected}" for pid in (7, 8)]


#: Says what it was given besides.
HANDED = WORKER.replace('"arguments", *sys.argv[1:]', '"lifeline", lifeline()').replace(
    "    import sys\n",
    """    import os, select, sys
    def lifeline():
        reading, end = map(int, os.environ["DISTPOOL_STARTED_BY"].split(","))
        print("reading", os.fstat(reading).st_ino == os.fstat(1).st_ino, flush=True)
        return len(os.read(end, 1))
""",
)


@pytest.mark.skipif(sys.platform == "win32", reason="descriptors are not handed on there")
def test_they_hear_of_our_end_also_if_a_child_of_ours_lives_on(tmp_path: Path) -> None:
    host = Host()
    stdout = tmp_path / "stdout"
    with descriptor_1(stdout):
        launched = host.launch(1, command(tmp_path, HANDED))
        host.name([[launched.workers[0][0], 7]])
        until(lambda: "reading True" in stdout.read_text(), "it has looked at its descriptors")
        host.on_fork[0]()  # as in a forked child, which closes its copy
        host.join()
    assert "cookie cccccccccccccccc lifeline 0" in stdout.read_text()


@pytest.mark.skipif(sys.platform == "win32", reason="descriptors are not handed on there")
def test_descriptors_that_are_missing_leave_none_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    real = os.pipe

    def pipe() -> tuple[int, int]:
        if opened:
            raise OSError(24, "too many")
        opened.extend(real())
        return opened[0], opened[1]

    monkeypatch.setattr(siblings.os, "pipe", pipe)
    launched = Host().launch(1, command(tmp_path, WORKER))
    assert launched.workers == [] and "too many" in launched.problems[0][0]
    for number in opened:
        with pytest.raises(OSError):
            os.fstat(number)


def test_all_cpus_but_the_one_of_this_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(siblings, "_cpus", lambda: 3)
    host = Host()
    with descriptor_1(tmp_path / "stdout"):
        launched = host.launch("auto", command(tmp_path, WORKER))
        host.name([[worker[0], 5] for worker in launched.workers])
        host.join()
    assert len(launched.workers) == 2 and "--bind-to" not in (tmp_path / "stdout").read_text()


def test_one_that_dies_says_why(tmp_path: Path) -> None:
    host = Host()
    launched = host.launch(1, command(tmp_path, "print('no such cluster')\nraise SystemExit(3)\n"))
    host.join()
    [[reason, output]] = launched.problems
    assert launched.workers == [] and reason == "exit code 3 before it was ready" and output == "no such cluster"


def test_one_that_says_nothing_is_ended_in_time(tmp_path: Path) -> None:
    host = Host()
    launched = host.launch(2, command(tmp_path, "import time\ntime.sleep(60)\n"), timeout=0.2)
    host.join()
    assert [reason for reason, _ in launched.problems] == ["it printed no header line in time"] * 2


def test_one_that_talks_too_much_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(siblings, "_MAX_BANNER", 5)
    host = Host()
    launched = host.launch(1, command(tmp_path, "while True: print('blah', flush=True)\n"))
    host.join()
    assert len(launched.problems) == 1 and launched.problems[0][1].splitlines()[0] == "blah"


def test_a_command_that_does_not_exist(tmp_path: Path) -> None:
    launched = Host().launch(2, [str(tmp_path / "none")])
    assert launched.workers == [] and len(launched.problems) == 2
    assert str(tmp_path / "none") in launched.problems[0][0]


def test_how_many_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    if hasattr(os, "sched_getaffinity"):
        assert siblings._cpus() == len(os.sched_getaffinity(0))
        monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert siblings._cpus() == 1
