"""The cache of archives: complete or not there, private, bounded; several users of it at once."""

from __future__ import annotations

import fcntl
import io
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from distpool.managers import unpacking
from distpool.managers.archive import Archive
from distpool.managers.unpacking import FILES, KEPT, Cache

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def archive_of(**content: str) -> Archive:
    return Archive([(name.replace("__", "/"), False, text.encode()) for name, text in content.items()])


ONE = archive_of(a="first", below__b="second")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    found = Cache(str(tmp_path / "cache"))
    found.prepare()
    return found


def again(cache: Cache) -> Cache:
    """As another process sees it."""
    return Cache(cache.root)


def wait_until(holds: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.02)


def test_what_was_stored_is_found(cache: Cache) -> None:
    assert cache.find(ONE.digest) is None
    place = Path(cache.store(ONE.digest, ONE.data))
    assert place.parent == Path(cache.root) and place.name == ONE.digest
    assert (place / "a").read_text() == "first" and (place / "below" / "b").read_text() == "second"
    assert again(cache).find(ONE.digest) == str(place) and os.listdir(cache.root) == [ONE.digest]


def test_it_is_private(cache: Cache, tmp_path: Path) -> None:
    place = Path(cache.store(ONE.digest, ONE.data))
    assert {path.stat().st_mode & 0o777 for path in (Path(cache.root), place)} == {0o700}
    assert (place / "a").stat().st_mode & 0o777 == 0o600
    program = Archive([("run", True, b"#!")])
    assert (Path(cache.store(program.digest, program.data)) / "run").stat().st_mode & 0o777 == 0o700
    os.chmod(cache.root, 0o777)
    again(cache).prepare()
    assert Path(cache.root).stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root")
def test_that_of_somebody_else_is_not_used(cache: Cache) -> None:
    os.chown(cache.root, 12345, 12345)
    with pytest.raises(PermissionError, match="belongs to somebody else"):
        again(cache).prepare()


def test_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert unpacking.usual_root() == "/home/me/.cache/distpool"
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/caches")
    assert unpacking.usual_root() == "/var/caches/distpool"


@pytest.mark.parametrize("harm", ["gone", "shorter", "list", "list gone"])
def test_a_damaged_one_is_not_found_and_is_replaced(cache: Cache, harm: str) -> None:
    place = Path(cache.store(ONE.digest, ONE.data))
    if harm == "gone":
        (place / "below" / "b").unlink()
    elif harm == "shorter":
        (place / "a").write_text("")
    elif harm == "list":
        (place / FILES).write_text("{")
    else:
        (place / FILES).unlink()
    assert again(cache).find(ONE.digest) is None
    assert again(cache).store(ONE.digest, ONE.data) == str(place)
    assert (place / "below" / "b").read_text() == "second" and os.listdir(cache.root) == [ONE.digest]


def bad(*names: str) -> tuple[bytes, str]:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return buffer.getvalue(), unpacking.digest_of((name, False, b"x") for name in names)


@pytest.mark.parametrize("name", ["../a", "/a", "a/../../b", "a//b", "./a", "a\\b"])
def test_nothing_leads_elsewhere(cache: Cache, name: str) -> None:
    data, digest = bad("good", name)
    with pytest.raises(ValueError, match="leads elsewhere"):
        cache.store(digest, data)
    assert os.listdir(cache.root) == []


@pytest.mark.parametrize("cut", [0, 1, 30, -1])
def test_what_is_damaged_on_its_way_is_refused(cache: Cache, cut: int) -> None:
    data = ONE.data[:cut] if cut >= 0 else archive_of(a="other").data
    with pytest.raises(ValueError, match="damaged"):
        cache.store(ONE.digest, data)
    assert os.listdir(cache.root) == []


