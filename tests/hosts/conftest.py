"""One rig for all tests of a session; without it they are skipped, and say what the machine lacks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hosts.rig import Rig, lacking


@pytest.fixture(scope="session")
def whole_rig() -> Iterator[Rig]:
    why = lacking()
    if why:
        pytest.skip(why)
    with Rig(4) as made:
        yield made


@pytest.fixture
def rig(whole_rig: Rig) -> Iterator[Rig]:
    """The rig, without faults before and after each test."""
    yield whole_rig
    whole_rig.unfilter()
    for host in whole_rig.hosts:
        whole_rig.mend(host)
        whole_rig.heal(host)
        whole_rig.rate(host, None)
        if not host.is_up:
            whole_rig.boot(host)
