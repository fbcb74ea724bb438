"""The command line that a login runs: real shells take it apart again."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from distpool.managers.ssh_command import command_line, interpreter, quote_csh, quote_wincmd, startup_variables, words

STRANGE = [
    "",
    "plain",
    "two words",
    "it's",
    'a "b"',
    "$HOME `x` $(y)",
    "\\ back\\slash\\",
    "!bang!",
    "*?[a]{b,c}~",
    "#;&|<>",
]


def parts(shell: str, command: str) -> list[str]:
    """The arguments as a program sees them that the shell starts."""
    done = subprocess.run([shell, "-c", command], capture_output=True, timeout=20, check=True)
    return done.stdout.decode().split("\0")[:-1]


@pytest.mark.parametrize(("name", "shell"), [("posix", "sh"), ("posix", "bash"), ("csh", "tcsh"), ("csh", "csh")])
def test_every_word_arrives_as_it_was(name: str, shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    program = tmp_path / "show me"
    program.write_text('#!/bin/sh\nprintf "%s\\0" "$PYTHONSTRANGE" "$@"\n')
    program.chmod(0o755)
    flags = [*STRANGE, "line\nend"]
    line = command_line(name, str(program), flags, {"PYTHONSTRANGE": "it's !me!\n$x"}, ["--end"])
    assert parts(shell, line) == ["it's !me!\n$x", *flags, "--end"]


def test_without_a_name_a_python_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sh").symlink_to("/bin/sh")
    found = tmp_path / "python3"
    found.write_text('#!/bin/sh\nprintf "%s\\0" found "$@"\n')
    found.chmod(0o755)
    line = command_line("posix", None, "-O", {"PATH": str(tmp_path)}, ["worker"])
    assert parts("sh", line.replace(sys.executable, "/no/such/python")) == ["found", "-O", "worker"]
    found.unlink()
    done = subprocess.run(["sh", "-c", line.replace(sys.executable, "/no/such/python")], capture_output=True, text=True)
    assert done.returncode == 127 and "distpool: no Python found" in done.stderr


def test_our_own_python_is_the_first_choice() -> None:
    line = command_line("posix", None, ["-c", "import sys; print(sys.executable, end=chr(0))"], {}, [])
    assert parts("sh", line) == [sys.executable]
    assert "!" not in line, "csh would take it for a reference to its history"


def test_only_what_the_start_needs_is_on_the_command_line() -> None:
    env = {"PATH": "/bin", "PYTHONHASHSEED": "0", "LC_ALL": "C", "LD_PRELOAD": "x", "TOKEN": "secret"}
    assert startup_variables(env) == {name: value for name, value in env.items() if name != "TOKEN"}
    assert "secret" not in command_line("posix", "python", (), env)


def test_windows() -> None:
    line = command_line("wincmd", "C:\\Program Files\\python.exe", ["-X", "utf8"], {"PYTHONPATH": "C:\\a & b"})
    assert line == (
        'set "PYTHONPATH=C:\\a ^& b"&& ^"C:\\Program Files\\python.exe^" -X utf8 -m distpool worker --login'
    )
    assert command_line("wincmd", None, (), {}).startswith("python -m ")


@pytest.mark.parametrize(
    ("word", "quoted"),
    [
        ("plain", "plain"),
        ("", '^"^"'),
        ("two words", '^"two words^"'),
        ('say "hi"', '^"say \\^"hi\\^"^"'),
        ("end\\ ", '^"end\\ ^"'),
        ("a b\\", '^"a b\\\\^"'),
        ("50%", '^"50^%^"'),
    ],
)
def test_words_for_windows(word: str, quoted: str) -> None:
    assert quote_wincmd(word) == quoted


def test_a_line_end_cannot_be_said_to_windows() -> None:
    with pytest.raises(ValueError, match="line end"):
        quote_wincmd("a\nb")


def test_csh_words() -> None:
    assert quote_csh("a!b") == "'a\\!b'" and quote_csh("x") == "x"


def test_words() -> None:
    assert words(None, "x") == [] and words("a b", "x") == ["a b"] and words(["a", Path("b")], "x") == ["a", "b"]
    for bad in (5, [5]):
        with pytest.raises(TypeError, match="exename must be"):
            words(bad, "exename")
    with pytest.raises(ValueError, match="exename"):
        interpreter([])
