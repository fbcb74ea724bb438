"""The journal of results: a ring that survives the `kill -9` of its writer."""

from __future__ import annotations

import os
import random
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distpool import config
from distpool.transport import journal as journals
from distpool.transport import memfile
from distpool.transport.journal import HEADER, RESERVED, Journal

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")


@pytest.fixture(params=["private", "memory", "named"])
def journal(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    """The writer's journal: of one process alone, behind a memfd, behind a named file."""
    monkeypatch.setattr(config, "JOURNAL_SIZE", 1000)
    if request.param == "private":
        made = Journal.private()
        yield made
        made.close()
        return
    if request.param == "named":
        monkeypatch.delattr(os, "memfd_create", raising=False)
    elif not hasattr(os, "memfd_create"):
        pytest.skip("no memfd here")
    master = Journal.create(str(tmp_path))
    worker = Journal.attach(master.path, master.size)
    yield worker
    worker.close()
    master.close()
    assert os.listdir(tmp_path) == []


def test_an_empty_journal(journal: Journal) -> None:
    assert (journal.started, journal.written, journal.capacity) == (0, 0, 1000)
    assert journal.pending() == b""
    assert journal.read_from(0) == b""


def test_started_takes_64_bits(journal: Journal) -> None:
    for number in (1, 2**31, 2**64 - 1):
        journal.set_started(number)
        assert journal.started == number
    with pytest.raises((ValueError, struct.error)):
        journal.set_started(2**64)


def test_records_come_back_in_order_over_many_rounds_of_the_ring(journal: Journal) -> None:
    chance = random.Random(5)
    everything = b""
    sent = received = 0
    for _ in range(3000):
        record = chance.randbytes(chance.randrange(0, 90))
        if not journal.append(record):
            assert journal.pending() == everything[sent:]
            journal.mark_sent(journal.written)
            sent = journal.written
            assert journal.pending() == b""
            assert journal.append(record)
        everything += record
        assert journal.written == len(everything)
        if chance.random() < 0.1:
            received = max(sent, received)
            assert journal.read_from(received) == everything[received:]
    assert len(everything) > 50 * journal.capacity


def test_sent_records_can_be_read_until_they_are_overwritten(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "_RESERVE", 0)  # what is reserved ahead counts as overwritten
    assert journal.append(b"a" * 600)
    journal.mark_sent(600)
    assert journal.append(b"b" * 400)
    assert journal.read_from(0) == b"a" * 600 + b"b" * 400
    assert journal.append(b"c" * 100)
    with pytest.raises(ValueError, match="overwritten"):
        journal.read_from(99)
    assert journal.read_from(100) == b"a" * 500 + b"b" * 400 + b"c" * 100
    with pytest.raises(ValueError, match="beyond"):
        journal.read_from(1101)


def test_a_torn_append_spoils_only_what_it_may_overwrite(journal: Journal) -> None:
    assert journal.append(b"a" * 1000)
    journal.mark_sent(500)
    journal.words[RESERVED] = 1300  # killed here: up to 300 bytes may be half written
    assert journal.read_from(300) == b"a" * 700
    with pytest.raises(ValueError, match="overwritten"):
        journal.read_from(299)


def test_no_room(journal: Journal) -> None:
    assert not journal.append(bytes(1001))
    assert journal.append(bytes(1000))
    assert not journal.append(b"x")
    assert journal.written == 1000
    journal.mark_sent(1)
    assert not journal.append(b"xy")
    assert journal.append(b"x")
    assert journal.pending() == bytes(999) + b"x"


def test_marks_must_lie_between_sent_and_written(journal: Journal) -> None:
    assert journal.append(b"abc")
    journal.mark_sent(2)
    for wrong in (1, 4):
        with pytest.raises(ValueError, match="cannot mark"):
            journal.mark_sent(wrong)
    assert journal.pending() == b"c"


def test_revoked_calls(journal: Journal) -> None:
    assert not any(journal.revoked(number) for number in range(1, 20))
    journal.revoke(5, 8)
    assert [number for number in range(20) if journal.revoked(number)] == [5, 6, 7, 8]
    journal.revoke(12, 12)  # what was revoked before is not there any more
    assert [number for number in range(9, 20) if journal.revoked(number)] == [12]


def test_snapshots_of_a_living_writer(journal: Journal) -> None:
    assert journal.snapshot(0) == b""
    journal.append(b"abc")
    assert journal.snapshot(0) == b"abc" and journal.snapshot(1) == b"bc" and journal.snapshot(3) == b""
    for _ in range(30):  # round the ring
        assert journal.append(b"x" * 90)
        journal.mark_sent(journal.written)
    assert journal.snapshot(0) == b""  # overwritten long ago
    assert journal.snapshot(journal.written - 90) == b"x" * 90


def test_close_twice_and_use_afterwards(journal: Journal) -> None:
    journal.close()
    journal.close()
    for use in (lambda: journal.append(b"x"), lambda: journal.set_started(1), journal.pending):
        with pytest.raises(ValueError):
            use()


def test_two_processes_see_one_journal(tmp_path: Path) -> None:
    master = Journal.create(str(tmp_path))
    assert master.shared and not Journal.private().shared
    assert master.size == HEADER + config.JOURNAL_SIZE
    small = Journal.create(str(tmp_path), capacity=5000)
    assert small.capacity == 5000
    small.close()
    code = """if True:
        import sys
        from distpool.transport.journal import Journal
        journal = Journal.attach(sys.argv[1], int(sys.argv[2]))
        journal.set_started(7 + journal.revoked(3))
        journal.append(b"from the worker")
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
    """
    master.revoke(2, 4)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    done = subprocess.run([sys.executable, "-c", code, master.path, str(master.size)], timeout=30)
    master.attached()
    if before:
        assert len(os.listdir("/proc/self/fd")) == before - 1
    assert done.returncode == -signal.SIGKILL
    assert (master.started, master.read_from(5)) == (8, b"the worker")
    master.close()
    assert os.listdir(tmp_path) == []


def test_attach_refuses_what_is_no_journal(tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_bytes(bytes(500))
    for path, size in ((str(short), 501), (str(short), HEADER), (str(short), -1), (str(tmp_path / "none"), 500)):
        with pytest.raises(OSError):
            Journal.attach(path, size)
    assert short.exists()


def test_create_without_memory_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(memfile, "allocate", full)
    for with_memfd in (True, False):
        if not with_memfd:
            monkeypatch.delattr(os, "memfd_create", raising=False)
        with pytest.raises(OSError, match="No space"):
            Journal.create(str(tmp_path))
        assert os.listdir(tmp_path) == []
    with pytest.raises(OSError, match="no memfd"):
        Journal.create(None)


def record_of(number: int) -> bytes:
    """Record `number` of the kill test: its length, its number, and bytes that depend on both."""
    length = number * 7919 % 1500
    return struct.pack("<IQ", length, number) + bytes([number % 251]) * length


def write_until_killed(path: str, size: int, socket_end: int) -> None:
    """The worker of the kill test: call n writes record n; what does not fit into the journal is sent first."""
    journal = Journal.attach(path, size)
    for number in range(1, 1 << 40):
        journal.set_started(number)
        record = record_of(number)
        if not journal.append(record):
            data = memoryview(journal.pending())
            while data:
                data = data[os.write(socket_end, data) :]
            journal.mark_sent(journal.written)
            assert journal.append(record)


def check(data: bytes) -> int:
    """Check that `data` is records 1, 2, 3, ... without gap or tear; how many."""
    position = number = 0
    while position < len(data):
        number += 1
        expected = record_of(number)
        assert data[position : position + len(expected)] == expected, f"record {number}"
        position += len(expected)
    assert position == len(data)
    return number


@needs_fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_kill_at_random_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "JOURNAL_SIZE", 20_000)
    chance = random.Random()
    complete = 0
    for _ in range(200):
        master = Journal.create()
        here, there = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                write_until_killed(master.path, master.size, there)
            finally:
                os._exit(1)
        os.close(there)
        received = bytearray()
        end = time.monotonic() + chance.random() * 0.006
        while (left := end - time.monotonic()) > 0:
            if select.select([here], [], [], left)[0]:
                received += os.read(here, 65536)
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        while data := os.read(here, 65536):
            received += data
        os.close(here)
        total = check(bytes(received) + master.read_from(len(received)))
        assert master.started in (total, total + 1), "exactly the running call is unknown"
        complete += total
        master.close()
    assert complete > 200
