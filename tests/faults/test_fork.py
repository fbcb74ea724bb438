"""Row F20: the calling program forks while an executor is alive. The parent is unharmed, the child is alone."""

from __future__ import annotations

import pytest

from .helpers import NOISE
from .programs import Outcome, run

QUIET = ["-W", "ignore::DeprecationWarning"]
"""3.12 and later warn about `os.fork` in a program that has threads, which is what is tested here."""

BEFORE = """
import multiprocessing, traceback
kind, ending = sys.argv[1:]
runner = Runner(kind, 2)
assert runner.call(helpers.square, 3) == 9
pending = [runner.submit(time.sleep, 0.01) for _ in range(50)]
read, write = os.pipe()

def in_child(act):
    '''Runs act in a forked child and returns its exit code; the child ends as the program says.'''
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            act()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        sys.stdout.flush()
        if ending == "os._exit":
            os._exit(0)
        sys.exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def use(runner):
    calls = [runner.submit(helpers.square, number) for number in range(100)]
    assert [runner.value(call) for call in calls] == [number * number for number in range(100)]
    assert runner.call(len, bytes(5 << 20)) == 5 << 20
    assert runner.call(lambda: "by value") == "by value"
"""

AFTER = """
use(runner)
for call in pending:
    runner.value(call)
assert len(runner.executor.workers) == 2
runner.close()
print("parent well")
"""

endings = pytest.mark.parametrize("ending", ["os._exit", "sys.exit"])


def check(body: str, kind: str, ending: str) -> Outcome:
    outcome = run(BEFORE + body + AFTER, kind, ending, options=QUIET)
    assert outcome.stderr == ""
    assert outcome.stdout.endswith("parent well\n"), outcome.stdout
    outcome.assert_clean()
    return outcome


@endings
def test_child_that_only_exits(kind: str, ending: str) -> None:
    """Many times: neither end of the child touches the parent's links."""
    check("for _ in range(10):\n    assert in_child(lambda: None) == 0\n    use(runner)\n", kind, ending)


@endings
def test_child_that_touches_the_inherited_executor(kind: str, ending: str) -> None:
    """`RuntimeError` at the call, at once; waiting for an inherited future ends as well."""
    body = """
def touch():
    for act in (
        lambda: runner.submit(helpers.square, 3),
        lambda: list(runner.raw.map(helpers.square, range(3))),
        lambda: runner.raw.pmap(helpers.square, range(3)),
        lambda: list(runner.raw.imap_unordered(helpers.square, range(3))),
    ):
        begin = time.monotonic()
        try:
            act()
        except RuntimeError:
            pass
        else:
            raise AssertionError("no RuntimeError")
        assert time.monotonic() - begin < BOUND
assert in_child(touch) == 0
""".replace("BOUND", str(0.2 * NOISE))
    check(body, kind, ending)


@endings
def test_child_that_waits_for_an_inherited_future(kind: str, ending: str) -> None:
    body = """
def touch():
    begin = time.monotonic()
    try:
        runner.value(pending[-1], 20)
    except BaseException as error:
        assert isinstance(error, RuntimeError), error
    assert time.monotonic() - begin < BOUND
pending.append(runner.submit(time.sleep, 1.0))
assert in_child(touch) == 0
""".replace("BOUND", str(0.3 * NOISE))
    check(body, kind, ending)


@endings
def test_child_with_an_executor_of_its_own(kind: str, ending: str) -> None:
    body = """
def make_own():
    own = Runner(kind, 2)
    use(own)
    assert distpool.myid() == 1
    own.close()
assert in_child(make_own) == 0
assert in_child(make_own) == 0
"""
    check(body, kind, ending)


@endings
def test_child_that_leaves_its_own_executor_open(kind: str, ending: str) -> None:
    """Its workers end with it, and not with the parent."""
    body = """
def make_own():
    global own
    own = Runner(kind, 2)
    use(own)
assert in_child(make_own) == 0
"""
    check(body, kind, ending)


@endings
def test_child_shuts_the_inherited_executor_down(kind: str, ending: str) -> None:
    """Whatever it answers there, it is at once, and the parent's workers live."""
    body = """
def shut_down():
    begin = time.monotonic()
    try:
        if kind == "executor":
            runner.raw.shutdown(wait=True)
        else:
            runner.raw.terminate()
            runner.raw.join()
    except RuntimeError:
        pass
    assert time.monotonic() - begin < BOUND
assert in_child(shut_down) == 0
""".replace("BOUND", str(0.5 * NOISE))
    check(body, kind, ending)


@endings
def test_child_is_killed(kind: str, ending: str) -> None:
    body = """
for _ in range(5):
    assert in_child(lambda: os.kill(os.getpid(), signal.SIGKILL)) == -9
"""
    check(body, kind, ending)


def test_multiprocessing_fork(kind: str) -> None:
    """The stdlib's own forks, with and without an executor in the child."""
    body = """
def child(own_executor):
    if own_executor:
        own = Runner(kind, 1)
        use(own)
        own.close()
context = multiprocessing.get_context("fork")
for own_executor in (False, True):
    processes = [context.Process(target=child, args=(own_executor,)) for _ in range(3)]
    for process in processes:
        process.start()
    use(runner)
    for process in processes:
        process.join(20)
        assert process.exitcode == 0, process.exitcode
with context.Pool(2) as pool:
    assert pool.map(helpers.square, range(10)) == [number * number for number in range(10)]
"""
    check(body, kind, "sys.exit")


