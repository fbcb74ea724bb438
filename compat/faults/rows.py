"""The rows of the table. A row gets the class of a peer's bed and returns what it found; to add one, decorate a
function with :func:`row`. ``ok`` is None where a peer has no such feature."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compat._proc import ROOT
from compat.faults import tasks
from compat.faults.beds import NEVER, Bed, Call, NotApplicable, PoolBed

Found = tuple[bool, str]
Row = Callable[[type[Bed]], Found]
ROWS: dict[str, tuple[str, Row]] = {}
# Bounds are for a quiet machine; a loaded one gets this factor (COMPAT_SLACK).
SLACK = float(os.environ.get("COMPAT_SLACK", "3"))
LIMIT = 10.0


def row(name: str, text: str) -> Callable[[Row], Row]:
    """Register a row."""

    def register(function: Row) -> Row:
        ROWS[name] = (text, function)
        return function

    return register


def describe(outcome: object) -> str:
    """A short name of an outcome."""
    return type(outcome).__name__ if isinstance(outcome, BaseException) else repr(outcome)[:40]


def warm(bed: Bed) -> None:
    """Both workers run before anything goes wrong; dask and others take seconds to start."""
    found = bed.batch([(tasks.good, (n,)) for n in range(4)], 40)
    if found != [1000 + n for n in range(4)]:
        raise AssertionError(f"does not even start: {[describe(f) for f in found]}")


def one_bad(bed: Bed, bad: Call, bound: float, judge: Callable[[Any], bool] | None = None) -> Found:
    """The measure of all rows: 8 tasks, the fourth bad, then one more; both workers must be there afterwards."""
    warm(bed)
    calls: list[Call] = [(tasks.good, (n,)) for n in range(8)]
    calls[3] = bad
    start = time.monotonic()
    found = bed.batch(calls, LIMIT)
    seconds = time.monotonic() - start
    lost = sum(found[n] != 1000 + n for n in range(8) if n != 3)
    never = sum(outcome is NEVER for outcome in found)
    again = bed.batch([(tasks.good, (8,))], LIMIT)[0]
    pids = bed.batch([(tasks.pid_of, (n,)) for n in range(8)], LIMIT) if again == 1008 else []
    workers = len({pid for pid in pids if isinstance(pid, int)})
    parts = [f"bad one: {describe(found[3])}", f"{lost} of 7 others lost"]
    if never:
        parts.append(f"{never} never end")
    parts.append("next ok" if again == 1008 else f"next: {describe(again)}")
    parts += [f"{workers} workers", f"{seconds:.1f} s"]
    right = isinstance(found[3], BaseException) and (judge is None or judge(found[3]))
    if isinstance(found[3], BaseException) and not right:
        parts.append(f"says {str(found[3])[:80]!r}")
    ok = right and lost == 0 and again == 1008 and workers == 2 and seconds <= (bound + 0.5) * SLACK
    return ok, ", ".join(parts)


def bad_task(name: str, text: str, fn: Callable[[int], Any], bound: float, judge: Any = None) -> None:
    """A row whose fourth task is ``fn``."""
    row(name, text)(lambda bed: one_bad(bed(), (fn, (3,)), bound, judge))


def names(*words: str) -> Callable[[BaseException], bool]:
    """The error, its cause included, must mention all of these."""

    def judge(error: BaseException) -> bool:
        text = f"{type(error).__name__} {error} {error.__cause__}"
        return all(word in text for word in words)

    return judge


bad_task("F1 kill", "task kills its process with SIGKILL", tasks.kill_self, 1)
bad_task("F1 exit", "task calls os._exit(7)", tasks.hard_exit, 1)
bad_task("F1 segfault", "task segfaults", tasks.segfault, 1)
bad_task("F3", "sys.exit(7) in a task", tasks.soft_exit, 1, lambda error: isinstance(error, SystemExit))
bad_task("F4 init", "exception class with two arguments", tasks.raise_two_arguments, 0.5, names("TwoArguments"))
bad_task("F4 lock", "exception that holds a lock", tasks.raise_holds_lock, 0.5, names("HoldsLock"))
bad_task("F4 reduce", "exception whose __reduce__ raises", tasks.raise_bad_reduce, 0.5, names("BadReduce"))
bad_task("F5 result", "result that cannot be pickled", tasks.return_lock, 0.5, names("lock"))
bad_task("F6 result", "result that fails while loading here", tasks.return_fails_on_load, 0.5)


@row("F2", "a death among 50 queued tasks: one error, nothing runs twice")
def queued(bed_class: type[Bed]) -> Found:
    """Every start leaves a line in a file."""
    bed = bed_class()
    warm(bed)
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "starts")
        found = bed.batch([(tasks.noted, (path, n, 10)) for n in range(50)], LIMIT)
        starts = Counter(Path(path).read_text().split())
    lost = sum(found[n] != 1000 + n for n in range(50) if n != 10)
    twice = sum(count > 1 for count in starts.values())
    ok = lost == 0 and twice == 0 and isinstance(found[10], BaseException)
    return ok, f"bad one: {describe(found[10])}, {lost} of 49 others lost, {twice} ran twice"


@row("F5 argument", "argument that cannot be pickled")
def unpicklable_argument(bed_class: type[Bed]) -> Found:
    """A lock as an argument."""
    return one_bad(bed_class(), (tasks.take, (threading.Lock(),)), 0.5, names("lock"))


@row("F5 function", "function that cannot be pickled")
def unpicklable_function(bed_class: type[Bed]) -> Found:
    """A method of a lock."""
    return one_bad(bed_class(), (threading.Lock().acquire, ()), 0.5, names("lock"))


@row("F6 argument", "argument that fails while loading on the worker")
def bad_load(bed_class: type[Bed]) -> Found:
    """That future only."""
    return one_bad(bed_class(), (tasks.take, (tasks.FailsOnLoad("worker"),)), 0.5)


def timeout_row(name: str, text: str, fn: Callable[[int], Any]) -> None:
    """A row with a time limit of half a second per task."""

    @row(name, text)
    def function(bed_class: type[Bed]) -> Found:
        if not bed_class.task_timeout:
            raise NotApplicable("no time limit per task")
        bed = bed_class()
        warm(bed)
        handles = [bed.submit(tasks.good, n) for n in range(3)]
        start = time.monotonic()
        bad = bed.outcome(bed.limited(fn, 3), LIMIT)
        seconds = time.monotonic() - start
        others = [bed.outcome(handle, LIMIT) for handle in handles]
        again = bed.batch([(tasks.good, (n,)) for n in range(4)], LIMIT)
        ok = isinstance(bad, BaseException) and "imeout" in type(bad).__name__ and seconds < (1.5 + 0.5) * SLACK
        ok = ok and others == [1000, 1001, 1002] and again == [1000, 1001, 1002, 1003]
        good = "next ok" if again[0] == 1000 else f"next: {describe(again[0])}"
        lost = sum(others[n] != 1000 + n for n in range(3))
        return ok, f"{describe(bad)}, {seconds:.1f} s, {lost} of 3 others lost, {good}"


timeout_row("F7 python", "endless Python loop, time limit 0.5 s", tasks.loop_python)
timeout_row("F7 C", "endless loop in C, time limit 0.5 s", tasks.loop_c)
timeout_row("F7 deaf", "ignores SIGINT and SIGTERM, time limit 0.5 s", tasks.loop_deaf)


def initializer_row(name: str, text: str, initializer: Callable[[str], None]) -> None:
    """Pending and later calls must fail, and nothing may start workers for ever."""

    @row(name, text)
    def function(bed_class: type[Bed]) -> Found:
        with tempfile.TemporaryDirectory() as directory:
            path = os.path.join(directory, "starts")
            start = time.monotonic()
            try:
                bed = bed_class(initializer=initializer, initargs=(path,))
                found = bed.batch([(tasks.good, (n,)) for n in range(4)], 6)
                seconds = time.monotonic() - start
                later = bed.batch([(tasks.good, (9,))], 3)[0]
            except NotApplicable:
                raise
            except Exception as error:
                found, later, seconds = [error], error, time.monotonic() - start
            time.sleep(1.0)
            starts = len(Path(path).read_text().split())
        failed = all(isinstance(outcome, BaseException) for outcome in [*found, later])
        ok = failed and starts <= 8 and seconds < (2 + 0.5) * SLACK
        return ok, f"{describe(found[0])}, later: {describe(later)}, {starts} starts, {seconds:.1f} s"


initializer_row("F8 raises", "initializer raises", tasks.initializer_raises)
initializer_row("F8 dies", "initializer dies", tasks.initializer_dies)


@row("F9", "task allocates 1 GiB under a limit of 300 MiB")
def memory_limit(bed_class: type[Bed]) -> Found:
    """The error should say who killed it."""
    if "memory_limit" not in bed_class.options:
        raise NotApplicable("no memory limit")
    return one_bad(bed_class(memory_limit="300MiB"), (tasks.allocate, (1 << 30,)), 3)


CALLER = """
import sys, time
from compat.faults import beds, tasks
bed = beds.BEDS[sys.argv[1]]()
bed.batch([(tasks.good, (n,)) for n in range(4)], 40)
import threading
calls = [(tasks.busy, (sys.argv[2], sys.argv[3])) for _ in range(2)]
threading.Thread(target=bed.batch, args=(calls, 60), daemon=True).start()
time.sleep(60)
"""


@row("F10", "caller killed with SIGKILL while workers compute, sleep, run C: workers gone, nothing left")
def caller_killed(bed_class: type[Bed]) -> Found:
    """How long the workers outlive the caller, at most 8 s."""
    import psutil

    from compat.faults.beds import BEDS

    name = next(name for name, bed in BEDS.items() if bed is bed_class)
    parts, ok = [], True
    for kind in ("python", "sleep", "c"):
        with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryDirectory() as temporary:
            shm_there = os.path.isdir("/dev/shm")
            shm = set(os.listdir("/dev/shm")) if shm_there else set()
            env = {**os.environ, "TMPDIR": temporary, "PYTHONPATH": str(ROOT)}
            caller = subprocess.Popen(
                [sys.executable, "-c", CALLER, name, directory, kind], env=env, stdout=-3, stderr=-3, cwd=ROOT
            )
            begun = time.monotonic()
            while len(os.listdir(directory)) < 2 and time.monotonic() - begun < 40:
                time.sleep(0.05)
            pids = [int(entry.partition("-")[2]) for entry in os.listdir(directory)]
            caller.kill()
            caller.wait()
            killed = time.monotonic()
            while any(map(psutil.pid_exists, pids)) and time.monotonic() - killed < 8:
                time.sleep(0.05)
            seconds = time.monotonic() - killed
            alive = [pid for pid in pids if psutil.pid_exists(pid)]
            left: list[str] = []
            for _ in range(
                10
            ):  # what other programs make there (semaphores have their names for a moment) does not stay
                time.sleep(0.3)
                left = os.listdir(temporary)
                left += [entry for entry in os.listdir("/dev/shm") if entry not in shm] if shm_there else []
                if not left:
                    break
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
        text = f"{len(alive)} still alive after 8 s" if alive else f"gone after {seconds:.1f} s"
        parts.append(f"{kind}: {text if pids else 'never started'}" + (f", left {left[:2]}" if left else ""))
        ok = ok and bool(pids) and not alive and seconds <= 2 * SLACK and not left
    return ok, "; ".join(parts)


@row("F11", "Ctrl-C during result(), ten times: one KeyboardInterrupt each, still usable")
def interrupts(bed_class: type[Bed]) -> Found:
    """The whole process group gets the signal, as from a terminal."""
    bed = bed_class()
    warm(bed)
    chance, raised, slow = random.Random(1), 0, 0.0
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for _ in range(10):
        handle = bed.submit(tasks.sleep, 0.3)
        timer = threading.Timer(chance.uniform(0.0, 0.2), os.killpg, (0, signal.SIGINT))
        start = time.monotonic()
        timer.start()
        try:
            bed.get(handle, LIMIT)
            timer.join()
            time.sleep(0.05)
        except KeyboardInterrupt:
            raised += 1
            slow = max(slow, time.monotonic() - start)
        timer.join()
    found = bed.batch([(tasks.good, (n,)) for n in range(8)], LIMIT)
    right = sum(found[n] == 1000 + n for n in range(8))
    ok = raised == 10 and right == 8 and slow < 1 * SLACK
    return ok, f"{raised} of 10 raised, slowest {slow:.1f} s, afterwards {right} of 8 right ({describe(found[0])})"


@row("F12", "max_tasks_per_child=3, 300 tasks: each runs once")
def recycled(bed_class: type[Bed]) -> Found:
    """The stdlib's executor gets stuck on some versions."""
    bed = bed_class(max_tasks=3)
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "starts")
        found = bed.batch([(tasks.noted, (path, n, -1)) for n in range(300)], 60)
        starts = Counter(Path(path).read_text().split()) if os.path.exists(path) else Counter()
    right = sum(found[n] == 1000 + n for n in range(300))
    return right == 300 and all(c == 1 for c in starts.values()), f"{right} of 300 right, {len(starts)} started"


