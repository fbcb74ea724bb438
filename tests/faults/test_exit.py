"""Row F21: the interpreter exits with work pending, executors forgotten, hooks to run, threads waiting."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import helpers
from .helpers import NOISE, at_most
from .programs import Program, run

PENDING = """
kind, path, ending = sys.argv[1], helpers.Path(sys.argv[2]), sys.argv[3]

def work(number):
    time.sleep(0.01)
    helpers.note(path, number)
    print("line", number)

runner = Runner(kind, 2)
calls = [runner.submit(work, number) for number in range(50)]
if ending == "shutdown":
    runner.raw.shutdown(wait=False)
elif ending == "close":
    runner.raw.close()
elif ending == "sys.exit":
    sys.exit(5)
elif ending == "error":
    raise ValueError("the program's own")
"""


@pytest.mark.parametrize("ending", ["none", "shutdown", "sys.exit", "error"])
def test_pending_work_of_an_executor_completes(tmp_path: Path, ending: str) -> None:
    """Every task runs once, its output appears, the exit code is the program's own."""
    path = tmp_path / "log"
    outcome = run(PENDING, "executor", path, ending)
    assert helpers.noted(path) == {str(number): 1 for number in range(50)}
    printed = sorted(int(line.split("line ")[1]) for line in outcome.stdout.splitlines())
    assert printed == list(range(50))
    if ending == "error":
        assert outcome.returncode == 1
        assert outcome.stderr.count("Traceback") == 1
        assert outcome.stderr.endswith("ValueError: the program's own\n")
        outcome.assert_nothing_left()
    else:
        outcome.assert_clean(5 if ending == "sys.exit" else 0)


@pytest.mark.parametrize("ending", ["none", "close", "sys.exit"])
def test_pool_with_pending_work(tmp_path: Path, ending: str) -> None:
    """As the stdlib's: an unjoined pool is terminated. No task runs twice, nothing is said, nothing stays."""
    path = tmp_path / "log"
    outcome = run(PENDING, "pool", path, ending)
    assert set(helpers.noted(path).values()) <= {1}
    outcome.assert_clean(5 if ending == "sys.exit" else 0)