def test_parent_ends_before_the_child(kind: str) -> None:
    """A forked child that lives on holds copies of our descriptors: the parent's workers end all the same."""
    body = """
child = os.fork()
if child == 0:
    os.close(1); os.close(2)
    time.sleep(20)  # what the daemon does: it must not end just when we look (it is killed after that)
    os._exit(0)
print("parent well")
os._exit(0)
"""
    outcome = run(BEFORE + body, kind, "os._exit", options=QUIET)
    # The child that lives on is itself called program.py, and no worker is.
    assert not [line for line in outcome.survivors if "program.py" not in line]
    assert outcome.stderr == ""


def test_fork_in_a_thread_while_calls_fly(kind: str) -> None:
    """Locks may be held by other threads at the moment of the fork."""
    body = """
stop = threading.Event()
def fly():
    while not stop.is_set():
        use(runner)
flyers = [threading.Thread(target=fly) for _ in range(2)]
for flyer in flyers:
    flyer.start()
def own():
    one = Runner(kind, 1)
    assert one.call(helpers.square, 4) == 16
    one.close()
for _ in range(5):
    assert in_child(lambda: None) == 0
    assert in_child(own) == 0
stop.set()
for flyer in flyers:
    flyer.join()
"""
    check(body, kind, "sys.exit")


def test_a_task_that_forks(kind: str) -> None:
    """The child that comes out of the task ends there as a program would: it must not go on as a second worker, which
    would write its own results, and outlive everybody."""
    body = """
def task(how):
    child = os.fork()
    if child == 0:
        if how == "exit":
            sys.exit(3)
        if how == "raise":
            sys.stderr = open(os.devnull, "w")
            raise ValueError("the child's")
        return "the child's"
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
for how, status in (("return", 0), ("exit", 3), ("raise", 1)):
    assert runner.call(task, how) == status
    for chunksize in (1, 3):
        assert list(runner.raw.map(task, [how] * 6, chunksize=chunksize)) == [status] * 6
"""
    check(body, kind, "os._exit")


READING = """
import numpy

def forked(make):
    '''What a forked child reads of an array that its parent has dropped, after the parent has got others.'''
    kept = make(7)
    (go, went), (said, says) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.read(go, 1)
            os.write(says, b"%d %d" % (kept.min(), kept.max()))
        finally:
            os._exit(0)
    del kept
    for number in range(3):
        make(number)
    os.write(went, b"!")
    os.waitpid(child, 0)
    return os.read(said, 100).decode()
"""


def test_child_goes_on_reading_results_that_its_parent_drops(kind: str) -> None:
    """They lie in memory that the worker uses again."""
    body = (
        READING
        + """
seen = forked(lambda number: runner.call(numpy.full, 1 << 17, number))
assert seen == '7 7', seen
"""
    )
    check(body, kind, "sys.exit")


def test_child_of_a_task_goes_on_reading_what_its_parent_drops(kind: str) -> None:
    """A task has its arguments from the master, and whatever it fetches from other workers."""
    body = (
        READING
        + """
def task(full):
    return forked(lambda number: distpool.remotecall_fetch(numpy.full, 1, 1 << 17, number))
seen = runner.call(task, None)
assert seen == '7 7', seen
"""
    )
    check(body, kind, "sys.exit")


REFERENCES = """
import distpool
own, other = distpool.addprocs(2)
pool, caching = distpool.WorkerPool([own, other]), distpool.CachingPool([own, other])
far, near = distpool.RemoteChannel(own), distpool.RemoteChannel(1)
fetched, unfetched = distpool.remotecall_wait(abs, own, -1), distpool.remotecall_wait(abs, own, -2)
pending, by_hand = distpool.remotecall(time.sleep, own, 2), distpool.Future(own)
assert fetched.fetch() == 1
uses = {
    "pmap": lambda: distpool.pmap(abs, [-1], pool=pool), "caching": lambda: distpool.pmap(abs, [-1], pool=caching),
    "pgenerate": lambda: list(distpool.pgenerate(abs, [-1], pool=pool)), "call": lambda: distpool.remotecall(abs, pool),
    "take a worker": lambda: pool.take(timeout=5), "members": pool.workers, "free": pool.isready,
    "put": lambda: far.put(1), "close": far.close, "take": lambda: far.take(timeout=5), "ready": far.isready,
    "near put": lambda: near.put(1), "near take": lambda: near.take(timeout=5), "iterate": lambda: list(near),
    "fetch": unfetched.fetch, "await": pending.wait, "callback": lambda: pending.add_done_callback(print),
    "set": lambda: by_hand.put(1), "by hand": by_hand.isready,
    "waits": lambda: __import__("concurrent.futures").futures.wait([pending], 5),
}
sys.stdout.flush()
child = os.fork()
if child == 0:
    assert fetched.fetch() == 1 and fetched.isready(), "what has been fetched is here"
    for name, use in uses.items():
        try:
            use()
        except RuntimeError as error:
            if "belongs to the process that forked this one" not in str(error):
                print(name, error)
        else:
            print(name, "worked")
    sys.stdout.flush()
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
far.put(5)
assert far.take() == 5 and distpool.pmap(abs, [-1], pool=pool) == [1] and unfetched.fetch() == 2
print("parent well")
"""


def test_references_in_a_forked_child() -> None:
    """They are the parent's. Some of their uses waited for ever, or were lost without a word."""
    outcome = run(REFERENCES, options=QUIET)
    assert outcome.stderr == "" and outcome.stdout == "parent well\n", outcome.stdout
    outcome.assert_clean()
