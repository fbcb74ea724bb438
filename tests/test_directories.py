"""The private directory: where it may be, how it is made, and whose it must be."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from distpool import directories


@pytest.fixture(autouse=True)
def fresh_tempdir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)


def test_a_chosen_name_is_new_and_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    names = {directories.choose() for _ in range(100)}
    assert len(names) == 100
    assert os.listdir(tmp_path) == []


def test_a_long_path_has_no_room_for_a_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 80)
    deep.mkdir()
    monkeypatch.setenv("TMPDIR", str(deep))
    chosen = directories.choose()
    assert os.path.dirname(chosen) == "/tmp"
    assert len(os.path.join(chosen, directories.LONGEST_NAME)) < directories.SUN_PATH


def test_no_place_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert directories.choose() == ""

    def nowhere() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    assert directories.choose() == ""


def test_made_for_us_alone_and_by_whoever_comes_first(tmp_path: Path) -> None:
    path = str(tmp_path / "private")
    assert directories.make(path)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o700
    assert directories.make(path)  # a second zygote of the same program


@pytest.mark.parametrize("what", ["open to others", "a link", "a file", "no parent"])
def test_what_is_not_ours_alone_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "private"
    if what == "open to others":
        path.mkdir(mode=0o755)
    elif what == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        path.symlink_to(tmp_path / "elsewhere")
    elif what == "a file":
        path.touch(mode=0o600)
    else:
        path = tmp_path / "nowhere" / "private"
    assert not directories.make(str(path))


def test_the_usual_place_is_that_of_tempfile_and_found_without_it(tmp_path: Path) -> None:
    source = """if True:
        import os, sys
        from distpool import directories
        found = directories._usual()
        assert "tempfile" not in sys.modules
        import tempfile
        assert found == os.path.abspath(tempfile.gettempdir()), found
    """
    wanted = {"TMPDIR": str(tmp_path)}, {"TMPDIR": "", "TEMP": str(tmp_path)}, {"TMPDIR": "", "TEMP": "", "TMP": ""}
    for env in wanted:
        subprocess.run([sys.executable, "-c", source], check=True, timeout=60, env={**os.environ, **env})


def test_tempfile_that_is_loaded_is_asked_only_for_what_it_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would try the place with a file, and a program that is killed just then leaves that behind."""

    def tried() -> str:
        raise AssertionError("it looks for a place")

    monkeypatch.setattr(tempfile, "gettempdir", tried)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert directories._usual() == str(tmp_path)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/tmp")
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    assert directories._usual() == "/tmp", "what the program has set"


def test_a_usual_place_that_is_not_there(tmp_path: Path) -> None:
    source = "from distpool import directories; print(directories.choose())"
    env = {**os.environ, "TMPDIR": str(tmp_path / "gone")}
    done = subprocess.run(
        [sys.executable, "-c", source], check=True, timeout=60, env=env, capture_output=True, text=True
    )
    assert os.path.isdir(os.path.dirname(done.stdout.strip()))


def test_removed_with_its_sockets(tmp_path: Path) -> None:
    path = tmp_path / "private"
    assert directories.make(str(path))
    (path / "1.sock").touch()
    directories.remove(str(path))
    assert not path.exists()
    directories.remove(str(path))  # gone already
    (path / "deep").mkdir(parents=True)
    directories.remove(str(path))  # not ours: stays
    assert path.exists()