@row("F13", "endless generator into a map: first result at once, little taken")
def endless(bed_class: type[Bed]) -> Found:
    """Taken before the first result; the generator gives up at 200,000."""
    bed = bed_class()
    warm(bed)
    taken = 0

    def items() -> Any:
        nonlocal taken
        while taken < 200_000:
            taken += 1
            yield taken

    start = time.monotonic()
    first = next(bed.lazy_map(tasks.good, items()))
    seconds, swallowed = time.monotonic() - start, taken
    time.sleep(0.5)
    ok = first == 1001 and taken <= 8 * 2 + 2 and seconds < (0.2 + 0.1) * SLACK
    return ok, f"{swallowed:,} taken before the first result ({seconds:.1f} s), {taken:,} half a second later"


@row("F14", "input iterator raises half-way: results before it, then its error")
def broken_input(bed_class: type[Bed]) -> Found:
    """20 good items, then an error."""
    bed = bed_class()
    warm(bed)

    def items() -> Any:
        yield from range(20)
        raise LookupError("input ends badly")

    results = []
    try:
        for value in bed.lazy_map(tasks.good, items()):
            results.append(value)
    except LookupError:
        return results == [1000 + n for n in range(20)], f"{len(results)} results, then the error"
    return False, f"{len(results)} results and no error"


