"""What local workers are started with: command, environment, import path; as the local manager's order has them."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from distpool.managers import command
from distpool.managers.local import LocalManager
from distpool.managers.surroundings import BLAS_VARIABLES


def spec_of(**params: Any) -> Any:
    return LocalManager(1).spec({"cookie": "c", **params})


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


def test_our_own_interpreter_gets_the_options_of_this_program() -> None:
    code = "from distpool.managers.command import command; print(command(None, ['-B'])[0][1:])"
    argv = [sys.executable, "-O", "-W", "error", "-X", "dev", "-c", code]
    flags = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    assert flags.index("-O") < flags.index("-Werror") < flags.index("dev") < flags.index("-B")
    assert command.command(["/usr/bin/other"], "-B") == (["/usr/bin/other", "-B"], True)


def test_pairs() -> None:
    assert command.pairs(None) == {} == command.pairs([])
    assert command.pairs({"A": Path("/x")}) == {"A": "/x"} == command.pairs(iter([("A", "/x")]))


def test_entries_that_are_no_texts_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [Path("/a"), "/b"])
    assert command.import_path({}, foreign=False, moved=False) == ["/b"]


def test_a_directory_that_only_begins_like_ours_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    stdlib = sysconfig.get_path("stdlib")
    monkeypatch.setattr(sys, "path", [stdlib, stdlib + "-more", os.path.join(stdlib, "sub")])
    assert command.import_path({}, foreign=True, moved=False) == [stdlib + "-more"]
