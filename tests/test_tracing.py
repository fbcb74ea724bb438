"""trace(): every call once, with the times that it had, however it ended."""

from __future__ import annotations

import importlib
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from faults.helpers import Gate, hold, hold_in_c, show

import distpool
from distpool.node import node as nodes

SVG = "{http://www.w3.org/2000/svg}"


def nap(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def timed_nap(seconds: float) -> tuple[int, int]:
    """When it ran, by the wall clock."""
    begin = time.time_ns()
    time.sleep(seconds)
    return begin, time.time_ns()


def fail() -> None:
    raise KeyError("x")


def lock() -> Any:
    """Something that cannot be sent."""
    return threading.Lock()


def calls(path: Path) -> list[dict[str, Any]]:
    """The events of a trace, checked against the format."""
    document = json.loads(path.read_text())
    found = []
    named = set()
    for event in document["traceEvents"]:
        if event["ph"] == "M":
            if event["name"] == "process_name":
                named.add(event["pid"])
            continue
        assert event["ph"] == "X"
        assert event["ts"] >= 0 and event["dur"] >= 0
        assert set(event["args"]) == {"function", "label", "status"}
        found.append(event)
    assert {event["pid"] for event in found} <= named
    return found


def ready(ex: distpool.ClusterExecutor, count: int) -> None:
    deadline = time.monotonic() + 20
    while len(ex.workers) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


# -- what is in it -------------------------------------------------------------------------------------------------


def test_submitted_calls_with_their_times(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with distpool.ClusterExecutor(2) as ex:
        ready(ex, 2)
        with distpool.trace(path):
            for _ in range(3):
                ex.submit(nap, 0.1).result()
            pids = ex.workers
    found = calls(path)
    assert len(found) == 3
    for event in found:
        assert event["name"] == event["args"]["function"]
        assert event["name"].endswith("nap")
        assert event["args"]["label"] is None
        assert event["args"]["status"] == "ok"
        assert event["pid"] in pids
        assert 100_000 <= event["dur"] < 1_000_000
    ends = sorted((event["ts"], event["ts"] + event["dur"]) for event in found)
    pairs = zip(ends, ends[1:], strict=False)
    assert all(one[1] <= two[0] for one, two in pairs), "one after the other, on a common clock"


def test_the_clock_is_this_process_s(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with distpool.ClusterExecutor(2) as ex:
        with distpool.trace(path):
            tracer = nodes.current().tracer
            before = (time.perf_counter_ns() - tracer.began) / 1000
            spans = list(ex.map(timed_nap, [0.02] * 6, chunksize=2))
            after = (time.perf_counter_ns() - tracer.began) / 1000
            zero = tracer.began + tracer.clock  # wall clock, nanoseconds
    found = sorted(calls(path), key=lambda event: event["ts"])
    assert len(found) == 6
    assert all(before <= event["ts"] and event["ts"] + event["dur"] <= after for event in found)
    for event, (begin, end) in zip(found, sorted(spans), strict=True):
        assert event["ts"] == pytest.approx((begin - zero) / 1000, abs=5000)
        assert event["ts"] + event["dur"] == pytest.approx((end - zero) / 1000, abs=5000)


def test_all_elements_of_maps(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with distpool.trace(path), distpool.ClusterExecutor(2) as ex:
        assert sum(ex.map(abs, range(5000))) == sum(range(5000))
        assert list(ex.map(pow, range(100), range(100), chunksize=7)) == [n**n for n in range(100)]
        assert sorted(ex.imap_unordered(len, ["a" * n for n in range(300)])) == list(range(300))
    counts = Counter(event["name"].rpartition(".")[2] for event in calls(path))
    assert counts == {"abs": 5000, "pow": 100, "len": 300}


def test_how_calls_ended(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with distpool.trace(path), distpool.ClusterExecutor(1) as ex:
        ex.options(label="good").submit(nap, 0).result()
        assert ex.options(label="bad").submit(fail).exception()
        assert ex.options(label="unsendable").submit(lock).exception()
        assert list(ex.map(abs, [-1])) == [1]
        with pytest.raises(TypeError):
            list(ex.map(abs, [1, "x", 3]))
        ex.submit(nap, 0.1).result()  # a worker that dies takes the times of its last milliseconds along
        assert isinstance(ex.options(label="deadly").submit(os._exit, 3).exception(), distpool.ProcessExitedException)
        assert ex.options(label="after").submit(nap, 0.01).result()
    found = {event["name"]: event for event in calls(path)}
    statuses = {name: event["args"]["status"] for name, event in found.items() if event["args"]["label"]}
    assert statuses == {"good": "ok", "bad": "error", "unsendable": "unsendable", "deadly": "died", "after": "ok"}
    assert found["good"]["args"]["function"].endswith("nap")
    assert found["deadly"]["pid"] != found["after"]["pid"]
    assert Counter(e["args"]["status"] for e in calls(path) if e["name"].endswith("abs"))["error"] == 1


def test_a_call_that_is_killed_by_its_time_limit(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with distpool.ClusterExecutor(1) as ex:
        ready(ex, 1)
        with distpool.trace(path):
            assert ex.submit(nap, 0.05).result()
            with pytest.raises(TimeoutError):
                ex.options(timeout=0.4).submit(nap, 30).result()
    done, died = sorted(calls(path), key=lambda event: event["ts"])
    assert (done["args"]["status"], died["args"]["status"]) == ("ok", "died")
    assert done["dur"] >= 50_000, "what was finished before is not lost"
    assert 300_000 < died["dur"] < 2_000_000
    assert died["ts"] >= done["ts"] + done["dur"]


def test_what_still_runs_when_the_trace_ends(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with distpool.ClusterExecutor(1) as ex:
        ex.submit(nap, 0).result()  # this module is imported there
        with distpool.trace(path):
            future = ex.submit(nap, 1.0)
            time.sleep(0.4)
        assert future.result() == 1.0, "the call itself is not disturbed"
    (event,) = calls(path)
    assert event["args"]["status"] == "running"
    assert 200_000 < event["dur"] < 900_000


def test_a_worker_that_cannot_answer_holds_the_end_up_but_not_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("distpool.tracing"), "_PATIENCE", 0.5)
    path = tmp_path / "trace.json"
    gate = Gate()
    with distpool.ClusterExecutor(1) as ex:
        with distpool.trace(path):
            future = ex.submit(hold_in_c, gate.address)
            gate.arrival()
            begin = time.monotonic()
        assert time.monotonic() - begin < 10, "it is not waited for until it can answer"
        gate.close()
        future.result()
    (event,) = calls(path)
    assert event["args"]["status"] == "running" and event["name"].endswith("hold_in_c")


def test_only_what_was_sent_in_it(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with distpool.ClusterExecutor(2) as ex:
        list(ex.map(abs, range(100)))
        with distpool.trace(path):
            ex.submit(nap, 0).result()
        list(ex.map(abs, range(100)))
    assert len(calls(path)) == 1


def test_a_worker_that_does_not_answer_has_not_run_what_it_ran_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last call, which had ended before the trace began, stood there as one that runs, without a name."""
    monkeypatch.setattr(importlib.import_module("distpool.tracing"), "_PATIENCE", 0.5)
    path = tmp_path / "trace.json"
    with distpool.ClusterExecutor(2) as ex:
        ready(ex, 2)
        list(ex.map(abs, range(100)))
        (idle, _), (_, ran) = [(pid, ex.options(pids=[pid]).submit(os.getpid).result()) for pid in ex.workers]
        ospid = ex.options(pids=[idle]).submit(os.getpid).result()
        try:
            with distpool.trace(path):
                busy = [pid for pid in ex.workers if pid != idle]
                assert ex.options(pids=busy).submit(os.getpid).result() == ran
                os.kill(ospid, signal.SIGSTOP)
        finally:
            os.kill(ospid, signal.SIGCONT)
    assert [event["args"]["function"] for event in calls(path)] == ["posix.getpid"]


def test_calls_sent_ahead_before_it_began_have_names(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with distpool.ClusterExecutor(1) as ex:
        slow = lambda: time.sleep(0.4)  # new to the scheduler, which therefore sends two at once
        first, second = ex.submit(slow), ex.submit(slow)
        ready(ex, 1)
        time.sleep(0.2)
        with distpool.trace(path):
            first.result()
            second.result()
    assert all(event["args"]["function"] != "?" for event in calls(path))


def test_one_after_the_other(tmp_path: Path) -> None:
    with distpool.ClusterExecutor(2) as ex:
        watchers = list(nodes.current().group.gone_watchers)  # of this process, whatever it has done before
        for number in range(3):
            path = tmp_path / f"{number}.json"
            with distpool.trace(path) as name:
                assert name == str(path)
                list(ex.map(abs, range(10 * (number + 1))))
            assert len(calls(path)) == 10 * (number + 1)
    node = nodes.current()
    assert node.tracer is None
    assert len(node.group.gone_watchers) <= len(watchers) + 1  # one for all traces


def test_no_worker_no_call(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with distpool.trace(path):
        pass
    assert calls(path) == []


def test_a_loop_that_answers_too_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trace is refused, and what it began late is taken back: the next one is not told that it is nested."""
    monkeypatch.setattr(importlib.import_module("distpool.tracing"), "_PATIENCE", 0.05)
    loop = nodes.current().loop
    held, go = threading.Event(), threading.Event()
    loop.call_soon(lambda: (held.set(), go.wait(30)))
    assert held.wait(30)
    with pytest.raises(RuntimeError, match="did not answer"), distpool.trace(tmp_path / "late.json"):
        pass
    go.set()
    passed = threading.Event()
    loop.call_soon(passed.set)
    with loop.following():
        assert passed.wait(30)
    assert nodes.current().tracer is None
    monkeypatch.undo()
    with distpool.trace(tmp_path / "next.json"):
        pass


def test_an_error_in_the_block_keeps_the_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with distpool.ClusterExecutor(1) as ex:
        with pytest.raises(ZeroDivisionError):
            with distpool.trace(path):
                ex.submit(nap, 0).result()
                raise ZeroDivisionError
    assert len(calls(path)) == 1


def test_nothing_is_left_on_the_workers(tmp_path: Path) -> None:
    with distpool.ClusterExecutor(1) as ex:
        with distpool.trace(tmp_path / "trace.json"):
            ex.submit(abs, 1).result()
        assert ex.submit(is_plain).result()


def is_plain() -> bool:
    runner = nodes.current().runner
    return runner.find_function == runner.function_of


def nested() -> str:
    try:
        with distpool.trace("never-written.json"):
            return ""
    except RuntimeError as error:
        return str(error)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        distpool.trace(7)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        distpool.trace(tmp_path / "no" / "such").__enter__()
    with distpool.trace(tmp_path / "a.json"):
        with pytest.raises(RuntimeError, match="nested"):
            distpool.trace(tmp_path / "b.json").__enter__()
        assert not (tmp_path / "b.json").exists()
    with distpool.ClusterExecutor(1, dir=tmp_path) as ex:
        assert "process 1" in ex.submit(nested).result()
    assert not (tmp_path / "never-written.json").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    manager = distpool.trace(path)
    with distpool.ClusterExecutor(1) as ex:
        manager.__enter__()
        ex.submit(abs, 1).result()
        child = os.fork()
        if not child:
            try:
                manager.__exit__(None, None, None)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert path.read_text() == ""
        manager.__exit__(None, None, None)
    assert len(calls(path)) == 1


# -- remote calls ------------------------------------------------------------------------------------------------


@pytest.fixture
def pids() -> Iterator[list[int]]:
    found = distpool.addprocs(2)
    yield found
    distpool.rmprocs(found).result(30)


def seen(path: Path) -> Counter[tuple[int, str, str]]:
    """(pid, function, how it ended) of all calls."""
    return Counter((event["pid"], event["name"].rpartition(".")[2], event["args"]["status"]) for event in calls(path))


def nap_there(pid: int, seconds: float) -> float:
    return distpool.remotecall_fetch(nap, pid, seconds)


def nap_here(seconds: float) -> float:
    value: float = distpool.remotecall(nap, distpool.myid(), seconds).result()
    return value


def test_remote_calls_of_all_kinds(tmp_path: Path, pids: list[int]) -> None:
    path = tmp_path / "trace.json"
    one, two = pids
    with distpool.trace(path):
        distpool.remotecall_fetch(nap, one, 0.05)
        distpool.remotecall_wait(nap, two, 0.05)
        distpool.fetch(distpool.spawnat(two, nap, 0.05))
        distpool.fetchfrom(one, nap_there, two, 0.05)
        distpool.fetchfrom(one, nap_here, 0.05)
        assert distpool.remotecall(nap, 1, 0.05).result() == 0.05
        with pytest.raises(distpool.RemoteException):
            distpool.remotecall_fetch(fail, two)
    assert seen(path) == {
        (one, "nap", "ok"): 2,
        (two, "nap", "ok"): 3,
        (one, "nap_there", "ok"): 1,
        (one, "nap_here", "ok"): 1,
        (1, "nap", "ok"): 1,
        (two, "fail", "error"): 1,
    }
    found = calls(path)
    assert all(event["args"]["label"] is None and event["name"] == event["args"]["function"] for event in found)
    naps = [event for event in found if event["name"].endswith("nap")]
    assert all(50_000 <= event["dur"] < 5_000_000 for event in naps)
    (there,) = (event for event in found if event["name"].endswith("nap_there"))
    inside = [
        event
        for event in naps
        if event["pid"] == two
        and there["ts"] <= event["ts"] + 1000
        and event["dur"] + event["ts"] <= there["ts"] + there["dur"] + 1000
    ]
    assert len(inside) == 1, "on a common clock"


def test_maps_loops_and_texts_on_workers(tmp_path: Path, pids: list[int]) -> None:
    path = tmp_path / "trace.json"
    with distpool.trace(path):
        distpool.pmap(nap, [0.01] * 6)
        distpool.pmap(abs, range(8), batch_size=4)
        distpool.distributed(len, ["a", "b"], max)
        distpool.everywhere("x = 1", pids)
        distpool.remotecall_fetch(max, distpool.WorkerPool(pids), 1, 2)
    found: Counter[str] = Counter()
    for (pid, name, status), count in seen(path).items():
        assert pid in pids and status == "ok"
        found[name] += count
    assert found == {"nap": 6, "abs": 8, "len": 2, "everywhere": 2, "max": 1}


def test_both_kinds_of_calls(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with distpool.trace(path), distpool.ClusterExecutor(1) as ex:
        for _ in range(20):
            ex.submit(abs, -1).result()
            distpool.remotecall_fetch(len, ex.workers[0], "a")
        pid = ex.workers[0]
    assert seen(path) == {(pid, "abs", "ok"): 20, (pid, "len", "ok"): 20}


def test_only_remote_calls_that_begin_in_it(tmp_path: Path, pids: list[int]) -> None:
    path = tmp_path / "trace.json"
    gate = Gate()
    before = distpool.remotecall(hold, pids[0], gate.address)
    first = gate.arrival()
    with distpool.trace(path):
        inside = distpool.remotecall(show, pids[1], gate.address)
        gate.arrival()
        inside.result()
        first.release()
        before.result()
        runs = distpool.remotecall(hold, pids[0], gate.address)
        last = gate.arrival()
    last.release()
    runs.result()
    distpool.remotecall_fetch(abs, pids[0], -1)
    gate.close()
    assert seen(path) == {(pids[1], "show", "ok"): 1, (pids[0], "hold", "running"): 1}
    with distpool.trace(path):
        pass
    assert not seen(path), "nothing is left of the trace before"


def test_a_remote_call_that_dies_with_its_worker(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    one, two = distpool.addprocs(2)
    with distpool.trace(path):
        distpool.remotecall_fetch(nap, one, 0.05)
        with pytest.raises(distpool.ProcessExitedException):
            distpool.remotecall_fetch(nap_and_exit, one, 0.3)
        distpool.remotecall_fetch(nap, two, 0.01)
    distpool.rmprocs(two).result(30)
    assert seen(path) == {(one, "nap", "ok"): 1, (one, "nap_and_exit", "died"): 1, (two, "nap", "ok"): 1}
    (died,) = (event for event in calls(path) if event["args"]["status"] == "died")
    assert 250_000 < died["dur"] < 10_000_000


def nap_and_exit(seconds: float) -> None:
    time.sleep(seconds)
    os._exit(3)


def test_no_remote_call_pays_after_the_trace(tmp_path: Path, pids: list[int]) -> None:
    with distpool.trace(tmp_path / "trace.json"):
        distpool.remotecall_fetch(abs, pids[0], -1)
    assert distpool.remotecall_fetch(is_untimed, pids[0]) and is_untimed()


def is_untimed() -> bool:
    served = nodes.current().served
    return served.times is None and not any(call.told for call in served.running.values())


def test_a_real_trace_is_drawn(tmp_path: Path) -> None:
    with distpool.trace(tmp_path / "in.json"), distpool.ClusterExecutor(2) as ex:
        list(ex.map(nap, [0.02] * 10))
        ex.submit(fail).exception()
    distpool.plot_trace(tmp_path / "in.json", tmp_path / "out.svg")
    root = ElementTree.parse(tmp_path / "out.svg").getroot()
    tips = [str(rect[0].text) for rect in root.iter(f"{SVG}rect") if len(rect)]  # two of them may read the same
    assert sum("nap" in tip for tip in tips) == 10
    assert sum("raised" in tip for tip in tips) == 1
    assert sum(str(text.text).startswith("worker ") for text in root.iter(f"{SVG}text")) == 2