@row("F15", "callbacks that raise, submit, block on another future")
def callbacks(bed_class: type[Bed]) -> Found:
    """Only where futures have callbacks."""
    bed = bed_class()
    warm(bed)
    handle = bed.submit(tasks.good, 1)
    if not hasattr(handle, "add_done_callback"):
        raise NotApplicable("no callbacks on a result")
    served, finished = [], threading.Event()

    def raising(_: Any) -> None:
        raise RuntimeError("callback raises on purpose")

    def submitting(_: Any) -> None:
        served.append(bed.get(bed.submit(tasks.good, 2), 5))
        finished.set()

    import logging

    logging.disable(logging.CRITICAL)
    other = bed.submit(tasks.sleep, 0.1)
    other.add_done_callback(raising)
    other.add_done_callback(submitting)
    came = finished.wait(6)
    again = bed.batch([(tasks.good, (n,)) for n in range(4)], LIMIT)
    ok = came and served == [1002] and again == [1000, 1001, 1002, 1003]
    return ok, f"callback's own call: {served or 'stalls'}, next: {describe(again[0])}"


@row("F16 recursion", "fib(12) through the executor itself on 2 workers")
def recursion(bed_class: type[Bed]) -> Found:
    """Tasks wait for tasks."""
    if not bed_class.module == "distpool":
        raise NotApplicable("an executor cannot travel into a task")
    bed = bed_class()
    warm(bed)
    start = time.monotonic()
    executor = bed.executor  # type: ignore[attr-defined]
    found = executor.submit(tasks.fib, executor, 12).result(30)
    seconds = time.monotonic() - start
    return found == 144 and seconds < 10 * SLACK, f"{found} in {seconds:.1f} s"


