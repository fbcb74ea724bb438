"""`python -m distpool`: all commands, and the one that every login runs without loading the others."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from distpool import __main__ as program
from distpool import cli, login


@pytest.mark.parametrize("status", [0, 1])
def test_commands(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["distpool", "top", "x"])
    monkeypatch.setattr(cli, "main", lambda: status)
    with pytest.raises(SystemExit) as caught:
        program.main()
    assert caught.value.code == status


@pytest.mark.parametrize("argv", [["worker"], ["worker", "--login", "x"], ["worker", "--login=x"], []])
def test_only_the_very_words_of_a_login_are_one(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_login(given: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(sys, "argv", ["distpool", *argv])
    monkeypatch.setattr(login, "main", no_login)
    monkeypatch.setattr(cli, "main", lambda: 7)
    with pytest.raises(SystemExit) as caught:
        program.main()
    assert caught.value.code == 7


def test_a_login_loads_no_commands() -> None:
    code = (
        "import sys; sys.argv[1:] = ['worker', '--login']\n"
        "from distpool import __main__, login\n"
        "def main(given):\n"
        "    print(given, sorted({'distpool.cli', 'argparse'} & set(sys.modules)))\n"
        "    raise SystemExit(3)\n"
        "login.main = main; __main__.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "None []\n", "")
