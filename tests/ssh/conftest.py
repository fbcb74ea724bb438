"""One sshd for all tests here, and both clients by fixture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import distpool

from .sshd import Server, missing, options


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = missing()
    here = Path(__file__).parent
    for item in items:
        if reason and here in item.path.parents and "server" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("sshd"))
    yield running
    running.stop()


@pytest.fixture(params=[None, "ssh"], ids=["paramiko", "openssh"])
def ssh(request: pytest.FixtureRequest) -> Any:
    """The client: the keyword `ssh=`."""
    return request.param


@pytest.fixture
def add(server: Server, ssh: Any) -> Iterator[Callable[..., list[int]]]:
    """`addprocs` for this server through this client; removes all workers afterwards."""
    yield lambda machines, **more: distpool.addprocs(machines, **options(server, ssh, **more))
    distpool.rmprocs(distpool.procs()[1:])
