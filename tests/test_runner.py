"""`python -m distpool run`: the program runs as `python` would run it, with workers that are there already."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from distpool import cli

COMMAND = [sys.executable, "-m", "distpool", "run"]


def run(*arguments: Any, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=50, check=False, **more
    )


JOB = """
import atexit, os, sys
import distpool, helper

atexit.register(lambda: print("bye", distpool.nworkers(), own))
own = "name of mine"

def work(x):
    return helper.double(x) + 1

print(__name__, sys.argv[1:], os.path.basename(__file__), distpool.workers())
print(distpool.pmap(work, range(4)), distpool.remotecall_fetch(os.getcwd, 2) == os.getcwd())
print(sys.path[0] == os.path.dirname(os.path.realpath(__file__)), sys.modules["__main__"].work is work)
if "fail" in sys.argv:
    raise KeyError("mine")
sys.exit(5)
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    folder = tmp_path / "jobs"
    folder.mkdir()
    (folder / "helper.py").write_text("def double(x): return 2 * x\n")
    (folder / "job.py").write_text(JOB)
    return folder / "job.py"


EXPECTED = ["[1, 3, 5, 7] True", "True True", "bye 2 name of mine"]


def test_a_script_with_workers(job: Path, tmp_path: Path) -> None:
    done = run("-p", 2, "jobs/job.py", "-p", "3", "--x", "--", "y", cwd=tmp_path)
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["__main__ ['-p', '3', '--x', '--', 'y'] job.py [2, 3]", *EXPECTED]
    assert done.returncode == 5


SURROUNDINGS = """
import os, sys
def f(x: int): pass
os.chdir("..")
print(f.__annotations__, type(__builtins__), __name__, __spec__, sys.argv)
print(f.__code__.co_filename, globals().get("__file__"))
"""


def test_what_a_script_sees_of_itself_is_as_usual(tmp_path: Path) -> None:
    folder = tmp_path / "jobs"
    folder.mkdir()
    (folder / "job.py").write_text(SURROUNDINGS)
    for arguments in (["job.py", "a"], ["-c", SURROUNDINGS, "a"]):
        command = [sys.executable, *arguments]
        usual = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=50, check=True)
        done = run(*arguments, cwd=folder)
        assert (done.stdout, done.stderr) == (usual.stdout, "")
        assert "<class 'int'>" in usual.stdout


def test_an_uncaught_exception_looks_as_usual(job: Path) -> None:
    done = run("-p", "2", job, "fail")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == EXPECTED[-1]
    lines = done.stderr.splitlines()
    assert lines[0] == "Traceback (most recent call last):" and lines[-1] == "KeyError: 'mine'"
    assert lines[1] == f'  File "{job}", line 15, in <module>', "no frame of ours"


@pytest.mark.parametrize(
    ("code", "status"),
    [("", 0), ("import sys; sys.exit()", 0), ("import sys; sys.exit(3)", 3), ("import sys; sys.exit('no')", 1)],
)
def test_exit_statuses(code: str, status: int) -> None:
    done = run("-c", code)
    assert done.returncode == status
    assert done.stderr == ("no\n" if "no" in code else "")


def test_code_and_module(tmp_path: Path) -> None:
    done = run("-p", 1, "-c", "import sys, distpool; print(sys.argv, distpool.workers(), repr(sys.path[0]))", "a", "-m")
    assert done.stdout == "['-c', 'a', '-m'] [2] ''\n", done.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").touch()
    (tmp_path / "mine" / "__main__.py").write_text(
        "import sys, distpool\nfrom . import other\nprint(__name__, __package__, sys.argv[1:], other.x)\n"
        "print(distpool.fetch_any(lambda: other.x + 1))\n"
    )
    (tmp_path / "mine" / "other.py").write_text("x = 41\n")
    done = run("-p", 1, "-m", "mine", "-c", "b", cwd=tmp_path)
    assert done.stdout == "__main__ mine ['-c', 'b'] 41\n42\n", done.stderr
    done = run("-m", "no.such.module")
    assert done.returncode == 1 and "No module named" in done.stderr


REST = ["-p", "3", "--", "y", "-o", "--help", "-m", "-c", "--hosts=a", "-", ""]


def test_whatever_follows_the_program_is_its_own(tmp_path: Path) -> None:
    """argparse of each Python has its own idea of `--` among what remains."""
    show = "import sys; print(sys.argv[1:])"
    (tmp_path / "modx.py").write_text(show)
    for program in (["-c", show], ["-c" + show], ["-m", "modx"], ["-mmodx"], ["modx.py"], ["--", "modx.py"]):
        for rest in (REST, ["--", "b"], ["--"]):
            done = run(*program, *rest, cwd=tmp_path)
            assert (done.stdout, done.stderr) == (f"{rest}\n", ""), program


