"""Files in memory: made, opened with checks, filled, and nothing left of them."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
import sys
from pathlib import Path

import pytest
from sides import linux

from distpool.transport import memfile
from distpool.transport.views import can_attach


@linux
def test_paths_of_other_descriptors_are_refused(tmp_path: Path) -> None:
    # What the path of a dead process may lead to when its number is used again: opening a pipe could even block.
    here, there = os.pipe()
    with open(tmp_path / "file", "wb+") as file, contextlib.ExitStack() as stack:
        stack.callback(os.close, here)
        stack.callback(os.close, there)
        file.write(bytes(10_000))
        file.flush()
        for descriptor in (here, there, file.fileno()):
            assert not can_attach(f"/proc/{os.getpid()}/fd/{descriptor}", 100)
    assert not can_attach("/proc/1/fd/100000", 100)


def test_reading_less_than_announced_is_an_error(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb+") as file:
        memfile.write_at(file.fileno(), memoryview(b"abc"), 0)
        with pytest.raises(OSError, match="shorter"):
            memfile.read_into(file.fileno(), bytearray(4))
        memfile.allocate(file.fileno(), 10_000)
        assert os.fstat(file.fileno()).st_size == 10_000


# -- making --------------------------------------------------------------------------------------------------------


@linux
def test_a_memfd_is_known_to_others_by_its_path() -> None:
    file = memfile.create(10_000)
    assert not file.named and os.stat(file.path).st_size == 10_000
    assert not os.get_inheritable(file.descriptor)
    with contextlib.closing(os.fdopen(memfile.open_checked(file.path, 10_000), "rb+", 0)) as other:
        other.write(b"seen")
        assert os.pread(file.descriptor, 4, 0) == b"seen"
    file.discard(free_pages=True)
    assert not os.path.exists(file.path)
    file.discard(free_pages=True)  # once more does no harm: the number may be another file's by now


def test_a_named_file_is_private_and_carries_its_maker(tmp_path: Path) -> None:
    file = memfile.create(10_000, str(tmp_path), memfd=False)
    path = Path(file.path)
    assert file.named and path.parent == tmp_path and path.name.startswith(f"segment-{os.getpid()}-")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and path.stat().st_size == 10_000
    file.discard(free_pages=False)
    assert not path.exists()


def test_without_memfd_and_directory_there_is_no_way() -> None:
    with pytest.raises(OSError) as info:
        memfile.create(10, memfd=False)
    assert info.value.errno == errno.ENOSYS


@linux
def test_the_reason_why_there_is_no_memfd(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, flags: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(OSError) as info:
        memfile.create(10)
    assert info.value.errno == errno.EMFILE


def test_no_descriptor_is_left_of_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int, size: int) -> None:
        raise OSError(errno.EFBIG, "too large")

    before = set(os.listdir("/dev/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", fail)
        for memfd in (True, False):
            with pytest.raises(OSError):
                memfile.create(10, str(tmp_path), memfd=memfd)
    assert set(os.listdir("/dev/fd")) <= before and list(tmp_path.iterdir()) == []


def test_the_last_descriptors_are_the_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memfile, "has_spare", lambda descriptor: False)
    with pytest.raises(OSError) as info:
        memfile.create(10, str(tmp_path))
    assert info.value.errno == errno.EMFILE and list(tmp_path.iterdir()) == []


def test_descriptors_up_to_a_share_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (100, 100))
    limit = int(100 * memfile.DESCRIPTOR_SHARE)
    assert memfile.has_spare(limit - 1) and not memfile.has_spare(limit + 1)


def test_freed_pages_are_gone_for_those_who_map_them(tmp_path: Path) -> None:
    file = memfile.create(mmap.PAGESIZE, str(tmp_path), memfd=False)
    memfile.allocate(file.descriptor, mmap.PAGESIZE)
    with mmap.mmap(file.descriptor, mmap.PAGESIZE) as mapping:
        file.discard(free_pages=True)
        assert mapping.size() == 0 < len(mapping)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_closes_its_copy_only(tmp_path: Path) -> None:
    file = memfile.create(mmap.PAGESIZE, str(tmp_path), memfd=False)
    child = os.fork()
    if child == 0:
        file.discard(free_pages=True)
        os._exit(0 if file.descriptor == -1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert os.path.exists(file.path) and os.fstat(file.descriptor).st_size == mmap.PAGESIZE
    file.discard(free_pages=True)


# -- opening -------------------------------------------------------------------------------------------------------


def test_files_that_are_too_short_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    os.close(memfile.open_checked(str(path), 100))
    before = set(os.listdir("/dev/fd"))
    for size in (101, 0, -1):
        with pytest.raises(OSError) as info:
            memfile.open_checked(str(path), size)
        assert info.value.errno == errno.ESTALE
    with pytest.raises(OSError):
        memfile.open_checked(str(tmp_path), 1, writable=False)
    assert set(os.listdir("/dev/fd")) <= before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    """Opening one would wait for its other end."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError):
        memfile.open_checked(str(tmp_path / "pipe"), 1, writable=False)


