"""Row F11: Ctrl-C at any moment gives one `KeyboardInterrupt`, and leaves an executor that works."""

from __future__ import annotations

import signal
import time

import pytest

from .helpers import NOISE, PATIENCE, Gate
from .programs import Program

BOUND = 1.0

OPERATIONS = {
    "executor": ["result", "wait", "map", "pmap", "imap_unordered", "exception", "shutdown", "with", "with a map"],
    "pool": ["get", "wait", "apply", "map", "imap", "imap_unordered", "pmap", "join", "with", "with a map"],
}
ENDING = ("shutdown", "join", "with", "with a map")
"""Operations after which the executor cannot be used again."""
CASES = [(kind, operation) for kind, operations in OPERATIONS.items() for operation in operations]

WAITING = """
kind, operation, host, port = sys.argv[1:5]
address = host, int(port)

def block():
    raw = runner.raw
    hold = helpers.hold
    if operation == "result":
        raw.submit(hold, address).result()
    elif operation == "exception":
        raw.submit(hold, address).exception()
    elif operation == "wait" and kind == "executor":
        import concurrent.futures
        concurrent.futures.wait([raw.submit(hold, address)])
    elif operation == "wait":
        raw.apply_async(hold, (address,)).wait()
    elif operation == "get":
        raw.apply_async(hold, (address,)).get()
    elif operation == "apply":
        raw.apply(hold, (address,))
    elif operation in ("map", "imap", "imap_unordered"):
        list(getattr(raw, operation)(hold, [address] * 10))
    elif operation == "pmap":
        raw.pmap(hold, [address] * 10)
    elif operation == "shutdown":
        raw.submit(hold, address)
        raw.shutdown(wait=True)
    elif operation == "join":
        raw.apply_async(hold, (address,))
        raw.close()
        raw.join()
    elif operation == "with":
        with raw:
            runner.value(runner.submit(hold, address), None)
    elif operation == "with a map":
        with raw:
            list(raw.map(hold, [address] * 10))
"""

ENDS = (
    WAITING
    + """
runner = Runner(kind, 2)
block()
"""
)

GOES_ON = (
    WAITING
    + """
caught = 0
runner = Runner(kind, 2)
assert runner.call(helpers.square, 2) == 4
try:
    block()
except KeyboardInterrupt:
    caught += 1
if operation not in ("shutdown", "join", "with", "with a map"):
    assert runner.call(helpers.square, 3) == 9
    print("usable", caught, flush=True)
    helpers.hold(address, "main")
    calls = [runner.submit(helpers.square, number) for number in range(100)]
    assert [runner.value(call) for call in calls] == [number * number for number in range(100)]
    runner.close()
print("end", caught)
"""
)


@pytest.mark.parametrize(("kind", "operation"), CASES)
def test_uncaught(kind: str, operation: str, gate: Gate) -> None:
    """Gone within a second, by the signal as any Python program, with one traceback in total."""
    with Program(ENDS, [kind, operation, *gate.address]) as program:
        gate.arrival()
        program.interrupt()
        begin = time.monotonic()
        outcome = program.finish()
        took = time.monotonic() - begin
    assert outcome.returncode == -signal.SIGINT, outcome.stderr
    assert outcome.stderr.count("Traceback (most recent call last)") == 1, outcome.stderr
    assert outcome.stderr.rstrip().endswith("KeyboardInterrupt")
    assert "During handling" not in outcome.stderr
    outcome.assert_nothing_left()
    assert took <= BOUND * NOISE


@pytest.mark.parametrize(("kind", "operation"), CASES)
def test_caught(kind: str, operation: str, gate: Gate) -> None:
    """One `KeyboardInterrupt` here, none on the workers; the executor goes on."""
    with Program(GOES_ON, [kind, operation, *gate.address]) as program:
        arrival = gate.arrival()
        program.interrupt()
        begin = time.monotonic()
        arrival.release()
        while arrival.tag != "main" and operation not in ENDING:
            arrival = gate.arrival()
            arrival.release()
        assert time.monotonic() - begin <= BOUND * NOISE
        gate.close()  # whoever else is held, or comes later, goes on
        outcome = program.finish()
    assert outcome.stderr == ""
    assert outcome.stdout.endswith("end 1\n"), outcome.stdout
    outcome.assert_clean()


RANDOM = """
import random
kind, operation, rounds, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
random.seed(seed)
identity = helpers.identity
wake, trigger = os.pipe()

def shoot():
    while os.read(wake, 1):
        time.sleep(random.random() * 0.004)  # the random moment
        os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=shoot, daemon=True).start()
runner = Runner(kind, 2)
raw = runner.raw
# Of the big values so few that some moments come when all of them are there, too.
expected = list(range(4 if operation == "big" else 12))

def act():
    if operation == "submit":
        calls = [runner.submit(identity, number) for number in expected]
        return [runner.value(call) for call in calls]
    if operation == "one":
        return [runner.call(identity, number) for number in expected]
    if operation == "map":
        return list(raw.map(identity, expected))
    if operation == "imap_unordered":
        return sorted(raw.imap_unordered(identity, expected))
    if operation == "pmap":
        return raw.pmap(identity, expected)
    if operation == "big":
        return [value[0] for value in raw.map(identity, [[number, bytes(300_000)] for number in expected])]

def act_until_struck():
    # In a function of its own: Python 3.13 looks at signals outside of a `try` where a `while` jumps back.
    global wrong
    end = time.monotonic() + 5
    while time.monotonic() < end:
        wrong += act() != expected

assert act() == expected
caught = lost = wrong = 0
for round_ in range(rounds):
    try:
        os.write(trigger, b"x")
        act_until_struck()
        lost += 1
    except KeyboardInterrupt:
        caught += 1
    assert runner.call(identity, round_) == round_
calls = [runner.submit(identity, number) for number in range(1000)]
assert [runner.value(call) for call in calls] == list(range(1000))
assert len(runner.executor.workers) == 2
runner.close()
print("caught", caught, "lost", lost, "wrong", wrong)
"""


