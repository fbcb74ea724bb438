"""LocalManager: the surroundings that local workers get, and real workers through it."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distpool.managers import command
from distpool.managers.launch import Launcher
from distpool.managers.local import LocalManager
from distpool.managers.record import WorkerConfig
from distpool.managers.surroundings import BLAS_VARIABLES
from distpool.transport.ioloop import IoLoop


@pytest.fixture
def launcher() -> Iterator[Launcher]:
    loop = IoLoop("test-io")
    loop.start()
    launcher = Launcher(loop)
    yield launcher
    launcher.close()
    loop.stop()


def spec_of(n: int = 1, restrict: bool = True, **params: Any) -> Any:
    return LocalManager(n, restrict).spec({"cookie": "c", **params})


def test_constructor() -> None:
    assert repr(LocalManager(1, True)) == "LocalManager()"
    assert (LocalManager(3).n, LocalManager(3).restrict) == (3, True)
    with pytest.raises(ValueError, match="-1"):
        LocalManager(-1)
    for wrong in ("2", 2.0, True, None):
        with pytest.raises(TypeError):
            LocalManager(wrong)  # type: ignore[arg-type]
    assert LocalManager(1).default_addprocs_params()["restrict"] is True


def test_no_workers_start_nothing() -> None:
    assert list(LocalManager(0).launch({})) == []


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("DISTPOOL_TEST_HERE", "here")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    env = spec_of().env
    assert {env[name] for name in BLAS_VARIABLES} == {"1"}
    assert env["DISTPOOL_TEST_HERE"] == "here"
    assert os.environ["OMP_NUM_THREADS"] == "7"
    env = spec_of(env={"MKL_NUM_THREADS": "3", "DISTPOOL_TEST_HERE": "there"}).env
    assert (env["MKL_NUM_THREADS"], env["OMP_NUM_THREADS"], env["DISTPOOL_TEST_HERE"]) == ("3", "1", "there")
    assert spec_of(env=[("A_PAIR", "x")]).env["A_PAIR"] == "x"
    env = spec_of(enable_threaded_blas=True).env
    assert env["OMP_NUM_THREADS"] == "7" and "MKL_NUM_THREADS" not in env
    for wrong in ({"A": 1}, {1: "a"}):
        with pytest.raises(TypeError, match="env must map"):
            spec_of(env=wrong)
    for name in ("", "A=B", "A\0"):
        with pytest.raises(ValueError, match="environment variable"):
            spec_of(env={name: "x"})


def test_import_path_is_the_current_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", "/b", "/a", "relative", *sys.path])
    spec = spec_of()
    assert spec.sys_path == [str(tmp_path), *sys.path[1:]]
    assert spec.own_path is False
    # A worker that runs elsewhere still finds what relative entries meant here.
    assert spec_of(dir="/").sys_path[3] == str(tmp_path / "relative")
    sys.path.append("/later")
    assert "/later" not in spec.sys_path


def test_pythonpath_of_the_user_replaces_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/old")
    monkeypatch.setattr(sys, "path", ["/script", "/old", "/lib"])
    wish = {"PYTHONPATH": os.pathsep.join(["/new", "/lib", ""])}
    assert spec_of(env=wish).sys_path == ["/new", "/lib", "/script"]


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = os.path.abspath(sys.executable)
    assert spec_of().argv[0] == own
    assert spec_of(exeflags="-O").argv == [*spec_of().argv, "-O"]
    assert spec_of(exeflags=["-X", "dev"]).argv[-2:] == ["-X", "dev"]
    assert spec_of(exename=sys.executable).own_path is False
    program = tmp_path / "mypython"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert spec_of(exename=program).argv == [str(program)]
    spec = spec_of(exename=["nice", "-n", "5", sys.executable], exeflags="-B")
    assert spec.argv[1:] == ["-n", "5", sys.executable, "-B"]
    assert os.path.basename(spec.argv[0]) == "nice" and spec.own_path
    monkeypatch.setenv("PATH", str(tmp_path))
    assert spec_of(exename="mypython").argv == [str(program)]
    monkeypatch.chdir(tmp_path)
    assert spec_of(exename="./mypython").argv == [str(program)]
    with pytest.raises(ValueError, match="exename"):
        spec_of(exename=[])
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(ValueError, match=r"sys\.executable"):
        spec_of()


def test_another_interpreter_gets_no_entries_of_ours() -> None:
    installed = command.installation()
    path = spec_of(exename="/usr/bin/other-python").sys_path
    assert not set(path) & installed
    assert set(spec_of().sys_path) & installed
    assert not any("site-packages" in entry for entry in path)


def test_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert spec_of().cwd == str(tmp_path)
    assert spec_of(dir="sub").cwd == str(tmp_path / "sub")
    assert spec_of(dir=tmp_path).cwd == str(tmp_path)
    assert spec_of(dir="~").cwd == os.path.expanduser("~")
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert spec_of().cwd == os.path.expanduser("~")


def test_method_transport_and_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTPOOL_LAUNCH", "exec")
    monkeypatch.setenv("DISTPOOL_TRANSPORT", "tcp")
    monkeypatch.setenv("DISTPOOL_WORKER_TIMEOUT", "7.5")
    spec = spec_of(extra={"a": 1})
    assert (spec.method, spec.transport, spec.timeout, spec.extra) == ("exec", "tcp", 7.5, {"a": 1})
    assert spec.bind == "127.0.0.1"
    assert spec_of(timeout=3).timeout == 3.0
    monkeypatch.setenv("DISTPOOL_LAUNCH", "fork")
    monkeypatch.setenv("DISTPOOL_TRANSPORT", "unix")
    assert (spec_of().method, spec_of().transport) == ("fork", "unix")
    assert spec_of(restrict=False).transport == "tcp"


@pytest.mark.parametrize("method", ["fork", "exec"])
@pytest.mark.parametrize("restrict", [True, False])
def test_launch(launcher: Launcher, monkeypatch: pytest.MonkeyPatch, method: str, restrict: bool) -> None:
    monkeypatch.setenv("DISTPOOL_LAUNCH", method)
    manager = LocalManager(2, restrict)
    spec = manager.spec({"cookie": "c"})
    spec.entry = "launch_entries:serve"
    monkeypatch.setattr(manager, "spec", lambda params: spec)
    configs = list(manager.launch({"launcher": launcher, "cookie": "c"}))
    assert len(configs) == 2
    for number, config in enumerate(configs, 2):
        assert isinstance(config, WorkerConfig) and isinstance(config.host, str)
        assert config.ospid == config.process.ospid
        path = config.host.removeprefix("unix:")
        if restrict:
            assert config.port == 0 and os.path.exists(path)
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(path)
        else:
            assert config.host == spec.bind
            connection = socket.create_connection((config.host, config.port), 10)
        with connection, connection.makefile("rw") as stream:
            stream.write(json.dumps("import os; result = os.getpid()") + "\n")
            stream.flush()
            assert int(stream.readline()) == config.ospid
        ends: list[int | None] = []
        manager.manage(number, config, "register")
        manager.kill(number, config)
        config.process.add_exit_callback(ends.append)
        os.close(config.process.output)


def test_another_interpreter_really_starts(launcher: Launcher, tmp_path: Path) -> None:
    """A script that runs this interpreter counts as another one: it keeps its own sys.path behind ours."""
    program = tmp_path / "python-by-another-name"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    program.chmod(0o755)
    for method in ("fork", "exec"):
        spec = spec_of(exename=str(program))
        spec.method, spec.transport, spec.entry = method, "tcp", "launch_entries:serve"
        spec.sys_path.append(os.path.dirname(__file__))
        (process,) = launcher.launch(spec)
        with socket.create_connection(process.address[1:], 10) as connection, connection.makefile("rw") as stream:
            stream.write(json.dumps("import sys, cloudpickle; result = sys.path") + "\n")
            stream.flush()
            path = json.loads(stream.readline())
        assert path[: len(spec.sys_path)] == spec.sys_path
        behind = path[len(spec.sys_path) :]
        assert behind and not set(behind) & set(spec.sys_path)
        assert set(behind) & command.installation()
        os.close(process.output)