def test_read_only_is_read_only(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    descriptor = memfile.open_checked(str(path), 100, writable=False)
    with pytest.raises(OSError):
        os.write(descriptor, b"x")
    os.close(descriptor)


# -- filling -------------------------------------------------------------------------------------------------------


def test_everything_is_written_however_little_the_system_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: whole(descriptor, data[:7], offset))
    data = bytes(range(100))
    with open(tmp_path / "file", "wb+") as file:
        memfile.write_at(file.fileno(), memoryview(data), 5)
        found = bytearray(105)
        memfile.read_into(file.fileno(), found)
    assert found == bytes(5) + data


def test_allocating_says_when_there_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And where the file system cannot allocate, pages are written: what is in them is lost, so it is done first."""
    answers = [OSError(errno.ENOSPC, "full"), OSError(errno.EOPNOTSUPP, "not here"), OSError(errno.EINVAL, "nor here")]

    def fallocate(descriptor: int, offset: int, size: int) -> None:
        raise answers.pop(0)

    monkeypatch.setattr(os, "posix_fallocate", fallocate, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    with open(tmp_path / "file", "wb+") as file:
        with pytest.raises(OSError) as info:
            memfile.allocate(file.fileno(), 5000)
        assert info.value.errno == errno.ENOSPC
        for size in (5000, 6000):
            memfile.allocate(file.fileno(), size)
            assert os.fstat(file.fileno()).st_size == size


def test_populating_changes_nothing_and_never_fails() -> None:
    mapping = mmap.mmap(-1, mmap.PAGESIZE)
    mapping[:3] = b"abc"
    memfile.populate(mapping, 3)
    memfile.populate(mapping, 100 * mmap.PAGESIZE)  # beyond its end: the kernel refuses
    assert mapping[:3] == b"abc"


# -- removing ------------------------------------------------------------------------------------------------------


def test_a_directory_goes_with_what_is_in_it(tmp_path: Path) -> None:
    made = Path(memfile.private_directory())
    file = memfile.create(10, str(made), memfd=False)
    memfile.discard_directory(str(made))
    assert not made.exists()
    file.discard(free_pages=True)
    memfile.discard_directory(str(tmp_path / "none"))
    memfile.unlink(str(tmp_path / "none"))


def test_directories_for_segments_are_private(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import tempfile

    made = Path(memfile.private_directory())
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    made.rmdir()
    whole = tempfile.mkdtemp

    def without_shm(prefix: str, dir: str | None = None) -> str:
        if dir is not None:
            raise FileNotFoundError(dir)
        return whole(prefix=prefix, dir=tmp_path)

    monkeypatch.setattr(tempfile, "mkdtemp", without_shm)
    assert Path(memfile.private_directory()).parent == tmp_path
