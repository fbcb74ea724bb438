"""The interface of cluster managers, and the header line of workers."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from distpool.managers.base import ClusterManager, parse_header
from distpool.managers.record import WorkerConfig


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("distpool_worker:9009#10.0.0.7", ("10.0.0.7", 9009)),
        ("distpool_worker:9009#10.0.0.7\n", ("10.0.0.7", 9009)),
        ("  distpool_worker:1#host.example \r\n", ("host.example", 1)),
        ("distpool_worker:65535#::1", ("::1", 65535)),
        ("distpool_worker:65535#[2001:db8::1]", ("2001:db8::1", 65535)),
        ("distpool_worker:0#unix:/tmp/a b/w1.sock", ("unix:/tmp/a b/w1.sock", 0)),
        ("distpool_worker:65536#10.0.0.7", None),
        ("distpool_worker:0#10.0.0.7", None),
        ("distpool_worker:5#unix:/tmp/w1.sock", None),
        ("distpool_worker:-5#10.0.0.7", None),
        ("distpool_worker:x#10.0.0.7", None),
        ("distpool_worker:9009#", None),
        ("distpool_worker:9009", None),
        ("julia_worker:9009#10.0.0.7", None),
        ("see: distpool_worker:9009#10.0.0.7", None),
        ("", None),
    ],
)
def test_parse_header(line: str, expected: tuple[str, int] | None) -> None:
    assert parse_header(line) == expected


def test_defaults_of_a_manager() -> None:
    manager = ClusterManager()
    with pytest.raises(NotImplementedError, match="ClusterManager has no launch"):
        manager.launch({})
    config = WorkerConfig()
    assert manager.connect(2, config) is None
    assert manager.manage(2, config, "register") is None
    manager.kill(2, config)  # nothing was started by us
    params = manager.default_addprocs_params()
    assert params["topology"] == "all_to_all" and params["lazy"] is True and params["exeflags"] == ()
    assert params["exename"] == sys.executable
    params["dir"] = "/changed"
    assert manager.default_addprocs_params()["dir"] is None


def test_kill_ends_the_process_of_the_config() -> None:
    class Process:
        killed = 0

        def kill(self) -> None:
            self.killed += 1

    process = Process()
    ClusterManager().kill(2, WorkerConfig(process=process))
    assert process.killed == 1


def test_a_manager_needs_only_launch() -> None:
    class Mine(ClusterManager):
        def launch(self, params: dict[str, Any]) -> Any:
            yield WorkerConfig(host=params["host"], port=9009)

    assert list(Mine().launch({"host": "a"})) == [WorkerConfig(host="a", port=9009)]


def test_what_managers_need_not_say() -> None:
    manager, error = ClusterManager(), OSError("x")
    assert manager.check({"any": "thing"}) is None  # type: ignore[func-returns-value]
    assert manager.unreachable(WorkerConfig(), error) is error
    assert manager.sized(3) is None and list(manager.parts()) == [(manager, None)]
    assert manager.close() is None and not manager.any_keyword  # type: ignore[func-returns-value]


class Counted(ClusterManager):
    def __init__(self, n: int = 7) -> None:
        self.n = n


@pytest.mark.parametrize("rest, n", [("", 7), ("3", 3), ("007", 7)])
def test_from_url(rest: str, n: int) -> None:
    made = Counted.from_url(rest)
    assert type(made) is Counted and made.n == n


@pytest.mark.parametrize("rest", ["0", "-1", "x", "1.5", " 1", "\N{ARABIC-INDIC DIGIT TWO}"])
def test_from_url_takes_a_number_of_workers(rest: str) -> None:
    with pytest.raises(ValueError, match="Counted takes a number of workers"):
        Counted.from_url(rest)


def test_an_interpreter_that_does_not_know_its_own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "")
    assert ClusterManager().default_addprocs_params()["exename"] is None
