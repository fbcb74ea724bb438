"""`memory_limit`, `affinity` and `gpus`: each worker of a host gets its share, and a replacement the dead one's."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from conformance.clusters import ByCommand
from faults.helpers import Gate, hold

import distpool
from distpool import ClusterExecutor, CompositeException, LaunchWorkerError, ProcessExitedException, remotecall_fetch
from distpool.managers.resources import Wishes, cores_of, gpu_of, memory_bytes, wishes

PATIENCE = 30.0
needs_affinity = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs sched_setaffinity")
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


@pytest.fixture
def add() -> Iterator[Callable[..., list[int]]]:
    yield distpool.addprocs
    distpool.rmprocs(distpool.procs()[1:])


def cores() -> list[int]:
    return sorted(os.sched_getaffinity(0))


def gpus() -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES")


# -- what may be asked for -----------------------------------------------------------------------------------------


def test_wishes() -> None:
    assert not wishes({}) and not wishes({"affinity": None, "gpus": None, "memory_limit": None})
    assert wishes({"affinity": 2}) == Wishes(affinity=2)
    assert wishes({"affinity": [range(2), (2, 3)]}) == Wishes(affinity=[[0, 1], [2, 3]])
    assert wishes({"affinity": "auto", "gpus": 0}) == Wishes(affinity="auto", gpus=0)
    assert wishes({"gpus": [0, "GPU-5e8f", (2, 3)]}) == Wishes(gpus=["0", "GPU-5e8f", "2,3"])
    assert wishes({"gpus": "0,1"}) == Wishes(gpus=["0", "1"])
    assert wishes({"memory_limit": "300 MiB"}).memory == 300 << 20
    assert memory_bytes("1.5GB") == 1_500_000_000
    assert memory_bytes("2gib") == memory_bytes(" 2 GIB ") == 2 << 30 and memory_bytes("1.kb") == memory_bytes("1K")
    assert memory_bytes(".5 mb") == 500_000 and memory_bytes("5B") == 5


def test_wishes_in_numbers_of_numpy() -> None:
    """As pids and counts they were accepted, as these not."""
    wanted = wishes({"memory_limit": np.int64(9), "affinity": np.int32(2), "gpus": np.uint8(3)})
    assert wanted == Wishes(9, 2, 3) and {type(each) for each in wanted} == {int}
    found = wishes({"affinity": np.array([[0, 1], [2, 3]]), "gpus": np.array([5, 6])})
    assert found == Wishes(affinity=[[0, 1], [2, 3]], gpus=["5", "6"])
    assert isinstance(found.affinity, list) and {type(core) for cores in found.affinity for core in cores} == {int}
    assert wishes({"gpus": [[np.int64(1), 2], np.int8(3)]}).gpus == ["1,2", "3"]


@pytest.mark.parametrize(
    "value", [0, -1, True, "all", "3", [], [0, 1], [[]], [[0], [-1]], [["a"]], 1.5, [[True]], b"x"]
)
def test_bad_affinity(value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="affinity"):
        distpool.addprocs(1, affinity=value)
    with pytest.raises((ValueError, TypeError), match="affinity"):
        ClusterExecutor(1, affinity=value)


@pytest.mark.parametrize("value", [-1, True, 1.5, ["a b"], [[]], [None], [True], "0,,1", "", b"01"])
def test_bad_gpus(value: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        distpool.addprocs(1, gpus=value)


@pytest.mark.parametrize("text", ["1.2.3", ".", "", "GiB", "1e9", "5i", "-1", "9" * 400, "\N{ARABIC-INDIC DIGIT TWO}"])
def test_bad_memory_in_words(text: str) -> None:
    with pytest.raises(ValueError, match="^memory_limit must be bytes or text such as '2GiB', not "):
        memory_bytes(text)


@pytest.mark.parametrize("value", [0, -1, "much", 1.5, True, "0", np.True_, np.float64(3)])
def test_bad_memory(value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="memory_limit"):
        distpool.addprocs(1, memory_limit=value)


def test_cores_are_given_out_in_turn() -> None:
    usable = [0, 1, 4, 5, 6]
    assert [cores_of(number, None, 2, usable) for number in range(3)] == [[0, 1], [4, 5], [0, 1]]
    assert [cores_of(number, None, [[0], [4, 6]], usable) for number in range(3)] == [[0], [4, 6], [0]]
    assert [cores_of(number, 2, "auto", usable) for number in range(3)] == [[0, 1], [4, 5, 6], [0, 1]]
    assert [cores_of(number, 7, "auto", usable) for number in range(6)] == [[0], [1], [4], [5], [6], [0]]
    assert cores_of(0, "auto", "auto", usable) == [0] and cores_of(0, None, "auto", usable) == [0]
    assert sorted(sum((cores_of(number, 3, "auto", usable) for number in range(3)), [])) == usable
    for asked in (6, [[0, 2]]):
        with pytest.raises(ValueError, match="this process may use"):
            cores_of(0, None, asked, usable)


def test_gpus_are_given_out_in_turn() -> None:
    assert [gpu_of(number, 2, None) for number in range(3)] == ["0", "1", "0"]
    assert [gpu_of(number, 2, "5,GPU-7") for number in range(3)] == ["5", "GPU-7", "5"], "a batch job gave us these"
    assert [gpu_of(number, ["0,1", "2"], "7") for number in range(2)] == ["0,1", "2"]
    assert gpu_of(3, 0, "1") == gpu_of(3, [], None) == ""
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=5 shows 1"):
        gpu_of(0, 2, "5")


# -- workers -------------------------------------------------------------------------------------------------------


@needs_affinity
def test_each_worker_has_cores_of_its_own(add: Callable[..., list[int]]) -> None:
    count = len(CORES)
    pids = add(count, affinity=1)
    assert [remotecall_fetch(cores, pid) for pid in pids] == [[core] for core in CORES]
    threads = remotecall_fetch(threads_cores, pids[0])
    assert set(threads) == {(CORES[0],)}, "whatever thread a call runs on"
    distpool.rmprocs(pids)
    assert remotecall_fetch(cores, *add(1, affinity="auto")) == CORES
    assert remotecall_fetch(cores, *add(1, affinity=[CORES[-1:], CORES[-1:]])) == CORES[-1:]
    assert remotecall_fetch(cores, *add(1)) == CORES, "nobody asked"


def threads_cores() -> list[tuple[int, ...]]:
    return [tuple(sorted(os.sched_getaffinity(int(name)))) for name in os.listdir("/proc/self/task")]


def test_each_worker_sees_one_gpu(add: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [remotecall_fetch(gpus, pid) for pid in add(3, gpus=2)] == ["0", "1", "0"]
    more = add(1, gpus=["a", "b", "c", "d"])
    assert remotecall_fetch(gpus, *more) == "d", "the fourth worker of this host"
    assert remotecall_fetch(gpus, *add(1)) is None
    assert remotecall_fetch(gpus, *add(1, gpus=0)) == ""


def test_a_replacement_gets_what_the_dead_one_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def show(address: Any) -> tuple[int, str | None, list[int]]:
        hold(address)
        return os.getpid(), gpus(), cores() if CORES else []

    def everybody() -> dict[int, Any]:
        gate = Gate()
        futures = [executor.submit(show, gate.address) for _ in range(2)]
        gate.arrivals(2)
        gate.close()
        return {ospid: rest for ospid, *rest in (future.result(PATIENCE) for future in futures)}

    with ClusterExecutor(2, gpus=2, **({"affinity": 1} if CORES else {})) as executor:
        seen = everybody()
        assert sorted(gpu for gpu, _ in seen.values()) == ["0", "1"]
        for ospid, had in list(seen.items()):
            gate = Gate()
            future = executor.submit(hold, gate.address)
            other = executor.submit(hold, gate.address)
            arrivals = {arrival.ospid: arrival for arrival in gate.arrivals(2)}
            os.kill(ospid, signal.SIGKILL)
            arrivals[ospid].wait_gone(PATIENCE)
            gate.close()
            assert {type(each.exception(PATIENCE)) for each in (future, other)} == {ProcessExitedException, type(None)}
            now = everybody()
            (new,) = now.keys() - seen.keys()
            assert now[new] == had
            seen = now


@needs_affinity
def test_cores_that_are_not_there(add: Callable[..., list[int]]) -> None:
    with pytest.raises(CompositeException) as caught:
        add(2, affinity=[[4095]])
    assert len(caught.value.exceptions) == 2
    assert "affinity=[4095]: this process may use the cores" in str(caught.value.exceptions[0])
    with ClusterExecutor(1, affinity=4096) as executor:
        error = executor.submit(abs, 1).exception(PATIENCE)
        assert isinstance(error, LaunchWorkerError | CompositeException) and "affinity=4096" in str(error)


def test_workers_of_any_manager(add: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    options = {"affinity": 1} if CORES else {}
    pids = add(ByCommand(2), gpus=["x", "y"], memory_limit="400MiB", **options)
    assert sorted(remotecall_fetch(os.getenv, pid, "CUDA_VISIBLE_DEVICES") for pid in pids) == ["x", "y"]
    with pytest.raises(distpool.RemoteException) as caught:
        remotecall_fetch(lambda: bytearray(1 << 30) and None, pids[0])
    assert isinstance(caught.value.captured.ex, MemoryError)
    if CORES:
        assert remotecall_fetch(lambda: len(__import__("os").sched_getaffinity(0)), pids[0]) == 1
