"""Processes that `posix_spawn` has started, or `subprocess` where that is not possible."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distpool.managers import spawned
from distpool.managers.spawned import Spawned, spawn

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")

TELL = """
import json, os, signal, sys
found = {}
for number in range(256):
    try:
        found[number] = os.fstat(number).st_ino
    except OSError:
        pass
ignored = [name for name in ("SIGPIPE", "SIGXFSZ") if signal.getsignal(getattr(signal, name)) is signal.SIG_IGN]
print(json.dumps([found, os.getsid(0) == os.getpid(), sorted(os.environ), ignored]))
"""


@pytest.fixture(params=["posix_spawn", "subprocess", "no posix_spawn"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "subprocess":

        def refuse(*args: Any, **kwargs: Any) -> int:
            raise NotImplementedError("setsid")

        monkeypatch.setattr(os, "posix_spawn", refuse)
    elif request.param == "no posix_spawn":
        monkeypatch.delattr(os, "posix_spawn")
        monkeypatch.delattr(os, "posix_spawnp")
    return str(request.param)


@pytest.fixture
def ends() -> Iterator[tuple[int, int, int]]:
    """The pipe for the output (its read end first), and a descriptor to be kept."""
    read, write = os.pipe()
    kept = os.open(os.devnull, os.O_RDONLY)
    yield read, write, kept
    for descriptor in (read, write, kept):
        os.close(descriptor)


def said(read: int, write: int) -> str:
    """All that the child prints until its end."""
    copy = os.dup(read)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, write)  # our end of the pipe; the number stays in use
    os.close(null)
    with open(copy) as file:
        return file.read()


def run(code: str, ends: tuple[int, int, int], env: dict[str, str] | None = None) -> Any:
    _, write, kept = ends
    return spawn([sys.executable, "-S", "-E", "-c", code], dict(os.environ) if env is None else env, write, kept)


def test_what_it_finds(way: str, ends: tuple[int, int, int], tmp_path: Path) -> None:
    read, write, kept = ends
    others = [os.open(tmp_path, os.O_RDONLY), os.dup(0)]
    for other in others:
        os.set_inheritable(other, True)
    try:
        process = run(TELL, ends, {"A": "1", "LC_ALL": "C.UTF-8"})
    finally:
        for other in others:
            os.close(other)
    numbers, leads, names, ignored = json.loads(said(read, write))
    null = os.stat(os.devnull).st_ino
    assert numbers.pop("1") == numbers.pop("2") not in (null, None)
    assert numbers == {"0": null, str(kept): os.fstat(kept).st_ino}
    assert (leads, names) == (True, ["A", "LC_ALL"])
    assert not os.get_inheritable(kept)
    assert ignored == ["SIGPIPE", "SIGXFSZ"], "Python has set that itself"
    assert process.wait() == 0
    assert isinstance(process, Spawned) == (way == "posix_spawn")


def test_signals_that_python_ignores_are_not_inherited(way: str, ends: tuple[int, int, int]) -> None:
    read, write, kept = ends
    process = spawn(["/bin/sh", "-c", "kill -s PIPE $$; echo lives"], dict(os.environ), write, kept)
    assert process.wait() == -signal.SIGPIPE
    assert said(read, write) == ""


def test_the_same_number_where_both_ends_are_neighbours(way: str, ends: tuple[int, int, int]) -> None:
    """`output` may have the number that `kept` is duplicated to on its way, and the other way round."""
    read, write, kept = ends
    process = spawn(["/bin/sh", "-c", f"echo out; echo err >&2; cat <&{write}"], dict(os.environ), kept, write)
    assert process.wait() != 0, "that descriptor is for writing"
    assert said(read, write) == ""


def test_its_end(way: str, ends: tuple[int, int, int]) -> None:
    process = run("raise SystemExit(7)", ends)
    assert process.wait() == process.wait() == process.poll() == process.returncode == 7
    process.kill()
    assert process.returncode == 7
    process = run("import time; time.sleep(60)", ends)
    assert process.poll() is process.returncode is None
    process.kill()
    assert process.wait() == -signal.SIGKILL


def test_several_threads_wait_for_it(way: str, ends: tuple[int, int, int]) -> None:
    process = run("import time; time.sleep(60)", ends)
    codes: list[int] = []
    threads = [threading.Thread(target=lambda: codes.append(process.wait())) for _ in range(3)]
    for thread in threads:
        thread.start()
    process.kill()
    for thread in threads:
        thread.join(20)
    assert codes == [-signal.SIGKILL] * 3


def test_somebody_else_has_collected_it(ends: tuple[int, int, int]) -> None:
    for ask in (Spawned.poll, Spawned.wait):
        process = run("pass", ends)
        os.waitpid(process.pid, 0)
        process.kill()
        assert ask(process) == process.returncode == 0


def test_a_program_that_ignores_its_children() -> None:
    code = """if True:
        import os, signal, sys
        from distpool.managers.spawned import spawn
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        read, write = os.pipe()
        process = spawn([sys.executable, "-c", "pass"], dict(os.environ), write, read)
        print(process.wait())
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("0\n", "")


@pytest.mark.parametrize("program", ["/no/such/program", "no-such-program"])
def test_what_cannot_be_started(way: str, ends: tuple[int, int, int], program: str) -> None:
    with pytest.raises(FileNotFoundError, match=program):
        spawn([program], dict(os.environ), *ends[1:])


def test_what_is_not_executable(way: str, ends: tuple[int, int, int], tmp_path: Path) -> None:
    path = tmp_path / "program"
    path.write_text("")
    with pytest.raises(PermissionError):
        spawn([str(path)], dict(os.environ), *ends[1:])


def test_a_name_is_looked_up(way: str, ends: tuple[int, int, int]) -> None:
    read, write, kept = ends
    assert spawn(["sh", "-c", "echo here"], dict(os.environ), write, kept).wait() == 0
    assert said(read, write) == "here\n"


def test_nothing_lists_the_descriptors(ends: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> list[str]:
        raise FileNotFoundError(path)

    os.set_inheritable(ends[0], True)
    listed = spawned._inherited()
    monkeypatch.setattr(os, "listdir", refuse)
    assert ends[0] in spawned._inherited() == listed


@pytest.mark.skipif(sys.platform != "linux", reason="numbers above the limit cannot be closed with glibc")
def test_a_limit_below_numbers_in_use() -> None:
    """What may be inherited is none the less not: the pipe comes to its end."""
    code = """if True:
        import os, resource, sys
        from distpool.managers.spawned import spawn
        reader, writer = os.pipe()
        os.dup2(writer, 251, inheritable=True)
        os.close(writer)
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
        process = spawn([sys.executable, "-c", "import signal; signal.pause()"], dict(os.environ), os.dup(1), os.dup(0))
        os.close(251)
        found = os.read(reader, 1)
        process.kill()
        print(found, process.wait())
        from distpool import ClusterExecutor
        with ClusterExecutor(1) as executor:
            print(executor.submit(abs, -3).result(30))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout.splitlines()[-2:], done.returncode) == (["b'' -9", "3"], 0), done
