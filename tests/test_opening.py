"""From the arguments of an executor to its workers, before any of them is started."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import distpool.top
from distpool import borrowing, exits, joining, opening
from distpool.crew import Crew
from distpool.errors import SerializationError
from distpool.hosts import Plan
from distpool.node import node as nodes
from distpool.wire import codec

NOTHING = None, ()


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Topologies that are held; "any" by who takes what there is."""
    found: list[Any] = []
    group = SimpleNamespace(
        claim_topology=lambda *arguments: found.append(arguments), accept_topology=lambda: found.append("any")
    )
    monkeypatch.setattr(opening.groups, "of", lambda node: group)
    return found


@pytest.fixture
def crew(claims: list[Any]) -> Iterator[Any]:
    """`make_crew`, whose crews are forgotten afterwards: they were never started, and hold no real topology."""
    made: list[Crew] = []

    def make(
        hosts: Any = 2, max_workers: Any = None, initializer: Any = NOTHING, tasks: Any = None, **options: Any
    ) -> Any:
        made.append(opening.make_crew(hosts, max_workers, options, initializer, tasks, True))
        return made[-1]

    yield make
    for one in made:
        one.node.crews.discard(one)


def test_a_crew_of_local_workers_is_not_started(crew: Any, claims: list[Any]) -> None:
    made = crew(3, tasks=5)
    assert type(made) is Crew and made.node is nodes.current() and not made.members
    assert made._initializer is None and made._max_tasks == 5
    assert claims == ["any"] and made.holds_topology is True


@pytest.mark.parametrize(
    ("options", "claim"),
    [({"topology": "master_worker"}, ("master_worker", True)), ({"lazy": False}, ("all_to_all", False))],
)
def test_who_cares_claims_a_topology(crew: Any, claims: list[Any], options: Any, claim: Any) -> None:
    assert crew(1, **options).holds_topology is True
    assert claims == [claim]


def test_bad_arguments_claim_nothing(claims: list[Any]) -> None:
    for hosts, options, error in ((0, {}, ValueError), (1, {"nonsense": 1}, ValueError), (object(), {}, TypeError)):
        with pytest.raises(error):
            opening.make_crew(hosts, None, {"lazy": False, **options}, NOTHING, None, True)
    with pytest.raises(SerializationError, match="^the initializer with its arguments, a tuple of 2, cannot"):
        opening.make_crew(1, None, {"lazy": False}, (abs, (threading.Lock(),)), None, True)
    assert claims == []


@pytest.mark.parametrize("argument", [[1, 2], bytearray(1 << 20)])
def test_the_initializer_is_serialised_now_and_in_one_piece(crew: Any, argument: Any) -> None:
    made = crew(initializer=(sum, (argument,)))
    assert codec.decode(made._initializer) == (sum, (argument,))


def test_nothing_is_opened_when_the_program_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("the interpreter is shutting down")

    monkeypatch.setattr(exits, "check_alive", refuse)
    with pytest.raises(RuntimeError, match="shutting down"):
        opening.make_crew(1, None, {}, NOTHING, None, True)


def test_the_endpoint_is_served_only_if_it_is_wanted(crew: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Any] = []
    monkeypatch.setattr(distpool.top, "serve_if_wanted", served.append)
    monkeypatch.delenv("DISTPOOL_TOP", raising=False)
    crew()
    assert not served
    monkeypatch.setenv("DISTPOOL_TOP", "127.0.0.1:0")
    crew()
    assert served == [nodes.current()]


def test_borrowed_workers(monkeypatch: pytest.MonkeyPatch, claims: list[Any]) -> None:
    made: list[Any] = []
    monkeypatch.setattr(opening, "plan_for", lambda *arguments: Plan([], {}, borrowed=[4, 5]))
    monkeypatch.setattr(borrowing, "BorrowedCrew", lambda *args, **options: made.append((args, options)) or "crew")
    assert opening.make_crew("pool", None, {}, NOTHING, None, False) == "crew"
    assert made == [((nodes.current(), [4, 5]), {"initializer": None, "replace": False})] and not claims
    with pytest.raises(ValueError, match="max_tasks_per_child"):
        opening.make_crew("pool", None, {}, NOTHING, 3, True)


def test_a_zygote_that_was_started_ahead_is_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    adopted: list[Any] = []
    monkeypatch.setattr(joining, "launcher", lambda node: SimpleNamespace(adopt=adopted.append))
    started: Any = object()
    opening.adopt(nodes.current(), started)
    assert adopted == [started]
