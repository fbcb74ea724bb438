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


def test_a_dataclass_from_the_moment_somebody_looks() -> None:
    """`dataclasses` takes its time, and a program's first executor is not to wait for it."""
    code = """if True:
        import sys
        import distpool.opening
        from distpool.managers.record import WorkerConfig
        early = WorkerConfig(host="h")
        assert "dataclasses" not in sys.modules
        assert repr(early).startswith("WorkerConfig(io=None, host='h', port=None, ")
        import dataclasses
        assert dataclasses.is_dataclass(early)
        assert dataclasses.replace(early, port=7) == WorkerConfig(host="h", port=7) != early == WorkerConfig(host="h")
        @dataclasses.dataclass
        class Mine(WorkerConfig):
            rack: int = 3
        assert dataclasses.asdict(Mine(host="h"))["rack"] == 3 and Mine("io", "h").host == "h"
        import copy, pickle
        assert pickle.loads(pickle.dumps(early)) == copy.copy(early) == early
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_somebody_extends_it_before_anybody_looked() -> None:
    code = """if True:
        from dataclasses import dataclass, fields
        from distpool import WorkerConfig
        @dataclass
        class Mine(WorkerConfig):
            rack: int = 3
        assert [field.name for field in fields(Mine)][-2:] == ["enable_threaded_blas", "rack"]
        assert Mine(rack=4).rack == 4 and Mine().host is None and WorkerConfig.__match_args__[0] == "io"
        class Plain(WorkerConfig):
            rack: int = 3
        assert Plain(host="h").host == "h" and Plain.rack == 3 and Plain() != WorkerConfig()
        try:
            Plain(rack=4)
        except TypeError:
            pass
        else:
            raise AssertionError("as with other dataclasses, it is not a field")
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