ENDINGS = {
    "idle and forgotten": "",
    "never used": "other = Runner(kind, 2)",
    "deleted": "del runner",
    "in a cycle": "runner.me = runner; del runner",
    "ten of them": "more = [Runner(kind, 1) for _ in range(10)]",
    "lambda pending": "call = runner.submit(lambda: 3)",
    "error unread": "call = runner.submit(helpers.fail, 'unread')",
    "death unread": "call = runner.submit(helpers.die, 'SIGKILL')",
    "callback pending": (
        "call = runner.submit(time.sleep, 0.1)\nif kind == 'executor': call.add_done_callback(lambda future: None)"
    ),
    "map half read": "results = runner.raw.imap_unordered(helpers.square, range(1000)); next(results)",
    "endless map half read": (
        "import itertools; results = runner.raw.imap_unordered(helpers.square, itertools.count()); next(results)"
    ),
    "thread that waits": (
        "calls = [runner.submit(time.sleep, 0.01) for _ in range(50)]\n"
        "threading.Thread(target=lambda: [runner.value(call) for call in calls]).start()"
    ),
    "main thread of the program gone": (
        "threading.Thread(target=lambda: (threading.main_thread().join(), time.sleep(0.2))).start()"
    ),
    "module variable in a class": "class Keep: executor = runner",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_forgotten(kind: str, ending: str) -> None:
    source = "kind = sys.argv[1]\nrunner = Runner(kind, 2)\nassert runner.call(helpers.square, 3) == 9\n"
    with at_most(5, "a program that does next to nothing"):
        run(source + ENDINGS[ending], kind).assert_clean()


def test_atexit_hook(kind: str) -> None:
    """Hooks come after the stdlib's own end of executors: "cannot schedule new futures", and no hang."""
    source = """
import atexit
kind = sys.argv[1]
runner = Runner(kind, 2)
assert runner.call(helpers.square, 3) == 9

@atexit.register
def hook():
    try:
        print("value", runner.call(helpers.square, 4))
    except (RuntimeError, ValueError) as error:
        print("error", error)
"""
    outcome = run(source, kind)
    if kind == "executor":
        assert outcome.stdout.startswith("error cannot schedule new futures")
    else:
        assert outcome.stdout.startswith(("value 16", "error"))
    outcome.assert_clean()


def test_executor_made_in_an_atexit_hook(kind: str) -> None:
    """It may be refused, as the stdlib's; it may not hang."""
    source = """
import atexit
kind = sys.argv[1]

@atexit.register
def hook():
    try:
        runner = Runner(kind, 1)
        print("value", runner.call(helpers.square, 4))
        runner.close()
    except RuntimeError as error:
        print("error", error)
"""
    outcome = run(source, kind)
    assert outcome.stdout.startswith(("value 16", "error"))
    outcome.assert_clean()


@pytest.mark.parametrize("daemons", [1, 10])
def test_daemon_threads_inside_result(kind: str, daemons: int) -> None:
    """They wait for a task that is never to end by itself; the exit code stays the program's."""
    source = """
kind, daemons = sys.argv[1], int(sys.argv[2])
runner = Runner(kind, 2)
started = threading.Semaphore(0)

def wait():
    call = runner.submit(time.sleep, 0.5)
    started.release()
    runner.value(call, None)

for _ in range(daemons):
    threading.Thread(target=wait, daemon=True).start()
for _ in range(daemons):
    started.acquire()
sys.exit(6)
"""
    run(source, kind, daemons).assert_clean(6)


def test_work_submitted_by_other_threads_during_exit(kind: str) -> None:
    """Threads that go on submitting while the interpreter ends get an error, not a hang."""
    source = """
kind = sys.argv[1]
runner = Runner(kind, 2)
begun = threading.Event()

def submit_until_refused():
    try:
        while True:
            runner.call(helpers.square, 3)
            begun.set()
    except BaseException:
        pass

for _ in range(4):
    threading.Thread(target=submit_until_refused, daemon=True).start()
begun.wait(20)
"""
    with at_most(5, "the end"):
        run(source, kind).assert_clean()


def test_task_that_exits_the_program_from_a_callback(kind: str) -> None:
    """`os._exit` on a thread of ours, with work pending."""
    source = """
kind = sys.argv[1]
runner = Runner(kind, 2)
runner.submit(time.sleep, 100)
if kind == "executor":
    runner.raw.submit(helpers.square, 3).add_done_callback(lambda future: os._exit(4))
else:
    runner.raw.apply_async(helpers.square, (3,), callback=lambda value: os._exit(4))
threading.Event().wait(60)
"""
    with at_most(3, "the end"):
        run(source, kind).assert_clean(4)


def test_warnings_as_errors(kind: str) -> None:
    """Nothing of ours relies on warnings being hidden: a pool left open is the only one who says so."""
    source = """
kind = sys.argv[1]
runner = Runner(kind, 2)
assert runner.call(helpers.square, 3) == 9
assert runner.call(len, bytes(1 << 20)) == 1 << 20
runner.close()
"""
    with Program(source, [kind], options=["-W", "error", "-X", "dev"]) as program:
        program.finish().assert_clean()


@pytest.mark.parametrize("way", ["-c", "stdin", "-m", "guarded"])
def test_ways_to_run_a_program(kind: str, way: str, tmp_path: Path) -> None:
    """Functions of `__main__` need neither a file nor a guard."""
    import os
    import subprocess
    import sys

    import distpool

    source = f"""
import distpool
def double(number):
    return 2 * number
class Thing:
    pass
def make():
    return Thing()
kind = {kind!r}
raw = (distpool.ClusterExecutor if kind == "executor" else distpool.DistPool)(2)
assert list(raw.map(double, range(5))) == [0, 2, 4, 6, 8]
assert all(isinstance(thing, Thing) for thing in raw.map(lambda _: make(), range(3)))
print("ok")
if kind == "pool":
    raw.terminate()
"""
    if way == "guarded":
        body = source.replace("kind = ", "if __name__ == '__main__':\n  kind = ", 1)
        head, tail = body.split("if __name__", 1)
        lines = ("if __name__" + tail).splitlines()
        source = head + "\n".join([lines[0], lines[1], *("  " + line for line in lines[2:])])
    (tmp_path / "prog_under_test.py").write_text(source)
    command = {
        "-c": [sys.executable, "-c", source],
        "stdin": [sys.executable],
        "-m": [sys.executable, "-m", "prog_under_test"],
        "guarded": [sys.executable, "prog_under_test.py"],
    }[way]
    paths = os.pathsep.join([str(Path(distpool.__file__).parents[1])])
    done = subprocess.run(
        command,
        input=source if way == "stdin" else None,
        stdin=None if way == "stdin" else subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30 * NOISE,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")