@row("F16 nested", "a task opens a process pool of its own")
def nested_pool(bed_class: type[Bed]) -> Found:
    """Daemonic workers may not."""
    bed = bed_class()
    warm(bed)
    found = bed.batch([(tasks.nested, (1,))], 25)[0]
    return found == 1001, describe(found) if found != 1001 else "works"


@row("F17", "two tasks that wait for each other, behind 20 short ones")
def meeting(bed_class: type[Bed]) -> Found:
    """Prefetch must not put one behind the other."""
    from compat.benchmarks.tasks import rendezvous

    bed = bed_class()
    warm(bed)
    with tempfile.TemporaryDirectory() as directory:
        calls: list[Call] = [(tasks.pid_of, (n,)) for n in range(20)]
        start = time.monotonic()
        found = bed.batch([*calls, *((rendezvous, (directory, 2, n)) for n in range(2))], LIMIT)
    ok = all(isinstance(outcome, int) for outcome in found)
    return ok, f"{describe(found[-1])[:30]}, {time.monotonic() - start:.1f} s"


@row("F19", "file descriptors exhausted during 8 tasks")
def descriptors(bed_class: type[Bed]) -> Found:
    """Right values or clear errors, and all well afterwards."""
    import resource

    bed = bed_class()
    warm(bed)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    top = max(map(int, os.listdir("/proc/self/fd"))) if os.path.isdir("/proc/self/fd") else 64
    resource.setrlimit(resource.RLIMIT_NOFILE, (top + 1, hard))
    held = []
    try:
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        pass
    during = bed.batch([(tasks.good, (n,)) for n in range(8)], LIMIT)
    for descriptor in held:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    after = bed.batch([(tasks.good, (n,)) for n in range(8)], LIMIT)
    right = sum(during[n] == 1000 + n for n in range(8))
    ok = NEVER not in during and after == [1000 + n for n in range(8)]
    return ok, f"{right} of 8 right meanwhile, afterwards {sum(after[n] == 1000 + n for n in range(8))} of 8"


