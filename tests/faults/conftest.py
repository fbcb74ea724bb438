"""Fixtures of the fault tests: `make_runner`, `runner` (both classes, two workers), `gate`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from .helpers import Gate
from .runners import KINDS, Runner

if sys.platform == "win32":
    collect_ignore_glob = ["test_*.py"]  # signals, fork and POSIX limits are what these tests are made of


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "faults" in item.path.parts:
            item.add_marker(pytest.mark.fault)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Every row holds for both classes."""
    return str(request.param)


@pytest.fixture
def make_runner(kind: str) -> Iterator[Callable[..., Runner]]:
    """Makes runners of the kind; a test that does not close its runner has it ended by force."""
    made: list[Runner] = []

    def make(workers: int = 2, **options: Any) -> Runner:
        runner = Runner(kind, workers, options)
        made.append(runner)
        return runner

    yield make
    for runner in made:
        runner.end()


@pytest.fixture
def runner(make_runner: Callable[..., Runner], gate: Gate) -> Iterator[Runner]:
    """Two workers. At the end of a passed test, everything must be able to finish by itself."""
    made = make_runner()
    yield made
    gate.close()
