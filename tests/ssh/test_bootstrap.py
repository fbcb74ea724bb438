"""Hosts that have nothing but a Python (CONFORMANCE 2.20; API section 4, `bootstrap` and `ship`)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import distpool
from distpool import LaunchWorkerError, addprocs, remotecall_fetch, rmprocs
from distpool.hostcheck import check_hosts

from .sshd import Server, missing, options
from .test_failures import with_shell
from .test_ssh import wait_until

Start = Callable[..., list[int]]


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python of our version without any package."""
    place = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True, timeout=60)
    return str(place / "bin" / "python")


class Home:
    """The home directory of who logs in."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(exist_ok=True)
        self.cache = path / ".cache" / "distpool"

    @property
    def env(self) -> dict[str, str]:
        return {"HOME": str(self.path), "XDG_CACHE_HOME": ""}

    def archives(self) -> list[str]:
        return sorted(entry.name for entry in self.cache.iterdir()) if self.cache.exists() else []


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def start(server: Server, ssh: Any, bare: str, home: Home) -> Iterator[Start]:
    """`addprocs` with the bare Python; removes the workers afterwards."""

    def make(machines: Any = ("host1",), **more: Any) -> list[int]:
        given = {"exename": bare, **more, "env": {**home.env, **more.get("env", {})}}
        return addprocs(list(machines), **options(server, ssh, **given))

    yield make
    rmprocs(distpool.procs()[1:])


def error_of(call: Callable[[], object]) -> LaunchWorkerError:
    with pytest.raises(distpool.CompositeException) as info:
        call()
    (error,) = info.value.exceptions
    assert isinstance(error, LaunchWorkerError)
    print(error)
    return error


# By value: this module is on no other host.
where = lambda name: str(__import__("importlib").import_module(name).__file__)


# -- distpool ----------------------------------------------------------------------------------------------------


def test_a_bare_python_runs_workers(start: Start, home: Home) -> None:
    pids = start([("host1", 2)])
    assert [remotecall_fetch(lambda a: a + 1, pid, 41) for pid in pids] == [42, 42]
    place = str(home.cache)
    assert remotecall_fetch(where, pids[0], "distpool").startswith(place)
    assert remotecall_fetch(where, pids[0], "cloudpickle").startswith(place)
    for name in ("psutil", "paramiko"):
        with pytest.raises(distpool.RemoteException, match="No module named"):
            remotecall_fetch(where, pids[0], name)
    for path in (home.cache, *home.cache.iterdir()):
        assert path.stat().st_mode & 0o777 == 0o700
    assert len(home.archives()) == 1


def test_with_everything_that_uses_workers(start: Start) -> None:
    pids = start([("host1", 2)])
    assert distpool.pmap(lambda a: a * a, range(20)) == [a * a for a in range(20)]
    assert remotecall_fetch(lambda: remotecall_fetch(os.getpid, pids[1]), pids[0]) == remotecall_fetch(
        os.getpid, pids[1]
    )
    rows = distpool.stats()
    assert {row["pid"] for row in rows} >= set(pids), "without psutil there, too"
    assert all(row["memory"] > 1 << 20 for row in rows if row["pid"] in pids)
    assert "MainThread" in str(distpool.dump_stacks(pids))


def test_it_is_sent_once(start: Start, home: Home) -> None:
    rmprocs(start())
    (name,) = home.archives()
    inode = (home.cache / name).stat().st_ino
    rmprocs(start())
    assert home.archives() == [name] and (home.cache / name).stat().st_ino == inode


def test_an_executor_on_a_bare_python(server: Server, ssh: Any, bare: str, home: Home) -> None:
    given = options(server, ssh, exename=bare, env=home.env)
    with distpool.ClusterExecutor([("host1", 2), "host2"], **given) as executor:
        assert list(executor.map(lambda a: -a, range(10))) == [-a for a in range(10)]
        with pytest.raises(distpool.ProcessExitedException):
            executor.submit(lambda: os._exit(3)).result(30)
        assert executor.submit(os.getenv, "HOME").result(30) == str(home.path)
        assert all(row["pid"] for row in executor.stats())


def test_an_installed_distpool_is_used(server: Server, ssh: Any, home: Home) -> None:
    (pid,) = addprocs(["host1"], **options(server, ssh, env=home.env))
    assert not remotecall_fetch(where, pid, "distpool").startswith(str(home.path)) and not home.archives()
    rmprocs(pid)
    (pid,) = addprocs(["host1"], **options(server, ssh, env=home.env, bootstrap=True))
    assert remotecall_fetch(where, pid, "distpool").startswith(str(home.cache))
    rmprocs(pid)


def test_another_version_is_not_used(start: Start, home: Home, tmp_path: Path) -> None:
    old = tmp_path / "old" / "distpool"
    old.mkdir(parents=True)
    (old / "__init__.py").write_text('__version__ = "0.0.1"\n')
    (pid,) = start(env={"PYTHONPATH": str(old.parent)})
    assert remotecall_fetch(where, pid, "distpool").startswith(str(home.cache))


def test_the_same_version_of_another_checkout_is_not_used(server: Server, ssh: Any, home: Home, tmp_path: Path) -> None:
    other = tmp_path / "other" / "distpool"
    shutil.copytree(Path(distpool.__file__).parent, other, ignore=shutil.ignore_patterns("__pycache__"))
    env = {**home.env, "PYTHONPATH": str(other.parent)}
    (pid,) = addprocs(["host1"], **options(server, ssh, env=env))
    assert remotecall_fetch(where, pid, "distpool").startswith(str(other.parent))
    rmprocs(pid)
    with (other / "worker.py").open("a") as file:
        file.write("\n# changed\n")
    (pid,) = addprocs(["host1"], **options(server, ssh, env=env))
    assert remotecall_fetch(where, pid, "distpool").startswith(str(home.cache))
    rmprocs(pid)


def test_the_report_of_a_bare_host(server: Server, ssh: Any, bare: str, home: Home) -> None:
    (report,) = check_hosts(["host1"], options(server, ssh, exename=bare, env=home.env), 30)
    assert report.error == "" and report.distpool == distpool.__version__ and bare in report.python
    assert report.memory > report.free > 0 and report.cores > 0


def test_without_bootstrap_it_is_missing(start: Start, home: Home) -> None:
    error = error_of(lambda: start(bootstrap=False))
    assert "distpool is not installed for the Python there" in str(error) and "bootstrap" in str(error)
    error = error_of(lambda: start(bootstrap=False, ship=["tests.ssh"]))
    assert "distpool is not installed for the Python there" in str(error)


def test_another_minor_version(start: Start) -> None:
    here = ".".join(map(str, sys.version_info[:2]))
    others = [path for path in Path.home().glob(".pyenv/versions/*/bin/python") if f"/{here}." not in str(path)]
    if not others:
        pytest.skip("needs other versions of Python below ~/.pyenv/versions")
    for other in others:
        error = error_of(lambda: start(exename=str(other), timeout=30))  # noqa: B023
        version = other.parent.parent.name
        assert version in str(error) and ".".join(map(str, sys.version_info[:3])) in str(error)
        assert "the same minor version" in str(error) and isinstance(error.__cause__, distpool.VersionMismatchError)


# -- shells and logins -------------------------------------------------------------------------------------------


def test_csh(ssh: Any, bare: str, home: Home, tmp_path: Path) -> None:
    if missing() or shutil.which("tcsh") is None:
        pytest.skip(missing() or "needs tcsh (Debian: apt-get install tcsh)")
    csh = Server(tmp_path / "sshd", 'ForceCommand exec tcsh -c "$SSH_ORIGINAL_COMMAND"')
    try:
        (pid,) = addprocs(["host1"], **options(csh, ssh, shell="csh", exename=bare, env=home.env))
        assert remotecall_fetch(where, pid, "distpool").startswith(str(home.cache))
        rmprocs(pid)
    finally:
        csh.stop()


def test_shells_that_print(ssh: Any, bare: str, home: Home, tmp_path: Path) -> None:
    if missing():
        pytest.skip(missing())
    server = with_shell(tmp_path / "h", "for i in $(seq 500); do echo Welcome $i; done; printf 'no end'")
    try:
        for _ in range(2):
            (pid,) = addprocs(["host1"], **options(server, ssh, exename=bare, env=home.env))
            assert remotecall_fetch(abs, pid, -1) == 1
            rmprocs(pid)
    finally:
        server.stop()


def test_many_logins_at_once(start: Start, home: Home) -> None:
    pids = start(["127.0.0.1", "127.0.0.2", "127.0.0.3", "host1", "host2", "host3"])
    assert len(pids) == 6 and len(home.archives()) == 1
    assert [remotecall_fetch(abs, pid, -1) for pid in pids] == [1] * 6


def test_the_cookie_of_the_command_line(start: Start) -> None:
    (pid,) = start(cmdline_cookie=True)
    assert remotecall_fetch(abs, pid, -1) == 1


def test_through_a_tunnel(start: Start) -> None:
    (pid,) = start(tunnel=True)
    assert remotecall_fetch(abs, pid, -1) == 1


# -- disks -------------------------------------------------------------------------------------------------------


@pytest.fixture
def read_only_cache(home: Home) -> Iterator[None]:
    (home.path / ".cache").mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "none", str(home.path / ".cache")], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("needs the right to mount a file system")
    yield
    subprocess.run(["umount", "-l", str(home.path / ".cache")], check=True)


def temporary(directory: Path) -> list[Path]:
    return list(directory.glob("distpool-*"))


@pytest.mark.parametrize("how", ["file", "read-only", "somebody else's"])
def test_a_home_that_cannot_be_written(
    start: Start, home: Home, tmp_path: Path, how: str, request: pytest.FixtureRequest
) -> None:
    """The archive goes into a temporary directory, which is gone with the workers."""
    if how == "file":
        (home.path / ".cache").write_text("")
    elif how == "read-only":
        request.getfixturevalue("read_only_cache")
    elif os.geteuid() != 0:
        pytest.skip("needs root")
    else:
        home.cache.mkdir(parents=True)
        os.chown(home.cache, 12345, 12345)
    directory = tmp_path / "tmp"
    directory.mkdir()
    (pid,) = start(env={"TMPDIR": str(directory)})
    assert remotecall_fetch(abs, pid, -1) == 1
    place = remotecall_fetch(where, pid, "distpool")
    (root,) = directory.iterdir()
    assert place.startswith(str(root)) and root.name.startswith("distpool-")
    rmprocs(pid)
    wait_until(lambda: not root.exists())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(place)], capture_output=True)
    if done.returncode:
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_home(start: Start, small_disk: Path, home: Home) -> None:
    (pid,) = start(env={"XDG_CACHE_HOME": str(small_disk)})
    place = remotecall_fetch(where, pid, "distpool")
    assert not place.startswith(str(small_disk)) and os.listdir(small_disk / "distpool") == []
    rmprocs(pid)
    wait_until(lambda: not Path(place).exists())


def test_a_disk_that_is_full_everywhere(start: Start, small_disk: Path, bare: str, tmp_path: Path) -> None:
    # Python's tempfile goes on to /tmp when TMPDIR is full for it, so that has to be seen to as well.
    stub = tmp_path / "python"
    stub.write_text(
        f"#!{bare}\nimport sys, tempfile\ntempfile.tempdir = {str(small_disk)!r}\n"
        "code = sys.argv[2]\nsys.argv = ['-c', *sys.argv[3:]]\nexec(code, globals())\n"
    )
    stub.chmod(0o755)
    error = error_of(lambda: start(exename=str(stub), env={"XDG_CACHE_HOME": str(small_disk)}))
    assert "its disk is full" in str(error)
    wait_until(lambda: not temporary(small_disk))
    assert os.listdir(small_disk / "distpool") == []


def test_a_damaged_cache_is_mended(start: Start, home: Home) -> None:
    rmprocs(start())
    (name,) = home.archives()
    (home.cache / name / "distpool" / "login.py").unlink()
    (home.cache / name / "cloudpickle" / "cloudpickle.py").write_text("half")
    (pid,) = start()
    assert remotecall_fetch(lambda a: a, pid, 1) == 1 and home.archives() == [name]


def test_the_time_is_over_while_it_is_sent(ssh: Any, server: Server, home: Home, tmp_path: Path) -> None:
    """Whoever does not read what he asked for."""
    stub = tmp_path / "python"
    stub.write_text(
        f'#!{sys.executable}\nimport os, time\nos.write(1, b\'\\ndistpool_login:{{"wants": ["DIGEST"]}}\\n\')\n'
        "time.sleep(6)\n".replace("DIGEST", distpool_digest())
    )
    stub.chmod(0o755)
    began = time.monotonic()
    error = error_of(lambda: addprocs(["host1"], **options(server, ssh, exename=str(stub), timeout=4, bootstrap=True)))
    assert time.monotonic() - began < 20
    assert "within 4 seconds" in str(error)


def distpool_digest() -> str:
    from distpool.managers import archive

    return archive.own().digest


def test_something_that_was_not_offered(ssh: Any, server: Server, tmp_path: Path) -> None:
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\necho\necho \'distpool_login:{"wants": ["/etc/shadow"]}\'\nexec cat >/dev/null\n')
    stub.chmod(0o755)
    error = error_of(lambda: addprocs(["host1"], **options(server, ssh, exename=str(stub))))
    assert "asks for something that was not offered" in str(error)


# -- the user's own packages -------------------------------------------------------------------------------------


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages that only this program can import."""
    source = tmp_path / "source"
    package = source / "my_shipped"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "import importlib.resources, pathlib\n"
        "from my_shipped import inner\n"
        "def both():\n"
        "    here = pathlib.Path(__file__).parent.joinpath('data', 'table.txt').read_text()\n"
        "    return here, importlib.resources.files(__name__).joinpath('data/table.txt').read_text(), inner.VALUE\n"
    )
    (package / "inner.py").write_text("VALUE = 7\n")
    (package / "data").mkdir()
    (package / "data" / "table.txt").write_text("1 2 3")
    (source / "my_single.py").write_text("def f(a):\n    return a * 2\n")
    (source / "json.py").write_text("MINE = True\n")
    monkeypatch.syspath_prepend(source)
    for name in ("my_shipped", "my_shipped.inner", "my_single"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return source


def test_packages_of_the_user(start: Start, mine: Path, home: Home, tmp_path: Path) -> None:
    import my_shipped  # type: ignore[import-not-found]
    import my_single  # type: ignore[import-not-found]

    elsewhere = str(tmp_path)
    (pid,) = start(dir=elsewhere)
    with pytest.raises(distpool.RemoteException, match="my_single"):
        remotecall_fetch(my_single.f, pid, 4)
    (pid,) = start(dir=elsewhere, ship=["my_shipped", mine / "my_single.py"])
    assert remotecall_fetch(my_single.f, pid, 4) == 8
    assert remotecall_fetch(my_shipped.both, pid) == ("1 2 3", "1 2 3", 7)
    path = remotecall_fetch(lambda: __import__("sys").path, pid)
    assert path[0].startswith(str(home.cache)) and path[1].startswith(str(home.cache)) and elsewhere in path[2:4]
    assert len(home.archives()) == 3


def test_changed_packages_are_sent_again(start: Start, mine: Path, home: Home, tmp_path: Path) -> None:
    import my_single

    for factor in (2, 3, 3):
        (mine / "my_single.py").write_text(f"def f(a):\n    return a * {factor}\n")
        (pid,) = start(dir=str(tmp_path), ship=["my_single"])
        assert remotecall_fetch(my_single.f, pid, 4) == 4 * factor
    assert len(home.archives()) == 3, "distpool, and the two versions"


def test_packages_where_distpool_is_installed(server: Server, ssh: Any, mine: Path, home: Home, tmp_path: Path) -> None:
    import my_single

    given = options(server, ssh, env=home.env, ship=["my_single"], dir=str(tmp_path))
    with distpool.ClusterExecutor(["host1", "host2"], **given) as executor:
        assert list(executor.map(my_single.f, range(4))) == [0, 2, 4, 6]
        place = executor.submit(where, "distpool").result(30)
    assert not place.startswith(str(home.path)) and len(home.archives()) == 1


def test_extension_modules_of_the_same_platform(start: Start, home: Home) -> None:
    """psutil is one that needs no further library."""
    (pid,) = start(ship=["psutil"])
    assert remotecall_fetch(where, pid, "psutil").startswith(str(home.cache))
    assert remotecall_fetch(lambda: __import__("psutil").Process().pid, pid) == remotecall_fetch(os.getpid, pid)


def test_a_large_package_through_a_tunnel(start: Start, mine: Path, home: Home, tmp_path: Path) -> None:
    data = os.urandom(20 << 20)
    (mine / "my_shipped" / "data" / "large.bin").write_bytes(data)
    (pid,) = start(dir=str(tmp_path), ship=["my_shipped"], tunnel=True)
    read = lambda: (
        __import__("importlib.resources").resources.files("my_shipped").joinpath("data/large.bin").read_bytes()
    )
    assert remotecall_fetch(read, pid) == data


def test_relative_paths_are_those_of_the_call(
    server: Server, ssh: Any, mine: Path, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when a login is made anew while the program works elsewhere."""
    import my_single

    given = options(server, ssh, env=home.env, ship=["./my_single.py"], dir=str(tmp_path))
    monkeypatch.chdir(mine)
    with distpool.ClusterExecutor(["host1"], **given) as executor:
        assert executor.submit(my_single.f, 4).result(30) == 8
        login = executor.submit(os.getppid).result(30)
        monkeypatch.chdir(home.path)
        os.kill(login, 9)
        patient = executor.options(retries=3)
        wait_until(lambda: patient.submit(os.getppid).result(30) not in (login, 1))  # 1: just orphaned
        assert patient.submit(my_single.f, 5).result(30) == 10


def test_a_package_that_is_not_there(server: Server, ssh: Any) -> None:
    began = server.logins()
    with pytest.raises(ValueError, match="cannot ship 'no_such_package'"):
        addprocs(["host1"], **options(server, ssh, ship=["no_such_package"]))
    with pytest.raises(ValueError, match="cannot ship 'no_such_package'"):
        distpool.ClusterExecutor(["host1"], **options(server, ssh, ship=["no_such_package"]))
    with pytest.raises(ValueError, match="bootstrap must be 'auto', True or False"):
        addprocs(["host1"], **options(server, ssh, bootstrap="yes"))
    assert server.logins() == began and threading.active_count() >= 1


# -- modules that are fetched ------------------------------------------------------------------------------------


def test_modules_are_fetched(start: Start, mine: Path, home: Home, tmp_path: Path) -> None:
    import my_shipped
    import my_single

    pids = start([("host1", 2)], dir=str(tmp_path), ship="auto")
    for pid in pids:
        assert remotecall_fetch(my_single.f, pid, 4) == 8
        assert remotecall_fetch(my_shipped.both, pid) == ("1 2 3", "1 2 3", 7)
    assert len(home.archives()) == 3, "distpool, and each of the two once"
    with pytest.raises(distpool.RemoteException, match="No module named 'psutil'"):
        remotecall_fetch(where, pids[0], "psutil")


def test_modules_are_fetched_by_executors(server: Server, ssh: Any, mine: Path, home: Home, tmp_path: Path) -> None:
    import my_single

    given = options(server, ssh, env=home.env, ship=["auto", "my_shipped"], dir=str(tmp_path))
    with distpool.ClusterExecutor([("host1", 2), "host2"], **given) as executor:
        assert list(executor.map(my_single.f, range(12))) == [2 * a for a in range(12)]
        assert executor.submit(lambda: __import__("my_shipped").inner.VALUE).result(30) == 7


def test_modules_are_fetched_where_there_is_no_cache(start: Start, mine: Path, home: Home, tmp_path: Path) -> None:
    import my_single

    (home.path / ".cache").write_text("")
    (pid,) = start(dir=str(tmp_path), ship="auto")
    assert remotecall_fetch(my_single.f, pid, 4) == 8
    place = remotecall_fetch(where, pid, "my_single")
    rmprocs(pid)
    wait_until(lambda: not Path(place).exists())
