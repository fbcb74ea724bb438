"""Short looks before a poll that sleeps: who looks, and how that ends. (Both pollers are tested in test_ioloop.)"""

from __future__ import annotations

from typing import Any

import pytest

from distpool.transport import polling


class Scripted:
    """A poller that answers its n-th blocking poll after so many seconds, and each look with what it is told."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds = seconds
        self.looks = 0
        self.found: list[tuple[int, int]] = []
        self.now = 0.0

    def poll(self, timeout: float | None) -> list[tuple[int, int]]:
        if timeout == 0:
            self.looks += 1
            self.now += 10e-6
            return self.found
        self.now += self.seconds.pop(0)
        return [(1, 1)]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(seconds: list[float]) -> tuple[Scripted, Any]:
        poller = Scripted(seconds)
        monkeypatch.setattr(polling.time, "perf_counter", lambda: poller.now)
        return poller, polling.Glances(poller)

    return make


def test_only_who_has_been_answered_soon_looks_before_sleeping(scripted: Any) -> None:
    poller, glances = scripted([50e-6] * polling._TRUST)
    for _ in range(polling._TRUST):
        glances.poll(None)
    assert poller.looks == 0
    poller.found = [(7, 1)]
    assert glances.poll(None) == [(7, 1)] and poller.looks == 1


def test_a_look_in_vain_costs_all_trust(scripted: Any) -> None:
    poller, glances = scripted([50e-6] * polling._TRUST + [1.0])
    for _ in range(polling._TRUST + 1):
        glances.poll(None)
    looks = poller.looks
    assert 0 < looks < 20  # it has an end
    poller.seconds = [50e-6] * (2 * polling._TRUST + 1)
    for _ in range(2 * polling._TRUST):  # and the next time it takes twice as long to win it
        glances.poll(None)
    assert poller.looks == looks
    glances.poll(None)
    assert poller.looks > looks


def test_no_look_where_the_wait_is_short_anyway(scripted: Any) -> None:
    poller, glances = scripted([50e-6] * (polling._TRUST + 1))
    for _ in range(polling._TRUST):
        glances.poll(None)
    glances.poll(polling._GLANCE / 2)
    assert poller.looks == 0
