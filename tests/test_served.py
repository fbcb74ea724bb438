"""What a process tells of the remote calls that it runs; asked from the other side: `test_monitor`, `test_tracing`."""

from __future__ import annotations

import collections
import importlib
import threading
import time
from typing import Any

import pytest

from distpool.node.served import RAISED, REMOTE, RETURNED, RUNNING, SHOWN, Lanes, Served, Times, name_of, text_name
from distpool.wire.records import TIMED


def test_calls_are_counted_by_how_they_ended() -> None:
    served = Served()
    assert served.report() == (0, 0, None, None)
    for ended in (RETURNED, RETURNED, RAISED):
        call = served.begin("f", True)
        served.loaded(call, abs, ())
        served.end(call, ended)
    assert (served.done, served.failed) == (2, 1)
    assert (served.done, served.failed) == (2, 1), "to look changes nothing"
    assert not served.running


def test_the_oldest_call_is_the_one_that_is_told() -> None:
    served = Served()
    begun, go = threading.Event(), threading.Event()

    def older() -> None:
        call = served.begin("older")
        begun.set()
        go.wait(20)
        served.end(call, RETURNED)

    thread = threading.Thread(target=older)
    thread.start()
    assert begun.wait(20)
    call = served.begin("younger", True)
    done, failed, name, since = served.report()
    assert (done, failed, name) == (0, 0, "older") and since is not None and 0 <= since < 20
    go.set()
    thread.join(20)
    assert served.report()[:3] == (1, 0, "younger"), "also while it is being loaded"
    served.end(call, RAISED)
    assert served.report() == (1, 1, None, None)


def test_many_threads_are_counted_without_a_lock() -> None:
    served = Served()

    def run() -> None:
        for number in range(2000):
            served.end(served.begin("f"), number % 2)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (served.done, served.failed) == (4000, 4000)


def user_code() -> None:
    pass


@pytest.mark.parametrize(
    ("name", "function", "args", "shown"),
    [
        ("math.sqrt", abs, (1,), "math.sqrt"),
        ("KeptFunction", abs, (), "abs"),
        ("distpool.loops._fold", None, (abs, max, [1]), "abs"),
        ("distpool.loops._each", None, (abs, [1]), "abs"),
        ("distpool.broadcast._call", None, (user_code, {}), "test_served.user_code"),
        ("distpool.broadcast._define", None, ("load", abs, {}, 1), "everywhere(load)"),
        ("distpool.mainmodule.run", None, ("x = 1", "<a.py (everywhere 12)>", "__main__", {}), "everywhere"),
    ],
)
def test_the_user_s_function_is_shown(name: str, function: Any, args: tuple[Any, ...], shown: str) -> None:
    served = Served()
    call = served.begin(name, True)
    served.loaded(call, function, args)
    told = served.report()[2]
    assert told is not None and told.removeprefix(f"{__package__}." if __package__ else "") == shown
    served.end(call, RETURNED)
    assert served.done == 1


def test_the_library_s_own_calls_are_not_shown() -> None:
    served = Served()
    for name in ("distpool.calls._listed", "distpool.batches.run_batch"):
        call = served.begin(name, True)
        served.loaded(call, None, ())
        assert served.report()[1:] == (0, None, None)
        inner = served.begin("an element")
        served.end(inner, RETURNED)
        served.end(call, RETURNED)
    assert (served.done, served.failed) == (2, 0)


@pytest.mark.parametrize("name", [name for name in SHOWN if name.startswith("distpool.")])
def test_what_is_shown_otherwise_exists(name: str) -> None:
    module, _, function = name.rpartition(".")
    assert callable(getattr(importlib.import_module(module), function))


class Strange:
    def __getattr__(self, name: str) -> Any:
        raise KeyError(name)


def test_names() -> None:
    assert name_of(abs) == "abs"
    assert name_of(Strange()) == "Strange"
    assert text_name("<everywhere 00ff>") == "everywhere"
    assert text_name("/home/me/functions.py") == "include(functions.py)"


# -- times -----------------------------------------------------------------------------------------------------------


class Traced:
    """A process with a trace."""

    def __init__(self) -> None:
        self.served = Served()
        self.looks = 0
        self.records: collections.deque[bytes] = collections.deque()
        self.times = self.served.times = Times(self.served, self.records, Lanes(), self._look)

    def _look(self) -> None:
        self.looks += 1

    def told(self) -> list[tuple[int, int, int]]:
        """(name, lane, how it ended), with sound times."""
        found = []
        for number, element, lane, begin, duration, ended in map(TIMED.unpack, self.records):
            assert element == 0 and ended & REMOTE
            assert self.times.began <= begin <= begin + duration <= time.perf_counter_ns()
            found.append((number, lane, ended & ~REMOTE))
        return found


def test_each_call_leaves_its_time() -> None:
    traced = Traced()
    for name, ended in (("f", RETURNED), ("g", RAISED), ("f", RETURNED)):
        call = traced.served.begin(name, True)
        traced.served.loaded(call, abs, ())
        traced.served.end(call, ended)
    assert traced.told() == [(0, 0, RETURNED), (1, 0, RAISED), (0, 0, RETURNED)]
    assert traced.looks == 3
    assert traced.times.new_names() == [[0, "f"], [1, "g"]] and traced.times.new_names() == []


def test_what_has_begun_before_is_not_in_it() -> None:
    served = Served()
    call = served.begin("f")
    records: collections.deque[bytes] = collections.deque()
    served.times = Times(served, records, Lanes())
    served.times.announce(again=True)
    served.end(call, RETURNED)
    assert not records and served.done == 1


def test_what_runs_is_told_once_and_at_the_end() -> None:
    traced = Traced()
    call = traced.served.begin("f", True)
    traced.times.announce()
    assert traced.told() == [], "it is being loaded: it will begin later"
    traced.served.loaded(call, abs, ())
    traced.times.announce()
    traced.times.announce()
    assert traced.told() == [(0, 0, RUNNING)]
    traced.times.announce(again=True)
    traced.served.end(call, RETURNED)
    begins = {TIMED.unpack(record)[3] for record in traced.records}
    assert [ended for _, _, ended in traced.told()] == [RUNNING, RUNNING, RETURNED]
    assert len(begins) == 1, "by which the end finds what was told"


def test_long_names_are_cut() -> None:
    traced = Traced()
    traced.served.end(traced.served.begin("x" * 10_000), RETURNED)
    ((_, name),) = traced.times.new_names()
    assert len(name) == 200


def test_each_thread_has_its_lane() -> None:
    lanes = Lanes()
    main = threading.main_thread().ident or 0
    assert [lanes(main), lanes(7), lanes(8), lanes(7)] == [0, 1, 2, 1]
