"""The face that the executor and its views share: it hands everything on as it was given, and loads nothing."""

from __future__ import annotations

import concurrent.futures
import subprocess
import sys
from typing import Any

import pytest

from distpool import mapping
from distpool.submitter import Submitter


class Ways:
    """In place of the module `submitting`."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.asked.append((name, *arguments)) or name


@pytest.fixture
def submitter() -> Submitter:
    made = Submitter()
    made._ways = Ways()
    made._progress = None
    return made


def test_submit_hands_on_all_names(submitter: Submitter) -> None:
    assert submitter.submit(print, 1, fn=2, self=3) == "submit"
    assert submitter._ways.asked == [("submit", submitter, print, (1,), {"fn": 2, "self": 3})]
    with pytest.raises(TypeError):
        submitter.submit()  # type: ignore[call-arg]


def test_maps_hand_on_their_options(submitter: Submitter) -> None:
    submitter.map(pow, [1], [2])
    submitter.map(pow, timeout=1, chunksize=2, buffersize=3)
    submitter.imap_unordered(pow, [1])
    submitter.imap_unordered(pow, [1], [2], buffersize=4, timeout=5)
    assert submitter._ways.asked == [
        ("map_in_order", submitter, pow, ([1], [2]), None, 1, None),
        ("map_in_order", submitter, pow, (), 1, 2, 3),
        ("map_unordered", submitter, pow, ([1],), None, None),
        ("map_unordered", submitter, pow, ([1], [2]), 4, 5),
    ]


def test_pmap_runs_on_this_one_and_shows_its_progress(submitter: Submitter, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(mapping, "pmap", lambda *args, **options: asked.append((args, options)) or [7])
    submitter._progress = True
    assert submitter.pmap(pow, [1], [2]) == [7]
    assert submitter.pmap(pow, [1], batch_size=3, progress=False, distributed=False, retry_delays=[0]) == [7]
    defaults = {"pool": submitter, "distributed": True, "batch_size": 1, "on_error": None, "retry_delays": ()}
    (first, second) = asked
    assert first == ((pow, [1], [2]), {**defaults, "retry_check": None, "progress": True})
    changes = {"distributed": False, "batch_size": 3, "retry_delays": [0], "retry_check": None, "progress": False}
    assert second == ((pow, [1]), {**defaults, **changes})


def test_it_is_an_executor_of_the_standard_library(submitter: Submitter) -> None:
    assert isinstance(submitter, concurrent.futures.Executor)
    with pytest.raises(NotImplementedError):
        submitter._check_usable()


def test_it_loads_nothing_of_what_it_needs_later() -> None:
    """A program's first executor has its zygote started before the rest is loaded."""
    code = "import sys, distpool.submitter; print(*sorted(name for name in sys.modules if name.startswith('distpool')))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"distpool.crew", "distpool.scheduling", "distpool.submitting", "distpool.node.node"} & set(found)