@pytest.mark.parametrize(
    ("words", "at"),
    [
        ("-p 3 x.py", 2),
        ("-p3 x.py", 1),
        ("--procs 3 --machine-file=f --hosts -c x.py", 5),
        ("--proc=3 -", 1),
        ("-h x.py", 1),
        ("--help x.py", 1),
        ("-o a=b -o -m -cx", 4),
        ("-p", 1),
        ("-p 3", 2),
        ("", 0),
    ],
)
def test_where_the_program_begins(words: str, at: int) -> None:
    split = ["run", *words.split()]
    assert cli._program_at(split) == at + 1


def test_a_folder_and_an_archive(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "__main__.py").write_text("import sys, beside; print(__name__, beside.x, sys.argv[1:])\n")
    (folder / "beside.py").write_text("x = 7\n")
    archive = tmp_path / "app.pyz"
    with zipfile.ZipFile(archive, "w") as file:
        for path in folder.iterdir():
            file.write(path, path.name)
    for target in (folder, archive):
        done = run("-p", 1, target, "z")
        assert done.stdout == "__main__ 7 ['z']\n", done.stderr


def test_without_workers() -> None:
    done = run("-c", "import distpool; print(distpool.procs())")
    assert done.stdout == "[1]\n" and done.stderr == ""


def test_auto_and_options() -> None:
    code = "import distpool, os; print(distpool.nworkers(), distpool.fetch_any(os.getenv, 'COLOUR'))"
    done = run("-p", "auto", "-o", "env={'COLOUR': 'red'}", "-c", code)
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert done.stdout == f"{count} red\n", done.stderr


def test_an_interrupted_program() -> None:
    """Ctrl-C ends it as it ends a program of python's: by the signal, with one traceback."""
    code = "import time, distpool; print(distpool.workers(), flush=True); time.sleep(60)"
    with subprocess.Popen([*COMMAND, "-p", "1", "-c", code], stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "[2]\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode in (-signal.SIGINT, 130)
    assert errors.count("KeyboardInterrupt") == 1


def test_bad_usage(tmp_path: Path) -> None:
    for arguments, message in [
        ((), "a script, -m MODULE or -c CODE is needed"),
        (("-p", "0", "-c", ""), "not a number of workers: '0'"),
        (("-p", "2", "--hosts", "a", "-c", ""), "not allowed with"),
        (("--machine-file", tmp_path / "none", "-c", ""), "no such file"),
        (("--hosts", "a:b:c", "-c", ""), "not a machine spec"),
        (("-o", "foo", "-c", ""), "not NAME=VALUE"),
        (("-o", "foo=1", "-c", ""), "-p, --machine-file or --hosts is needed"),
    ]:
        done = run(*arguments)
        assert done.returncode == 2 and message in done.stderr, done.stderr
    done = run("-p", 1, tmp_path / "nothing.py")
    assert done.returncode == 2 and "no such file" in done.stderr
    done = run("-p", 1, "-o", "foo=1", "-c", "")
    assert done.returncode == 1 and done.stderr == "distpool: Invalid keyword argument foo\n"


def test_a_program_from_the_standard_input() -> None:
    code = "import sys, distpool\ndef f(x): return -x\n"
    code += "print(sys.argv, sys.path[0], distpool.pmap(f, [1, 2]), '__file__' in dir())"
    found = run("-p", 1, "-", "a", "-b", input=code)
    assert (found.stdout, found.stderr, found.returncode) == ("['-', 'a', '-b']  [-1, -2] False\n", "", 0)
    found = run("-", input="1 / 0\n")
    assert found.returncode == 1 and 'File "<stdin>", line 1, in <module>' in found.stderr
    assert "runner.py" not in found.stderr


def test_machine_files_that_name_no_machine(tmp_path: Path) -> None:
    path = tmp_path / "machines"
    for content, message in [
        (b"# none\n", "no machine in this file\n"),
        (b"h\xe4st\n", "this file is no UTF-8 text: 'utf-8' codec can't decode byte 0xe4"),
    ]:
        path.write_bytes(content)
        for words in (["run", "--machine-file", path, "-c", "print(5)"], ["hosts", path]):
            found = subprocess.run([*COMMAND[:-1], *map(str, words)], capture_output=True, text=True, timeout=50)
            assert (found.returncode, found.stdout) == (1, "")
            assert found.stderr.startswith(f"distpool: {path}: {message}"), found.stderr


def test_a_syntax_error(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("x = (\n")
    done = run("-p", 1, path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == f'  File "{path}", line 1'
    assert "SyntaxError" in done.stderr and "runner.py" not in done.stderr


@pytest.mark.leaves_processes("the shell that removes the launcher's directory at the end of this program")
def test_workers_that_do_not_come() -> None:
    done = run("-p", 2, "-o", "exename=/bin/false", "-c", "print('not reached')")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "distpool: could not launch worker on localhost: the zygote process ended with code 1\n"
