"""What a login is told, and by which bytes, without SSH: its streams are pipes of ours."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distpool.managers import archive, bootstrap, unpacking
from distpool.managers.login_protocol import LOGIN_ARGUMENTS, EventReader, LoginSettings
from distpool.managers.ssh_command import command_line

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

SETTINGS = LoginSettings(cookie="secret", bind="127.0.0.1", site="localhost")


def parcels_of(mode: Any, ship: Any) -> bootstrap.Parcels:
    return bootstrap.parcels(mode, *archive.wishes(ship))


class Host:
    """A login to a host whose home is `home`."""

    def __init__(self, home: Path, python: list[str], parcels: bootstrap.Parcels, *arguments: str) -> None:
        home.mkdir(exist_ok=True)
        env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XDG_CACHE_HOME")}
        self.process = subprocess.Popen(
            [*python, *bootstrap.arguments([*LOGIN_ARGUMENTS, *arguments])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            cwd=home,
            env={**env, "HOME": str(home)},
        )
        self.parcels = parcels
        self.reader = EventReader()
        self.waiting: list[dict[str, Any]] = []

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()

    def write(self, data: bytes, size: int = 1 << 20) -> None:
        assert self.process.stdin is not None
        for begin in range(0, len(data), size):
            self.process.stdin.write(data[begin : begin + size])

    def next(self) -> dict[str, Any]:
        assert self.process.stdout is not None and self.process.stderr is not None
        while not self.waiting:
            data = self.process.stdout.read(65536)
            if not data:
                raise AssertionError(f"it ended: {self.process.stderr.read().decode()}")
            self.waiting += [event for event, _ in self.reader.feed(data)]
        return self.waiting.pop(0)


BARE = [sys.executable, "-S", "-E"]


def test_a_bare_python_asks_for_what_it_misses(tmp_path: Path) -> None:
    parcels = parcels_of("auto", ())
    with Host(tmp_path / "home", BARE, parcels) as host:
        host.write(parcels.feed() + SETTINGS.to_line())
        assert host.next() == {"wants": [parcels.base]}
        host.write(parcels.parcel(str(parcels.base)) + b'{"kill": 0, "signal": 9}\n')
        assert host.next()["ospid"] == host.process.pid
        assert host.next()["worker"] == 0 and host.next() == {"exited": 0, "status": -9}
        assert host.process.wait(10) == 0
    with Host(tmp_path / "home", BARE, parcels) as host:
        host.write(parcels.feed() + SETTINGS.to_line())
        assert "address" in host.next(), "now it is there"


def test_in_small_pieces(tmp_path: Path) -> None:
    parcels = parcels_of("auto", ())
    with Host(tmp_path / "home", BARE, parcels) as host:
        host.write(parcels.feed() + SETTINGS.to_line(), 1000)
        assert "wants" in host.next()
        host.write(parcels.parcel(str(parcels.base)), 7777)
        assert "address" in host.next()


def test_a_python_that_has_it_asks_for_nothing(tmp_path: Path) -> None:
    parcels = parcels_of("auto", ())
    with Host(tmp_path / "home", [sys.executable], parcels) as host:
        host.write(parcels.feed() + SETTINGS.to_line())
        assert "address" in host.next()
    assert not (tmp_path / "home" / ".cache").exists()


def test_the_cookie_of_the_command_line(tmp_path: Path) -> None:
    parcels = parcels_of("auto", ())
    with Host(tmp_path / "home", [sys.executable], parcels, "--worker=secret") as host:
        host.write(parcels.feed() + LoginSettings(bind="127.0.0.1").to_line())
        assert "address" in host.next()


@pytest.mark.parametrize("end", ["before", "prelude", "archive"])
def test_a_master_that_goes_away(tmp_path: Path, end: str) -> None:
    parcels = parcels_of("auto", ())
    home = tmp_path / "home"
    with Host(home, BARE, parcels) as host:
        assert host.process.stdin is not None
        if end == "prelude":
            host.write(parcels.feed()[:500])
        elif end == "archive":
            host.write(parcels.feed() + SETTINGS.to_line())
            host.next()
            host.write(parcels.parcel(str(parcels.base))[:20000])
        host.process.stdin.close()
        assert host.process.wait(10) == 1
    assert not list(home.glob(".cache/distpool/*"))


def test_another_minor_version(tmp_path: Path) -> None:
    parcels = parcels_of("auto", ())
    feed = parcels.feed().replace(json.dumps(list(sys.version_info[:2])).encode(), b"[9, 99]")
    with Host(tmp_path / "home", [sys.executable], parcels) as host:
        host.write(feed + SETTINGS.to_line())
        version = ".".join(map(str, sys.version_info[:3]))
        assert host.next() == {"mismatch": version, "program": sys.executable}
        assert host.process.wait(10) == 1


def test_old_pythons_can_say_that_they_are_the_wrong_ones(tmp_path: Path) -> None:
    found = sorted(Path.home().glob(".pyenv/versions/[23].*/bin/python"))
    old = [path for path in found if path.parent.parent.name.startswith(("2.7", "3.6", "3.8"))]
    if not old:
        pytest.skip("needs old Pythons below ~/.pyenv/versions")
    parcels = parcels_of("auto", ())
    for python in old:
        with Host(tmp_path / "home", [str(python)], parcels) as host:
            host.write(parcels.feed() + SETTINGS.to_line())
            assert host.next()["mismatch"] == python.parent.parent.name


def test_packages_come_first(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("")
    parcels = parcels_of(False, [tmp_path / "mine.py"])
    assert parcels.base is None and parcels and not parcels_of(False, ())
    with Host(tmp_path / "home", [sys.executable], parcels) as host:
        host.write(parcels.feed() + SETTINGS.to_line())
        assert host.next() == {"wants": parcels.ship}
        host.write(parcels.parcel(parcels.ship[0]))
        assert "address" in host.next()
    assert (tmp_path / "home" / ".cache" / "distpool" / parcels.ship[0] / "mine.py").exists()
    with pytest.raises(ValueError, match="was not offered"):
        parcels.parcel("0" * 40)


def test_versions_are_read_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    assert unpacking.version_of("no_such_package_here") == ""
    for name, text in [("has_one", "raise SystemExit\n__version__ = '1.2'\n"), ("has_none", "x = 1\n")]:
        (tmp_path / f"{name}.py").write_text(text)
    assert unpacking.version_of("has_one") == "1.2" and unpacking.version_of("has_none") == ""


def test_the_code_of_a_package_wherever_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = set()
    for place, text in [("one", "x = 1\n"), ("two", "x = 1\n"), ("three", "x = 2\n")]:
        package = tmp_path / place / f"parted_{place}" / "inner"
        package.mkdir(parents=True)
        (package.parent / "__init__.py").touch()
        (package / "__init__.py").touch()
        (package / "mod.py").write_text(text)
        (package / "notes.txt").write_text(place)
        monkeypatch.syspath_prepend(tmp_path / place)
        code = unpacking.code_of(f"parted_{place}")
        assert len(code) == 64
        found.add(code)
    assert len(found) == 2
    assert unpacking.code_of("no_such_package_here") == ""


def test_arguments_that_cannot_be() -> None:
    for wrong in ("yes", None, "False"):
        with pytest.raises(ValueError, match="bootstrap must be 'auto', True or False"):
            bootstrap.check(wrong)
    for fine in ("auto", True, False):
        bootstrap.check(fine)


# -- command lines -----------------------------------------------------------------------------------------------


def test_every_shell_can_say_it() -> None:
    arguments = bootstrap.arguments(LOGIN_ARGUMENTS)
    assert arguments == ["-c", bootstrap.LOADER, "distpool", "worker", "--login"], "as `ps` shows it"
    assert not set(bootstrap.LOADER) & set("!$%`\\\n\r'^&<>")
    posix = command_line("posix", "python3", (), {}, arguments)
    assert shlex.split(posix) == ["exec", "env", "python3", *arguments]
    assert command_line("csh", "python3", (), {}, arguments) == posix
    wincmd = command_line("wincmd", "python", (), {}, arguments)
    assert wincmd.startswith('python -c ^"import os;g=lambda n,b=b\\^"\\^":b ') and wincmd.endswith("worker --login")


def test_what_is_sent_does_not_depend_on_the_package() -> None:
    """The text runs where nothing else of distpool is."""
    source = Path(str(unpacking.__file__)).read_text()
    assert "import distpool" not in source and "from distpool" not in source
    assert archive.own().digest == parcels_of("auto", ()).base
