"""The interface of cluster managers, the record of a worker, and the header line."""

from __future__ import annotations

import dataclasses
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


def test_worker_config_has_the_fields_of_julia_all_none() -> None:
    names = """io host port count exename exeflags userdata tunnel multiplex forward bind_addr sshflags max_parallel
        connect_at process ospid environ ident connect_idents enable_threaded_blas"""
    assert {field.name for field in dataclasses.fields(WorkerConfig)} == set(names.split())
    assert set(dataclasses.asdict(WorkerConfig()).values()) == {None}
    assert WorkerConfig(host="h", port=1) == WorkerConfig(host="h", port=1)


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
