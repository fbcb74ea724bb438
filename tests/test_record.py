"""What a manager knows of one worker."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from distpool.managers.record import WorkerConfig


def test_worker_config_has_the_fields_of_julia_all_none() -> None:
    names = """io host port count exename exeflags userdata tunnel multiplex forward bind_addr sshflags max_parallel
        connect_at process ospid environ ident connect_idents enable_threaded_blas"""
    assert {field.name for field in dataclasses.fields(WorkerConfig)} == set(names.split())
    assert set(dataclasses.asdict(WorkerConfig()).values()) == {None}
    assert WorkerConfig(host="h", port=1) == WorkerConfig(host="h", port=1)


def test_nothing_else_can_be_said() -> None:
    with pytest.raises(TypeError):
        WorkerConfig(hosts="h")  # type: ignore[call-arg]
    assert WorkerConfig(host="h") != WorkerConfig(host="g")


def test_managers_of_our_own_load_without_it() -> None:
    """`dataclasses` takes its time, and a program's first executor is not to wait for it."""
    code = "import sys, distpool.managers.local; print('distpool.managers.record' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"False\n"