@row("F20", "caller forks: the child leaves, or uses a new pool; the parent is unharmed")
def forked(bed_class: type[Bed]) -> Found:
    """os.fork with a living pool."""
    bed = bed_class()
    warm(bed)
    codes = []
    for use in (False, True):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                if use:
                    code = 0 if bed_class().batch([(tasks.good, (1,))], 15) == [1001] else 3
                else:
                    code = 0
            finally:
                os._exit(code)
        end = time.monotonic() + 25
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done or time.monotonic() > end:
                break
            time.sleep(0.02)
        if not done:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        codes.append(os.waitstatus_to_exitcode(status) if done else "hangs")
    after = bed.batch([(tasks.good, (n,)) for n in range(8)], LIMIT)
    right = sum(after[n] == 1000 + n for n in range(8))
    return codes == [0, 0] and right == 8, f"children: {codes}, parent afterwards {right} of 8"


FORGETFUL = """
import sys
from compat.faults import beds, tasks
bed = beds.BEDS[sys.argv[1]]()
handles = [bed.submit(tasks.print_lines, n, 1, False) for n in range(6)]
"""


@row("F21", "program ends with pending work: done (a Pool: dropped), stderr empty, exit code 0")
def forgotten(bed_class: type[Bed]) -> Found:
    """No shutdown, no with. The stdlib's executor finishes its work, the stdlib's Pool ends with the program."""
    from compat.faults.beds import BEDS

    name = next(name for name, bed in BEDS.items() if bed is bed_class)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(
            [sys.executable, "-c", FORGETFUL, name], env=env, capture_output=True, text=True, timeout=20, cwd=ROOT
        )
    except subprocess.TimeoutExpired:
        return False, "never ends"
    lines = sum("<" in line for line in done.stdout.splitlines())
    text = f"{lines} of 6 done, exit {done.returncode}, stderr {len(done.stderr.splitlines())} lines"
    enough = lines == 6 or issubclass(bed_class, PoolBed)
    return enough and not done.stderr and done.returncode == 0, text


PRINTER = """
import sys
from compat.faults import beds, tasks
bed = beds.BEDS[sys.argv[1]]()
bed.batch([(tasks.good, (n,)) for n in range(4)], 40)
bed.batch([(tasks.print_lines, (n, 5000, n == 3)) for n in range(4)], 20)
import os, psutil
sys.stdout.flush()
import time; time.sleep(1)
for child in psutil.Process().children(recursive=True): child.kill()
os._exit(0)
"""


