"""`mapresults`: what readers of maps hold, and let go of."""

from __future__ import annotations

from typing import Any

from distpool.mapresults import _Reader


def test_a_reader_that_an_interrupt_kept_from_being_made_lets_go_of_nothing() -> None:
    object.__new__(_Reader).__del__()


def test_a_reader_that_is_dropped_disowns_its_map() -> None:
    told: list[str] = []

    class Run:
        def disown(self) -> None:
            told.append("disowned")

    run: Any = Run()
    reader = _Reader(run)
    del reader
    assert told == ["disowned"]
