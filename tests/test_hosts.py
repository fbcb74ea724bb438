"""What `hosts=` may be, and the errors of what it may not."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distpool import ClusterExecutor, ClusterManager, DistPool, hosts
from distpool.hosts import check_count, check_options, manager_of, plan_for, usable_cpus
from distpool.managers.local import LocalManager


class Machines(ClusterManager):
    """In the place of the manager that logs in: notes what it is asked for."""

    def __init__(self, machines: list[Any]) -> None:
        self.machines = machines

    def parts(self) -> list[tuple[ClusterManager, int | None]]:
        return [(Machines([entry]), entry[1] if isinstance(entry, tuple) else 1) for entry in self.machines]

    def sized(self, n: int) -> ClusterManager:
        return Machines([(self.machines[0][0], n)])


@pytest.fixture
def no_login(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "ssh_manager", Machines)


@pytest.mark.parametrize(
    "given, workers, size",
    [(3, None, 3), (None, 2, 2), ("local://5", None, 5), (LocalManager(4), None, 4), ("local://5", 2, 2)],
)
def test_local_plans(given: Any, workers: int | None, size: int) -> None:
    (place,) = plan_for(given, workers, {}).places
    assert place.count == place.share == size
    assert isinstance(place.manager, LocalManager) and place.manager.n == size
    more: Any = place.manager.sized(7)
    assert isinstance(more, LocalManager) and more.n == 7, "replacements: as many as are missing"


def test_default_is_one_worker_for_each_cpu() -> None:
    expected = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert usable_cpus() == expected
    for given in (None, "local://"):
        assert plan_for(given, None, {}).places[0].count == expected


@pytest.mark.parametrize("count", [0, -1])
def test_counts_must_be_positive(count: int) -> None:
    for call in (lambda: check_count(count), lambda: plan_for(count, None, {}), lambda: plan_for(None, count, {})):
        with pytest.raises(ValueError, match="^max_workers must be greater than 0$"):
            call()


@pytest.mark.parametrize("given", [1.5, True, object(), b"host", {1: 2}, []])
def test_what_is_no_host(given: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        plan_for(given, None, {})


@pytest.mark.parametrize("given", ["local://x", "local://-1", "local://1.5", "local://0", "nonsense://3"])
def test_malformed_addresses(given: str) -> None:
    with pytest.raises(ValueError):
        plan_for(given, None, {})


def test_unknown_options_are_refused_before_anything_is_launched() -> None:
    for given in (2, "local://2", Machines([("a", 1)])):
        with pytest.raises(ValueError, match="^Invalid keyword argument foo$"):
            plan_for(given, None, {"foo": 1})
    check_options(LocalManager(1), {"dir": "/", "env": {}, "restrict": True})


def test_iterators_among_the_options_are_read_once() -> None:
    """The check of the arguments had used them up when the launch came to them, and again for each replacement."""
    given = {"env": zip(["A"], ["1"], strict=True), "exeflags": iter(["-O"]), "affinity": (iter([0]),)}
    plan = plan_for(2, None, {**given, "gpus": iter([5, iter([6, 7])]), "dir": "/"})
    expected = {"env": [("A", "1")], "exeflags": ["-O"], "affinity": [[0]], "gpus": [5, [6, 7]], "dir": "/"}
    assert plan.params == expected


def test_what_is_no_iterator_stays_what_it_is() -> None:
    with open(os.devnull) as file:
        options = {"env": {"A": "1"}, "exeflags": ("-O",), "gpus": 3, "affinity": [[0]], "log": file}
        for name, value in hosts.kept(options).items():
            assert value is options[name]


def test_a_manager_may_take_any_option() -> None:
    class Batch(ClusterManager):
        any_keyword = True

    assert plan_for(Batch(), None, {"partition": "debug"}).params == {"partition": "debug"}


@pytest.mark.usefixtures("no_login")
def test_machines(tmp_path: Path) -> None:
    path = tmp_path / "machines"
    path.write_text("3*me@host:2222\nother\n")
    expected: list[tuple[Any, list[Any]]] = [
        (["a", ("b", 3)], ["a", ("b", 3)]),
        (("a", "b"), ["a", "b"]),
        (("a", 4), [("a", 4)]),
        (("a", np.int64(4)), [("a", 4)]),
        (("a", "auto"), [("a", "auto")]),
        ("me@a:2222", ["me@a:2222"]),
        (path, [("me@host:2222", 3), "other"]),
        ((name for name in ("a", "b")), ["a", "b"]),
    ]
    for given, machines in expected:
        manager = manager_of(given)
        assert isinstance(manager, Machines) and manager.machines == machines
    path.write_text("# nobody\n")
    with pytest.raises(ValueError, match="no machine in this file"):
        manager_of(path)


@pytest.mark.usefixtures("no_login")
def test_the_hosts_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "2(x2)")
    manager: Any = manager_of("env")
    assert manager.machines == [("n1", 2), ("n2", 2)]


@pytest.mark.parametrize("most, counts", [(None, [8, 8, 1]), (17, [8, 8, 1]), (9, [4, 4, 1]), (2, [1, 1, 0])])
def test_max_workers_caps_machines(most: int | None, counts: list[int]) -> None:
    plan = plan_for(Machines([("a", 8), ("b", 8), ("c", 1)]), most, {})
    assert plan.cap is None
    assert [place.count for place in plan.places] == [place.share for place in plan.places] == counts
    machines = [place.manager.machines[0][1] for place in plan.places if place.count]  # type: ignore[attr-defined]
    assert machines == [count for count in counts if count]


def test_max_workers_where_the_number_is_not_known() -> None:
    class Opaque(ClusterManager):
        pass

    plan = plan_for(Opaque(), 3, {})
    assert plan.cap == 3 and [place.count for place in plan.places] == [None]


class ThirdParty(ClusterManager):
    """Of another package."""

    def __init__(self, n: int = 1) -> None:
        self.n = n


def not_a_manager(rest: str) -> str:
    return rest


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Another distribution with entry points, as an installer leaves it."""
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    here = ThirdParty.__module__
    (info / "entry_points.txt").write_text(
        f"[distpool.managers]\ntheirs = {here}:ThirdParty\nodd = {here}:not_a_manager\nworse = {here}:__name__\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield


@pytest.mark.usefixtures("installed")
def test_managers_of_other_packages() -> None:
    manager = manager_of("theirs://5")
    assert type(manager).__name__ == "ThirdParty" and manager.n == 5  # type: ignore[attr-defined]
    assert manager_of("theirs://").n == 1  # type: ignore[attr-defined]
    for text, message in (
        ("odd://x", "gave a str, no manager"),
        ("worse://x", "neither a ClusterManager nor a function"),
    ):
        with pytest.raises(TypeError, match=message):
            manager_of(text)
    with pytest.raises(ValueError, match=r"no manager is called 'nobodys': known are .*local.*theirs"):
        manager_of("nobodys://")
    with pytest.raises(ValueError, match="ThirdParty takes a number of workers"):
        manager_of("theirs://a/b")


def test_by_name_and_in_the_first_place_of_a_pool() -> None:
    with ClusterExecutor("local://2") as executor:
        assert executor.submit(abs, -1).result(30) == 1
    with DistPool("local://2") as pool:
        assert pool.map(abs, [-1, 2]) == [1, 2] and pool.size == 2
    with DistPool(1, hosts="local://2") as pool:
        assert pool.apply(abs, (-3,)) == 3 and pool.size == 1