@row("F22", "20,000 lines of output, the last one just before death: none lost, none mixed")
def output(bed_class: type[Bed]) -> Found:
    """stdout is a pipe."""
    from compat.faults.beds import BEDS

    name = next(name for name, bed in BEDS.items() if bed is bed_class)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile() as out:
        caller = subprocess.Popen([sys.executable, "-c", PRINTER, name], env=env, stdout=out, stderr=-3, cwd=ROOT)
        try:
            caller.wait(60)
        except subprocess.TimeoutExpired:
            caller.kill()
            caller.wait()
            return False, "never ends"
        out.seek(0)
        lines = out.read().decode(errors="replace").splitlines()
    tail = "x" * 40 + ">"
    found = {line[line.index("<") :] for line in lines if line.count("<") == 1 and line.endswith(tail)}
    expected = {f"<{worker}:{number}:{tail}" for worker in range(4) for number in range(5000)}
    mixed = sum(line.count("<") > 1 for line in lines)
    return expected <= found and not mixed, f"{len(expected - found)} lost, {mixed} mixed"


@row("F23", "2,000 futures, a third cancelled at random: counts add up")
def cancelled(bed_class: type[Bed]) -> Found:
    """Value or cancelled, nothing between."""
    bed = bed_class()
    warm(bed)
    handles = [bed.submit(tasks.sleep, 0.0005) for _ in range(2000)]
    if not hasattr(handles[0], "cancel"):
        raise NotApplicable("no cancel")
    chance = random.Random(1)
    wanted = [handle for handle in handles if chance.random() < 0.33]
    for handle in wanted:
        handle.cancel()
    values = gone = never = wrong = 0
    end = time.monotonic() + 30
    for handle in handles:
        outcome = bed.outcome(handle, max(0.01, end - time.monotonic()))
        values += outcome == 0.0005
        gone += type(outcome).__name__ == "CancelledError"
        never += outcome is NEVER
    wrong = 2000 - values - gone - never
    again = bed.batch([(tasks.good, (n,)) for n in range(4)], LIMIT)
    ok = values + gone == 2000 and gone <= len(wanted) and again == [1000, 1001, 1002, 1003]
    return ok, f"{values} values, {gone} cancelled, {never} never, {wrong} other, next: {describe(again[0])}"


@row("F24", "SIGSTOP of a worker for 3 s, then SIGCONT: nothing fails")
def stopped(bed_class: type[Bed]) -> Found:
    """A machine that stands still for a while."""
    bed = bed_class()
    warm(bed)
    pids = {pid for pid in bed.batch([(tasks.pid_of, (n,)) for n in range(8)], LIMIT) if isinstance(pid, int)}
    victim = min(pids)
    os.kill(victim, signal.SIGSTOP)
    threading.Timer(3, os.kill, (victim, signal.SIGCONT)).start()
    found = bed.batch([(tasks.good, (n,)) for n in range(40)], 25)
    right = sum(found[n] == 1000 + n for n in range(40))
    return right == 40, f"{right} of 40 right"


@row("F25", "kill -9 of a random worker every 50 ms during a map of 3,000 with retries")
def storm(bed_class: type[Bed]) -> Found:
    """All results right, in order."""
    if bed_class.module != "distpool":
        raise NotApplicable("no retries")
    import psutil

    bed = bed_class()
    warm(bed)
    from compat.benchmarks.tasks import burn_and_add

    executor = bed.executor  # type: ignore[attr-defined]
    over = threading.Event()
    kills = 0

    def shoot() -> None:
        nonlocal kills
        chance = random.Random(1)
        while not over.wait(0.05):
            workers = list(executor._processes)
            if workers:
                victim = chance.choice(workers)
                if psutil.pid_exists(victim):
                    os.kill(victim, signal.SIGKILL)
                    kills += 1

    thread = threading.Thread(target=shoot)
    thread.start()
    start = time.monotonic()
    try:
        found = executor.pmap(burn_and_add, range(3000), retry_delays=[0] * 50)
    finally:
        over.set()
        thread.join()
    right = kills > 5 and found == list(range(1, 3001))
    return right, f"{kills} kills, {len(found)} results, {time.monotonic() - start:.1f} s"


@row("F26", "worker's working directory deleted")
def no_directory(bed_class: type[Bed]) -> Found:
    """It goes on."""
    bed = bed_class()
    warm(bed)
    with tempfile.TemporaryDirectory() as directory:
        gone = bed.batch([(tasks.remove_directory, (os.path.join(directory, str(n)),)) for n in range(8)], LIMIT)
    found = bed.batch([(tasks.good, (n,)) for n in range(8)], LIMIT)
    right = sum(found[n] == 1000 + n for n in range(8))
    return right == 8 and not any(isinstance(g, BaseException) for g in gone), f"{right} of 8 right"
