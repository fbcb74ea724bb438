"""LocalManager: the order that it makes of its keywords, and real workers through it."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distpool import CompositeException, LaunchWorkerError, addprocs
from distpool.managers import command
from distpool.managers.launch import Launcher
from distpool.managers.local import LocalManager
from distpool.managers.record import WorkerConfig
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


@pytest.mark.parametrize("keyword", [True, False])
@pytest.mark.parametrize("own", [True, False])
def test_the_keyword_counts_more_than_what_the_manager_was_made_with(own: bool, keyword: bool) -> None:
    """It was accepted, and ignored."""
    manager = LocalManager(1, own)
    spec = manager.spec({"cookie": "c", "restrict": keyword})
    assert (spec.transport == "tcp") is not keyword and (spec.bind == "127.0.0.1") >= keyword
    assert manager.default_addprocs_params()["restrict"] is own, "without it"


@pytest.mark.parametrize("what", ["missing", "file", "closed"])
def test_a_directory_that_is_none_ends_the_launch(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers worked in the home directory instead; that is for a current directory which has vanished."""
    directory = tmp_path / what
    if what == "file":
        directory.touch()
    elif what == "closed":
        directory.mkdir()
        monkeypatch.setattr(os, "access", lambda path, mode: path != str(directory))
    monkeypatch.chdir(tmp_path)
    for given in (directory, what):
        with pytest.raises(CompositeException) as info:
            addprocs(2, dir=given)
        [error] = info.value.exceptions
        assert isinstance(error, LaunchWorkerError) and error.host == "localhost"
        assert repr(str(directory)) in str(error) and "no directory here" in str(error)


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
