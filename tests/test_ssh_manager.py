"""SSHManager's launch of many hosts. Logins are played here: see `tests/ssh` for real ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from distpool.errors import CompositeException, LaunchWorkerError
from distpool.managers.ssh import SSHManager


def test_counts_of_numpy() -> None:
    manager = SSHManager([("host", np.int64(2)), ("host", 1)])
    assert list(manager.machines.values()) == [3] and {type(count) for count in manager.machines.values()} == {int}
    manager.check({**manager.default_addprocs_params(), "max_parallel": np.int8(3)})
    for bad in (0, True, 1.5, np.True_):
        with pytest.raises(ValueError, match="the number of workers of 'host'"):
            SSHManager([("host", bad)])


class Login:
    """Of a host with problems; it settles when the test says so."""

    def __init__(self, host: str, settle: Callable[[Any], object]) -> None:
        self.host = host
        self._settle = settle

    def begin(self, deadline: float, on_end: Callable[[], object]) -> None:
        begun.append(self)
        if len(begun) == 3:
            for login in reversed(begun):
                login.settle()

    def settle(self) -> None:
        self._settle((self, [LaunchWorkerError(self.host, "", f"problem {number}") for number in (1, 2)]))


begun: list[Login] = []


def test_failures_come_in_the_order_of_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """They came in the order in which the hosts had failed."""
    begun.clear()
    monkeypatch.setattr(SSHManager, "_login", lambda self, spec, count, *rest: Login(spec.host, rest[-1].put))
    manager = SSHManager(["first", "second", "third"])
    params = {**manager.default_addprocs_params(), "ssh": "ssh", "cookie": "c"}
    with pytest.raises(CompositeException) as info:
        list(manager.launch(params))
    hosts = [error.host for error in info.value.exceptions if isinstance(error, LaunchWorkerError)]
    assert hosts == ["first", "first", "second", "second", "third", "third"]
    assert [str(error).split()[-1] for error in info.value.exceptions] == ["1", "2"] * 3
