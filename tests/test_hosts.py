"""What `hosts=` may be, and the errors of what it may not."""

from __future__ import annotations

import os
from typing import Any

import pytest

from distpool.hosts import check_count, check_options, plan_for, usable_cpus
from distpool.managers.local import LocalManager


@pytest.mark.parametrize(
    "hosts, workers, size",
    [(3, None, 3), (None, 2, 2), ("local://5", None, 5), (LocalManager(4), None, 4)],
)
def test_local_plans(hosts: Any, workers: int | None, size: int) -> None:
    plan = plan_for(hosts, workers, {})
    assert plan.size == size
    manager: Any = plan.manager(7)
    assert isinstance(manager, LocalManager) and manager.n == 7, "replacements: as many as are missing"


def test_default_is_one_worker_for_each_cpu() -> None:
    expected = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert plan_for(None, None, {}).size == plan_for("local://", None, {}).size == usable_cpus() == expected


@pytest.mark.parametrize("count", [0, -1])
def test_counts_must_be_positive(count: int) -> None:
    for call in (lambda: check_count(count), lambda: plan_for(count, None, {}), lambda: plan_for(None, count, {})):
        with pytest.raises(ValueError, match="^max_workers must be greater than 0$"):
            call()


@pytest.mark.parametrize("hosts", [1.5, True, object(), b"host", {1: 2}])
def test_what_is_no_host(hosts: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        plan_for(hosts, None, {})


@pytest.mark.parametrize("hosts", ["local://x", "local://-1", "local://1.5", "nonsense://3"])
def test_malformed_addresses(hosts: str) -> None:
    with pytest.raises((ValueError, TypeError)):
        plan_for(hosts, None, {})


def test_unknown_options_are_refused_before_anything_is_launched() -> None:
    with pytest.raises(ValueError, match="^Invalid keyword argument foo$"):
        plan_for(2, None, {"foo": 1})
    check_options(LocalManager(1), {"dir": "/", "env": {}, "restrict": True})
