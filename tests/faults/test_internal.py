"""Row F18: an error inside the library's own threads ends every pending call with that error.

The error is thrown into the library's threads from outside (`PyThreadState_SetAsyncExc`), so that the test knows
nothing about their code: only that their names begin with "distpool".
"""

from __future__ import annotations

import pytest

from .helpers import NOISE, Gate
from .programs import Program

SOURCE = """
import ctypes
kind, where, host, port = sys.argv[1:]
address = host, int(port)

class InjectedFault(Exception):
    pass

runner = Runner(kind, 2)
assert runner.call(helpers.square, 3) == 9
running = [runner.submit(helpers.hold, address, number) for number in range(2)]
queued = [runner.submit(helpers.square, number) for number in range(50)]
helpers.hold(address, "main")
if where == "thread":
    names = [thread.name for thread in threading.enumerate()]
    victims = [thread for thread in threading.enumerate() if thread.name.startswith("distpool") and "io" in thread.name]
    assert victims, names
    for victim in victims:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(victim.ident), ctypes.py_object(InjectedFault))
else:
    from distpool.scheduling import Scheduler

    def on_frame(self, slot, frame):
        raise InjectedFault("in the handler of a frame")

    Scheduler.on_frame = on_frame
begin = time.monotonic()
late = None
try:
    late = runner.submit(helpers.square, 1)  # wakes the thread, which meets its fault
except Exception as error:
    print("submit", type(error).__name__)
helpers.show(address, "faulty")
import traceback
faults = 0
for call in running + queued:
    error = runner.error(call, 20)
    faults += "InjectedFault" in "".join(traceback.format_exception(error))
print("faults", faults)
print("seconds", time.monotonic() - begin)
if late is not None:
    try:
        print("late", runner.value(late, 20))
    except BaseException as error:
        print("late", type(error).__name__)
try:
    print("later", runner.call(helpers.square, 2))
except Exception as error:
    print("later", type(error).__name__)
"""


@pytest.mark.parametrize("where", ["thread", "handler"])
def test_fault_of_the_library(kind: str, gate: Gate, where: str) -> None:
    """In the loop itself (thrown into its thread), and in what it calls when a frame has come."""
    with Program(SOURCE, [kind, where, *gate.address]) as program:
        arrivals = gate.arrivals(3)
        next(arrival for arrival in arrivals if arrival.tag == "main").release()
        gate.arrival()
        for arrival in arrivals[: None if where == "handler" else 0]:
            if arrival.tag != "main":
                arrival.release()  # so that a frame comes
        outcome = program.finish(20)
    facts = dict(line.split(" ", 1) for line in outcome.stdout.splitlines())
    assert outcome.returncode == 0, outcome.stderr
    assert facts["faults"] == "52", outcome.stdout
    assert float(facts["seconds"]) <= 1 * NOISE
    assert facts["later"] in ("4", "DistpoolError", "BrokenProcessPool", "RuntimeError")
    outcome.assert_nothing_left()
