"""What a user installs: the metadata, the files of the wheel, the entry points, and the README's two commands."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import distpool

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_one_version() -> None:
    assert distpool.__version__ == PROJECT["version"]
    assert importlib.metadata.version("distpool") == PROJECT["version"], "installed from another checkout"
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_dependencies_are_few() -> None:
    names = {re.split(r"[<>=~! ]", line)[0] for line in PROJECT["dependencies"]}
    assert names == {"cloudpickle", "paramiko", "psutil"}
    assert set(PROJECT["optional-dependencies"]) == {"bench", "progress", "test"}
    assert PROJECT["requires-python"] == ">=3.11"


def test_entry_points_lead_to_something() -> None:
    from distpool.managers.base import ClusterManager

    managers = importlib.metadata.entry_points(group="distpool.managers")
    assert set(PROJECT["entry-points"]["distpool.managers"]) <= {entry.name for entry in managers}
    for entry in managers:
        assert issubclass(entry.load(), ClusterManager), entry
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="distpool")
    assert callable(script.load())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built by the declared backend without its network-using isolation."""
    pytest.importorskip("hatchling", reason="hatchling is not installed: pip install '.[test]'")
    target = tmp_path_factory.mktemp("wheel")
    code = f"import hatchling.build as backend; print(backend.build_wheel({str(target)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(target / done.stdout.split()[-1])


def test_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "distpool").rglob("*.py")}
    assert sources <= names
    assert "distpool/py.typed" in names
    assert any(name.endswith("LICENSE") for name in names)
    folders = ("distpool/", f"distpool-{PROJECT['version']}.dist-info/")
    assert not [name for name in names if not name.startswith(folders)]


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    text = wheel.read(name).decode()
    assert "License-Expression: MIT" in text and "Requires-Python: >=3.11" in text
    assert "Requires-Dist: cloudpickle" in text


def test_sdist_holds_what_the_readme_names_and_what_the_tests_read(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="hatchling is not installed: pip install '.[test]'")
    code = f"import hatchling.build as backend; print(backend.build_sdist({str(tmp_path)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / done.stdout.split()[-1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    named = set(re.findall(r"`((?:docs|examples|compat|tests)/[\w./]+\.(?:md|py))`", README))
    assert named and named <= names, named - names
    assert {".ci/run", "LICENSE", "SECURITY.md", "docs/julia.md", "distpool/py.typed", "pyproject.toml"} <= names


def commands() -> list[str]:
    section = README.partition("## Two commands")[2].partition("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("python3 -m venv")]


def test_two_commands_do_all_the_setup() -> None:
    first, second = commands()
    assert "pip install" in first and "examples/option_pricing.py" in first
    assert "pip install" in second and "-m pytest" in second


def test_ci_runs_the_readmes_commands() -> None:
    """`.ci/run` takes the commands out of the README itself, by the rule that this test repeats."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    function = re.search(r"^readme_command\(\) \{.*?^\}", script, re.M | re.S)
    assert function
    for index, command in enumerate(commands(), 1):
        found = subprocess.run(
            ["bash", "-c", f"{function[0]}\nreadme_command {index}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        assert found.stdout.strip() == command
    assert 'ruff" check' in script and "format --check" in script and 'mypy" --strict distpool' in script


def test_console_script_and_module_print_help() -> None:
    for command in ([sys.executable, "-m", "distpool"], [str(Path(sys.executable).with_name("distpool"))]):
        done = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, done.stderr
        assert "worker" in done.stdout and "top" in done.stdout
