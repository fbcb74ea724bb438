"""Every example runs as a user runs it, ends in time and prints what it claims; so does every block of the README."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ssh.sshd import ADDRESSES, Server, missing

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MAX_LINES = 80


def run(*arguments: str | Path, cwd: Path = ROOT, seconds: float = 50) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=seconds,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, f"{pattern!r} is not in:\n{text}"
    return float(found[1].replace(",", ""))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_short_and_explained(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < MAX_LINES
    assert text.startswith('"""') and f"python examples/{path.name}" in text, "the first lines say how to run it"


def test_every_example_has_a_test() -> None:
    here = Path(__file__).read_text(encoding="utf-8")
    assert EXAMPLES
    assert not [path.name for path in EXAMPLES if f'"{path.name}"' not in here]


@pytest.mark.parametrize("with_numpy", [True, False], ids=["as installed", "without numpy"])
def test_option_pricing(with_numpy: bool, tmp_path: Path) -> None:
    """The price is within four standard errors of the closed formula, and one process's to the last digit."""
    script = ROOT / "examples" / "option_pricing.py"
    if not with_numpy:
        text = script.read_text(encoding="utf-8")
        assert "    import numpy\n" in text
        script = tmp_path / "without.py"
        script.write_text(text.replace("    import numpy\n", "    raise ImportError\n"))
    done = run(script, "--paths", "640000", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    price, exact = number(r"Monte Carlo +([\d.]+)", done.stdout), number(r"Black-Scholes +([\d.]+)", done.stdout)
    error = number(r"\+- ([\d.]+)", done.stdout)
    assert exact == pytest.approx(9.1218, abs=1e-3)
    assert 0 < error < 0.1 and abs(price - exact) < 4 * error
    assert "same digits    yes" in done.stdout
    assert number(r"([\d.]+) times as fast", done.stdout) > 0


@pytest.mark.time_limit(150)  # in a new environment this process and each worker compile all of scikit-learn
def test_parameter_sweep() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install '.[test]'")
    done = run(ROOT / "examples" / "parameter_sweep.py", "--folds", "2", "--workers", "2", seconds=100)
    assert done.returncode == 0, done.stderr
    assert re.search(r"36 candidates, 9 refused", done.stdout)
    assert "ProcessExitedException" in done.stdout and "ConnectionError: the data server" in done.stdout
    assert done.stdout.count("InvalidParameterError: The 'C' parameter of") == 9
    assert number(r"the best:\n +(0\.\d+)", done.stdout) > 0.9
    assert done.stderr == "" or "Worker" in done.stderr, done.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(30):
        (tmp_path / f"{index}.txt").write_text("apple banana apple\n" * (index + 1))
    (tmp_path / "copy.txt").write_text("apple banana apple\n")
    (tmp_path / "missing.txt").symlink_to("nowhere")
    return tmp_path


def test_folder_processing(folder: Path) -> None:
    done = run(ROOT / "examples" / "folder_processing.py", folder, "--pattern", "*.txt", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert "32 files, 8,854 bytes" in done.stdout
    assert "1 are copies of another" in done.stdout
    assert "apple 932, banana 466" in done.stdout
    assert done.stdout.count("not read:") == 1 and "missing.txt: No such file" in done.stdout
    assert "32/32" in done.stderr, "the progress bar stands on stderr and reaches its end"


def test_folder_processing_on_the_library() -> None:
    done = run(ROOT / "examples" / "folder_processing.py", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert number(r"^([\d,]+) files", done.stdout) > 100
    assert "broken.py: No such file" in done.stdout


def test_job_queue() -> None:
    done = run(ROOT / "examples" / "job_queue.py", "--jobs", "12", "--workers", "2")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    shares = [int(share) for share in re.findall(r"(\d+) by worker", done.stdout)]
    assert len(shares) == 2 and sum(shares) == 12
    assert "longest way to 1: 267 steps, from 10971" in done.stdout and "checked:" in done.stdout


def test_word_count(tmp_path: Path) -> None:
    for index in range(7):
        (tmp_path / f"{index}.txt").write_text("apple banana apple x1\n" * (index + 1))
    done = run(ROOT / "examples" / "word_count.py", tmp_path, "--pattern", "*.txt", "--workers", "3")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "7 files, 84 words, 2 different ones" in done.stdout
    assert "apple 56, banana 28" in done.stdout and "checked:" in done.stdout
    done = run(ROOT / "examples" / "word_count.py", "--workers", "2")
    assert done.returncode == 0 and number(r"([\d,]+) words", done.stdout) > 10_000, done.stderr


def test_parameter_server() -> None:
    done = run(ROOT / "examples" / "parameter_server.py", "--workers", "2")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert number(r"y = ([\d.]+) x", done.stdout) == pytest.approx(2.5, abs=0.05)
    assert number(r"x ([-+\d.]+) after", done.stdout) == pytest.approx(-1.0, abs=0.05)
    assert "after 400 gradients" in done.stdout and "checked:" in done.stdout


@pytest.mark.parametrize("workers", ["1", "2", "3"])
def test_heat_equation(workers: str) -> None:
    done = run(ROOT / "examples" / "heat_equation.py", "--cells", "90", "--steps", "100", "--workers", workers)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert number(r"hottest cell ([\d.]+)", done.stdout) == pytest.approx(59.7718, abs=1e-4)
    assert "checked:" in done.stdout


@pytest.mark.parametrize("name", ["unix_socket", "broker"])
def test_transports(name: str) -> None:
    """tests/conformance runs its cases over them (fixture `w`); here they run as programs, and stay short."""
    if name == "broker":
        pytest.importorskip("zmq", reason="pyzmq is not installed: pip install '.[test]'")
    done = run(ROOT / "examples" / "transports" / f"{name}.py")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "[2, 3, 4]" in done.stdout and done.stdout.endswith("[3, 4, 2]\n")


def test_transports_are_short_and_explained() -> None:
    for path in (ROOT / "examples" / "transports").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) < 150 and text.startswith('"""'), path


@pytest.fixture
def ssh_server(tmp_path: Path) -> Iterator[Server]:
    if missing():
        pytest.skip(missing())
    server = Server(tmp_path / "sshd")
    yield server
    server.stop()


def test_many_hosts(ssh_server: Server) -> None:
    """Two logins to this machine (four where loopback has so many addresses), one of which is lost half-way."""
    hosts = [f"host{number}" for number in range(1, len(ADDRESSES) + 1)]
    config = ["--ssh-config", ssh_server.config, "--python", sys.executable]
    done = run(ROOT / "examples" / "many_hosts.py", *config, *(hosts if len(hosts) > 1 else hosts * 2))
    assert done.returncode == 0, done.stderr
    assert "664,579 primes below 10,000,000" in done.stdout
    assert "the machine of worker" in done.stdout
    assert sum(map(int, re.findall(r"\d+: (\d+)", done.stdout.splitlines()[-1]))) == 40, "each piece counted once"
    assert re.fullmatch(r"(Worker \d+ terminated\.\n)*", done.stderr), done.stderr


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("index", range(len(blocks())))
def test_readme_blocks_run(index: int, tmp_path: Path) -> None:
    """Each Python block of the README is a program of its own and does what its comments say (by assert)."""
    script = tmp_path / "block.py"
    script.write_text(blocks()[index])
    done = run(script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