MOMENTS = ["one", "submit", "map", "imap_unordered", "pmap", "big"]


def random_moments(kind: str, operation: str, rounds: int) -> None:
    """Every interrupt is seen once; no frame is torn: all later results are right."""
    with Program(RANDOM, [kind, operation, rounds, 7]) as program:
        outcome = program.finish(120)
    assert outcome.stderr == ""
    assert outcome.stdout == f"caught {rounds} lost 0 wrong 0\n"
    outcome.assert_clean()


@pytest.mark.parametrize("operation", MOMENTS)
def test_some_random_moments(operation: str) -> None:
    random_moments("executor", operation, 60)


CLASSES = [(kind, operation) for kind in ("executor", "pool") for operation in MOMENTS]
CLASSES.remove(("pool", "one"))  # as "submit", with one call at a time
CLASSES.remove(("pool", "pmap"))  # it is its executor's


@pytest.mark.time_limit(150)
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "operation"), CLASSES)
def test_thousand_random_moments(kind: str, operation: str) -> None:
    """Ten of these: ten thousand in all."""
    random_moments(kind, operation, 1000)


SHIELDED = """
kind, host, port = sys.argv[1:4]
address = host, int(port)
runner = Runner(kind, 2)
calls = [runner.submit(helpers.hold, address, number) for number in range(2)]
try:
    helpers.hold(address, "main")
    while True:
        time.sleep(100)
except KeyboardInterrupt:
    pass
helpers.hold(address, "caught")
print([runner.value(call) for call in calls])
runner.close()
"""


def test_workers_do_not_see_the_interrupt(kind: str, gate: Gate) -> None:
    """Ctrl-C belongs to the program: what runs on the workers goes on to its end."""
    with Program(SHIELDED, [kind, *gate.address]) as program:
        arrivals = gate.arrivals(3)
        program.interrupt()
        next(arrival for arrival in arrivals if arrival.tag == "main")
        arrivals.append(gate.arrival(PATIENCE))
        for arrival in arrivals:
            if arrival.tag != "main":
                arrival.release()
        outcome = program.finish()
    outcome.assert_clean()
    assert outcome.stdout == "[0, 1]\n"


STRUCK = """
import random
kind, operation, strikes, seconds, seed = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
runner = Runner(kind, 2)
def identity(value):
    turns = 0
    # Some 50 us, and now and then 5 ms: a worker looks at its socket between two frames, which hold calls worth 4 ms,
    # and otherwise from its I/O thread, after 5 ms. Without longer calls no interrupt would ever find one running.
    while turns < (150_000 if type(value) is int and value % 40 == 1 else 1500):
        turns += 1
    return value

make = {"plain": lambda n: n, "objects": lambda n: [n, "x"], "big": lambda n: [n, bytes(300_000 if n % 40 == 0 else 9)]}
make = make[operation]
assert [runner.call(identity, make(n)) for n in range(20)] == [make(n) for n in range(20)]
deadline = time.monotonic() + 30
while len(runner.executor.workers) < 2 and time.monotonic() < deadline:
    runner.call(identity, 0)
pids = runner.executor.workers
assert len(pids) == 2
over = threading.Event()
struck = 0

def strike():
    global struck
    chance = random.Random(seed)
    end = time.monotonic() + seconds
    while (struck < strikes or not ended) and time.monotonic() < end:
        time.sleep(chance.random() * 0.0006)  # the random moment
        distpool.interrupt(*pids)
        struck += len(pids)
    over.set()

ended = wrong = 0
threading.Thread(target=strike).start()
while not over.is_set():
    # So many that workers are busy for some time: their I/O thread takes over after 5 ms.
    for number, call in [(number, runner.submit(identity, make(number))) for number in range(600)]:
        try:
            wrong += runner.value(call) != make(number)
        except KeyboardInterrupt:
            ended += 1
calls = [runner.submit(identity, make(number)) for number in range(500)]
errors = 0
for number, call in enumerate(calls):
    try:  # the last interrupts may still be on their way
        wrong += runner.value(call) != make(number)
    except KeyboardInterrupt:
        errors += 1
assert errors <= 4, errors
assert [runner.call(identity, make(n)) for n in range(200)] == [make(n) for n in range(200)]
assert runner.executor.workers == pids, "no worker died"
runner.close()
print("enough", struck >= min(strikes, 200), "some hit", ended > 0, "wrong", wrong)
"""


def struck(kind: str, operation: str, strikes: int, seconds: int) -> None:
    """Workers are interrupted at random moments: calls end well or with KeyboardInterrupt, nothing else changes."""
    with Program(STRUCK, [kind, operation, strikes, seconds, 11]) as program:
        outcome = program.finish(seconds + 60)
    assert outcome.stderr == ""
    assert outcome.stdout == "enough True some hit True wrong 0\n"
    outcome.assert_clean()


@pytest.mark.parametrize("operation", ["plain", "objects", "big"])
def test_workers_are_struck_at_random_moments(operation: str) -> None:
    struck("executor", operation, 600, 10)


@pytest.mark.time_limit(150)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "operation"), [("executor", "plain"), ("executor", "objects"), ("executor", "big"), ("pool", "objects")]
)
def test_workers_are_struck_ten_thousand_times(kind: str, operation: str) -> None:
    """What is struck is a worker, which does not know whose it is."""
    struck(kind, operation, 10_000, 60)
