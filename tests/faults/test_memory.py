"""Row F9: a task that wants more memory than it may have."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import distpool

from . import helpers
from .helpers import NOISE, Gate, at_most
from .runners import Runner, assert_squares, full_text

MIB = 1 << 20


def allocate_under_a_limit(limit: int, wanted: int) -> int:
    """Allocates `wanted` bytes while this process may only grow by `limit`."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + limit, before[1]))
    try:
        return len(bytearray(wanted))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(not psutil.LINUX, reason="RLIMIT_AS is only a limit on Linux")
def test_memory_error_of_a_task(make_runner: Callable[..., Runner]) -> None:
    """Refused by the kernel at the allocation: an exception as any other, and the worker lives."""
    runner = make_runner(1)
    before = runner.ospids()
    calls = [runner.submit(helpers.square, number) for number in range(3)]
    bad = runner.submit(allocate_under_a_limit, 300 * MIB, 1024 * MIB)
    with at_most(3, "the error"):
        error = bad.error()
    assert type(error) is MemoryError
    assert "in allocate_under_a_limit" in full_text(error)
    assert runner.submit(allocate_under_a_limit, 300 * MIB, MIB).value() == MIB
    assert_squares(calls)
    assert runner.ospids() == before


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """The `cgroup.procs` of a control group that may have 100 MiB."""
    for parent, limit in (("memory", "memory.limit_in_bytes"), (".", "memory.max")):
        group = Path("/sys/fs/cgroup") / parent / f"distpool-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limit).write_text(str(100 * MIB))
            yield group / "cgroup.procs"
            return
        except OSError:
            continue
        finally:
            end = time.monotonic() + 10
            while group.exists():  # busy until the last of its processes has been reaped
                try:
                    group.rmdir()
                except OSError:
                    assert time.monotonic() < end
                    threading.Event().wait(0.01)
    pytest.skip("no control group for memory can be made here")


def fill_memory(procs: Path) -> int:
    procs.write_text(str(os.getpid()))
    return len(b"x" * (1024 * MIB))


def test_killed_by_the_kernel(make_runner: Callable[..., Runner], gate: Gate, small_cgroup: Path) -> None:
    """Its memory is more than there is: the error says so, and the others are unaffected."""
    runner = make_runner(2)
    runner.bring_up()
    calls = [runner.submit(helpers.square, number) for number in range(4)]
    bad = runner.submit(fill_memory, small_cgroup)
    calls += [runner.submit(helpers.square, number) for number in range(4, 8)]
    with at_most(3, "the kernel"):
        error = bad.error()
    assert isinstance(error, distpool.ProcessExitedException)
    assert error.exitcode == -signal.SIGKILL and "out of memory" in str(error)
    assert_squares(calls)
    other = runner.submit(helpers.die, "SIGKILL").error()
    assert "memory" not in str(other), "the next death has its own cause"


def test_memory_limit(make_runner: Callable[..., Runner], gate: Gate) -> None:
    """`memory_limit=`: the error says who killed it and at what size; others are unaffected."""
    runner = make_runner(2, memory_limit="300MiB")
    calls = [runner.submit(helpers.square, number) for number in range(8)]
    bad = runner.submit(lambda: len(bytearray(1024 * MIB)))
    begin = time.monotonic()
    value, error = bad.outcome()
    took = time.monotonic() - begin
    assert error is not None, f"memory_limit was not enforced: got {value} bytes"
    assert took <= 3 * NOISE
    assert "MiB" in str(error) or isinstance(error, MemoryError)
    assert_squares(calls)


def fill_up(size: int) -> None:
    held = []
    while True:
        held.append(bytes(size))


@pytest.mark.skipif(not psutil.LINUX, reason="RLIMIT_DATA is only a limit on Linux")
@pytest.mark.parametrize("limit", [120, 137, 150, 166])
def test_memory_used_up_bit_by_bit_in_a_map(limit: int) -> None:
    """Several elements travel together; what runs them reports each by itself."""
    with distpool.ClusterExecutor(1, memory_limit=f"{limit}MiB") as executor:
        before = executor.submit(os.getpid).result(20)
        for size in (1, 17, 5000):
            with pytest.raises(MemoryError, match="memory_limit"):
                list(executor.map(fill_up, [size] * 3, chunksize=3, timeout=60))
        assert executor.submit(os.getpid).result(20) == before


@pytest.mark.skipif(not psutil.LINUX, reason="RLIMIT_DATA is only a limit on Linux")
@pytest.mark.parametrize("size", [1, 1000, 5000])
def test_memory_used_up_bit_by_bit(make_runner: Callable[..., Runner], size: int) -> None:
    """What has filled it is still there when the error is caught: none was left to say so, and the worker ended."""
    runner = make_runner(1, memory_limit="150MiB")
    before = runner.ospids()
    for _ in range(2):
        error = runner.submit(fill_up, size).error()
        assert isinstance(error, MemoryError) and "in fill_up" in full_text(error)
    assert runner.ospids() == before


@pytest.mark.parametrize("where", ["argument", "captured", "map"])
def test_what_no_worker_has_the_memory_to_receive(make_runner: Callable[..., Runner], where: str) -> None:
    """The worker ends while it comes in, before anything has begun: it was sent to the next one for ever, and what
    stood behind it never ran."""
    runner = make_runner(1, memory_limit="200MiB")
    large = bytes(100 * MIB)
    if where == "map":
        with pytest.raises(distpool.ProcessExitedException, match="more memory") as info:
            list(runner.raw.map(len, [large, b"small"]))
        error: BaseException | None = info.value
    else:
        bad = runner.submit(len, large) if where == "argument" else runner.submit(lambda: len(large))
        behind = [runner.submit(helpers.square, number) for number in range(8)]
        error = bad.error()
        assert_squares(behind)
    assert isinstance(error, distpool.ProcessExitedException) and not error.maybe_ran
    assert "more memory" in str(error)
    assert_squares([runner.submit(helpers.square, number) for number in range(3)])