def test_a_disk_that_cannot(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: str, content: bytes, mode: int) -> None:
        if path.endswith("b"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(unpacking, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        cache.store(ONE.digest, ONE.data)
    assert os.listdir(cache.root) == [], "nothing is left half-written"


def _store(root: str, start: object) -> None:
    start.wait()  # type: ignore[attr-defined]
    big = Archive([(f"d{n}/f{n}", False, bytes(1000)) for n in range(200)])
    for _ in range(3):
        place = Cache(root).store(big.digest, big.data)
        assert len(os.listdir(place)) == 201


def test_many_at_once(cache: Cache) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Event()
    writers = [context.Process(target=_store, args=(cache.root, start)) for _ in range(4)]
    for writer in writers:
        writer.start()
    start.set()
    for writer in writers:
        writer.join(40)
    assert [writer.exitcode for writer in writers] == [0] * 4 and len(os.listdir(cache.root)) == 1


def _store_and_prune(root: str, start: object, number: int) -> None:
    unpacking.KEPT = 1
    start.wait()  # type: ignore[attr-defined]
    for round in range(20):
        each = Archive([(f"f{number}", False, f"{number} {round}".encode())])
        place = Cache(root).store(each.digest, each.data)
        assert Path(place, f"f{number}").read_text() == f"{number} {round}"


def test_what_has_just_been_stored_is_not_pruned(cache: Cache) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Event()
    writers = [context.Process(target=_store_and_prune, args=(cache.root, start, number)) for number in range(4)]
    for writer in writers:
        writer.start()
    start.set()
    for writer in writers:
        writer.join(40)
    assert [writer.exitcode for writer in writers] == [0] * 4


def test_whoever_is_killed_leaves_nothing_that_could_be_used(cache: Cache) -> None:
    """It stops behind the first file of its archive, which never becomes visible, and goes after a day."""
    code = (
        "import os, sys; from distpool.managers import unpacking as u; from distpool.managers.archive import Archive\n"
        "real = u._write\n"
        "def write(*args): real(*args); print(args[0], flush=True); os.kill(os.getpid(), 9)\n"
        "u._write = write; a = Archive([('a', False, b'x'), ('b', False, b'y')]); print(a.digest)\n"
        "u.Cache(sys.argv[1]).store(a.digest, a.data)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, cache.root], capture_output=True, text=True, timeout=30)
    assert done.returncode == -9
    (left,) = os.listdir(cache.root)
    assert (
        left.startswith(".new-") and again(cache).find(Archive([("a", False, b"x"), ("b", False, b"y")]).digest) is None
    )
    cache.prune()
    assert os.listdir(cache.root) == [left], "its writer may live"
    long_ago = time.time() - unpacking.STALE - 60
    os.utime(Path(cache.root) / left, (long_ago, long_ago))
    cache.prune()
    assert os.listdir(cache.root) == []


def test_old_ones_go_but_not_those_in_use(cache: Cache) -> None:
    archives = [archive_of(a=str(number)) for number in range(KEPT + 4)]
    user = again(cache)
    for age, each in enumerate(archives):
        place = again(cache).store(each.digest, each.data)
        moment = time.time() - 10000 + age
        os.utime(place, (moment, moment))
        if age == 0:
            assert user.find(each.digest) == place
            os.utime(place, (moment, moment))
    import gc

    gc.collect()
    for descriptor in held(cache.root) - set(user._held):
        os.close(descriptor)  # the processes that stored them have ended
    again(cache).prune()
    left = set(os.listdir(cache.root))
    assert left == {archives[0].digest, *(each.digest for each in archives[-KEPT:])}


def test_large_ones_go_sooner(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "KEPT_BYTES", 10)
    for number in range(4):
        each = archive_of(a=str(number) * 4)
        place = cache.store(each.digest, each.data)
        os.utime(place, (number + 1, number + 1))
        for descriptor in cache._held:
            os.close(descriptor)
        cache._held.clear()
    cache.prune()
    assert {Path(cache.root, name, "a").read_text() for name in os.listdir(cache.root)} == {"2222", "3333"}


def held(root: str) -> set[int]:
    """Our open files below a directory."""
    found = set()
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []:
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith(root):
                found.add(int(name))
        except OSError:
            pass
    if not found:
        pytest.skip("needs /proc")
    return found


def test_one_that_is_being_removed_is_not_found(cache: Cache) -> None:
    place = Path(cache.store(ONE.digest, ONE.data))
    for descriptor in cache._held:
        os.close(descriptor)
    cache._held.clear()
    with open(place / FILES, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert again(cache).find(ONE.digest) is None
    assert again(cache).find(ONE.digest) == str(place)


def test_what_is_used_counts_as_young(cache: Cache) -> None:
    place = cache.store(ONE.digest, ONE.data)
    os.utime(place, (1, 1))
    again(cache).find(ONE.digest)
    assert os.stat(place).st_mtime > time.time() - 60


def test_a_temporary_one_goes_with_its_process(tmp_path: Path) -> None:
    """Also with a process that is killed, and not before the last of its children."""
    code = (
        "import os, time; from distpool.managers import unpacking\n"
        "root = unpacking.temporary_root(); open(os.path.join(root, 'f'), 'w')\n"
        "child = os.fork()\n"
        "if child: print(root, child, flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    assert process.stdout is not None
    with process, process.stdout:
        root, child = process.stdout.readline().split()
        assert root.startswith(str(tmp_path)) and os.stat(root).st_mode & 0o777 == 0o700
        process.kill()
        process.wait()
        assert os.path.exists(os.path.join(root, "f"))
        os.kill(int(child), 9)
        wait_until(lambda: not os.path.exists(root))
        ended = threading.Event()
        threading.Thread(target=lambda: (process.stdout.read(), ended.set())).start()  # type: ignore[union-attr]
        assert ended.wait(10), "nobody holds the output of the login open"
