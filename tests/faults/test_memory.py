"""Row F9: a task that wants more memory than it may have."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable

import psutil
import pytest

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
