"""Buffers in shared segments: right bytes, nothing left behind, and a way out when memory is short."""

from __future__ import annotations

import array
import errno
import mmap
import os
import pickle
import queue
import random
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sides import Side, data_of, joined, linux, placed, run

from distpool.transport import memfile, shm
from distpool.transport.shm import Lease, SegmentPool, SegmentViews, can_attach

KIB = 1024


@pytest.fixture(params=["memory", "named"])
def side(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Side]:
    with joined(request.param, tmp_path) as made:
        yield made


@pytest.fixture
def pool(side: Side) -> SegmentPool:
    return side.pool


# --- placing and viewing


@pytest.mark.parametrize("nbytes", [1, 4095, 4096, 256 * KIB, 300_001, 20_000_000])
def test_bytes_arrive(side: Side, nbytes: int) -> None:
    for seed in range(3):  # new segment; first reuse (maps); second reuse
        data = data_of(nbytes, seed)
        view = side.send(data)
        assert view == data
        assert (view.format, view.ndim, view.contiguous, view.readonly) == ("B", 1, True, False)
        del view
        side.leases[-1].release()
    assert (side.pool.created, side.pool.reused) == (1, 2)


def test_an_array_arrives_by_pickle_and_is_writable(side: Side) -> None:
    sent = np.arange(100_000.0).reshape(100, 1000)
    buffers: list[pickle.PickleBuffer] = []
    body = pickle.dumps(sent, protocol=5, buffer_callback=buffers.append)
    got = pickle.loads(body, buffers=[side.send(buffers[0])])
    assert np.array_equal(got, sent)
    got += 1
    assert np.array_equal(got, sent + 1)
    assert sent[0, 0] == 0


def test_every_contiguous_buffer_can_be_put(side: Side) -> None:
    numbers = np.arange(60_000).reshape(200, 300)
    fortran = np.asfortranarray(numbers)
    for buffer in (bytes(5000), bytearray(5000), array.array("d", [1.5] * 900), memoryview(b"x" * 5000)[10:4000]):
        assert bytes(side.send(buffer)) == bytes(memoryview(buffer).cast("B"))
    assert bytes(side.send(numbers)) == numbers.tobytes()
    assert bytes(side.send(fortran)) == fortran.tobytes("F")
    with pytest.raises(BufferError):
        side.pool.put(numbers[:, ::2])


def test_an_empty_buffer_goes_inline(pool: SegmentPool) -> None:
    assert pool.put(b"") is None
    assert pool.bytes_held == 0


def test_another_process_reads_and_writes(pool: SegmentPool) -> None:
    data = data_of(500_000)
    lease = placed(pool.put(data))
    code = """if True:
        import hashlib, sys
        from distpool.transport.shm import SegmentViews
        path, size, nbytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
        ended = []
        views = SegmentViews(ended.append)
        view = views.view(1, path, size, nbytes)
        print(hashlib.sha256(view).hexdigest())
        view[:5] = b"hello"
        assert ended == []
        del view
        assert ended == [1]
        for name in ("numpy", "pickle5"):
            assert name not in sys.modules
    """
    import hashlib

    assert run(code, lease.path, lease.size, lease.nbytes) == hashlib.sha256(data).hexdigest()
    assert bytes(Side(pool).view(lease)) == b"hello" + data[5:]


def test_ctypes_is_imported_by_the_first_large_buffer_only() -> None:
    code = "import sys; import distpool.transport.shm, distpool.transport.journal; print('ctypes' in sys.modules)"
    assert run(code) == "False"


def test_random_lives_on_two_threads_never_mix_data(pool: SegmentPool) -> None:
    """Sender and receiver as on a link: what is held must keep its bytes while others come and go."""
    side = Side(pool)
    faults: list[str] = []
    lent: dict[int, Lease] = {}
    messages: queue.Queue[tuple[int, Lease] | None] = queue.Queue(4)

    def receive() -> None:
        chance = random.Random(1)
        held: list[tuple[int, Any]] = []
        while (message := messages.get(timeout=20)) is not None:
            number, lease = message
            view = side.view(lease)
            held.append((number, chance.choice([np.frombuffer(view, "u1")[1:], view[1:], np.asarray(view)[5::7]])))
            del view
            if len(held) > 12:
                number, value = held.pop(chance.randrange(len(held)))
                if len(set(bytes(value))) != 1 or value[0] != number % 256:
                    faults.append(f"buffer {number} was overwritten")
                del value

    receiver = threading.Thread(target=receive)
    receiver.start()
    chance = random.Random(2)
    for number in range(1500):
        for segment_id in side.ended():
            lent.pop(segment_id).release()
        lease = placed(pool.put(bytes([number % 256]) * chance.randrange(20_000, 90_000)))
        assert lease.segment_id not in lent
        lent[lease.segment_id] = lease
        messages.put((number, lease), timeout=20)
        if number % 300 == 0:
            pool.trim()
    messages.put(None)
    receiver.join(20)
    assert faults == []
    assert pool.reused > 500
    for segment_id in side.ended():
        lent.pop(segment_id).release()
    assert lent == {} and pool.bytes_in_use == 0


# --- the pool


def test_references_of_a_lease(pool: SegmentPool) -> None:
    lease = placed(pool.put(bytes(10_000)))
    lease.retain()
    lease.release()
    assert pool.bytes_in_use == lease.size
    lease.release()
    assert pool.bytes_in_use == 0
    second = placed(pool.put(bytes(10_000)))
    assert second.segment_id == lease.segment_id
    lease.release()
    lease.abandon()
    assert pool.bytes_in_use == second.size, "a surplus release must not free another lease of the segment"
    with pytest.raises(ValueError, match="has ended"):
        lease.retain()


def test_many_threads_release_one_lease(pool: SegmentPool) -> None:
    for _ in range(20):
        lease = placed(pool.put(bytes(10_000)))
        for _ in range(7):
            lease.retain()
        threads = [threading.Thread(target=lease.release) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert (pool.bytes_in_use, pool.created) == (0, 1)


def test_best_fit_but_not_much_too_big(pool: SegmentPool) -> None:
    leases = {size: placed(pool.put(bytes(size))) for size in (4_000_000, 1_000_000, 300_000, 2_000_000)}
    for lease in leases.values():
        lease.release()
    assert placed(pool.put(bytes(900_000))).segment_id == leases[1_000_000].segment_id
    assert placed(pool.put(bytes(1_800_000))).segment_id == leases[2_000_000].segment_id
    small = placed(pool.put(bytes(900_000)))
    assert small.segment_id not in {lease.segment_id for lease in leases.values()}, "4 MB for 0.9 MB is a waste"
    assert placed(pool.put(bytes(290_000))).segment_id == leases[300_000].segment_id


def test_a_reused_segment_may_hold_more_than_before(side: Side) -> None:
    side.send(b"a" * 250_000).release()
    side.leases[-1].release()
    big = placed(side.pool.put(b"b" * 262_000))  # the same class of sizes, further than what is allocated
    assert big.segment_id == side.leases[-1].segment_id
    assert side.view(big) == b"b" * 262_000
    big.release()
    assert side.send(b"c" * 262_100) == b"c" * 262_100


def test_the_limit_counts_everything_and_idle_segments_make_room(tmp_path: Path) -> None:
    pool = SegmentPool(str(tmp_path), limit=1_000_000)
    assert pool.put(bytes(1_000_001)) is None
    first, second = placed(pool.put(bytes(400_000))), placed(pool.put(bytes(400_000)))
    assert pool.put(bytes(400_000)) is None
    assert pool.refused == 2
    first.release()
    second.release()
    assert pool.bytes_held <= 1_000_000
    assert pool.put(bytes(950_000)) is not None
    assert pool.bytes_held <= 1_000_000
    pool.close()
    assert SegmentPool(limit=0).put(b"x") is None
    assert 0 < shm.default_limit() <= 4 << 30
    assert SegmentPool().limit == shm.default_limit()


def test_trim_frees_memory_that_receivers_have_mapped(side: Side) -> None:
    other = side.send(bytes(50_000))
    side.send(bytes(300_000)).release()
    segment_id = side.leases[1].segment_id
    mapping = side.views._mappings[segment_id][0]
    side.leases[1].release()
    side.pool.trim(keep=100.0)
    assert mapping.size() > 0
    side.pool.trim()
    assert mapping.size() == 0, "the file is truncated: its pages are free although it is still mapped here"
    assert (side.pool.bytes_held, side.pool.bytes_in_use) == (side.leases[0].size,) * 2
    del mapping
    side.send(bytes(700_000))
    assert segment_id not in side.views._mappings, "the next new mapping notices"
    assert other == bytes(50_000)


def test_close_leaves_what_is_leased(side: Side, tmp_path: Path) -> None:
    view = side.send(b"x" * 300_000)
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    side.pool.close()
    side.pool.close()
    assert side.pool.put(b"x" * 300_000) is None
    assert view == b"x" * 300_000
    side.leases[0].release()
    assert (side.pool.bytes_held, side.pool.bytes_in_use) == (0, 0)
    assert os.listdir(tmp_path) == []
    if descriptors:
        assert len(os.listdir("/proc/self/fd")) == descriptors - 1


def test_an_abandoned_segment_is_not_used_again(side: Side) -> None:
    view = side.send(b"x" * 300_000)
    side.leases[0].retain()
    side.leases[0].abandon()
    side.leases[0].release()
    assert (side.pool.bytes_held, side.pool.bytes_in_use) == (0, 0)
    side.pool.trim()
    for _ in range(3):
        assert placed(side.pool.put(b"y" * 300_000)).segment_id != side.leases[0].segment_id
    assert view == b"x" * 300_000


# --- payloads that all workers of a host share


# --- shortage


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), MemoryError()], ids=["ENOSPC", "MemoryError"])
def test_no_memory_means_inline(pool: SegmentPool, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    idle, held = placed(pool.put(bytes(200_000))), placed(pool.put(bytes(300_000)))
    idle.release()

    def fail(*arguments: object, **options: object) -> None:
        raise error

    for name in ("write_at", "create"):
        with monkeypatch.context() as patch:
            patch.setattr(memfile, name, fail)
            assert pool.put(bytes(900_000)) is None
            assert pool.bytes_in_use == pool.bytes_held == held.size, "idle segments are given back in need"
    assert pool.refused == 2
    assert placed(pool.put(b"z" * 900_000)).nbytes == 900_000


def test_an_interrupt_while_copying_loses_no_segment(pool: SegmentPool, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    for name in ("write_at", "create"):
        with monkeypatch.context() as patch:
            patch.setattr(memfile, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                pool.put(bytes(900_000))
        assert pool.bytes_in_use == 0
        pool.trim()
        assert pool.bytes_held == 0
    assert placed(pool.put(b"z" * 900_000)).nbytes == 900_000


SHORT_OF_DESCRIPTORS = """if True:
    import os, queue, resource, sys
    from distpool.transport.shm import SegmentPool, SegmentViews
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    sender = SegmentPool(sys.argv[1], memfd=sys.argv[2] == "memory")
    ended = queue.SimpleQueue()
    views = SegmentViews(ended.put)
    leases = []
    while (lease := sender.put(bytes([len(leases)]) * 50_000)) is not None:
        leases.append(lease)
    assert 30 < len(leases) < 50, len(leases)
    spare = [os.open("/", os.O_RDONLY) for _ in range(12)]   # for the program itself
    for descriptor in spare:
        os.close(descriptor)
    copies = [views.view(l.segment_id, l.path, l.size, l.nbytes) for l in leases]
    assert all(copy == bytes([n]) * 50_000 for n, copy in enumerate(copies))
    copied = ended.qsize()
    assert copied > 0, "some must have been copied"
    spare = [os.open("/", os.O_RDONLY) for _ in range(12)]
    for lease in leases:
        lease.release()
    assert sender.put(bytes(50_000)) is not None
    print("ok")
"""


WITHOUT_DESCRIPTORS = """if True:
    import os, queue, resource, sys
    from distpool.transport.shm import SegmentPool, SegmentViews
    sender = SegmentPool(sys.argv[1], memfd=sys.argv[2] == "memory")
    leases = [sender.put(bytes([n]) * 50_000) for n in range(3)]
    ended = queue.SimpleQueue()
    views = SegmentViews(ended.put)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    hog = []
    try:
        while True:
            hog.append(os.open("/", os.O_RDONLY))
    except OSError:
        pass
    for n, lease in enumerate(leases):   # the first of them would import what it needs
        assert views.view(lease.segment_id, lease.path, lease.size, lease.nbytes) == bytes([n]) * 50_000
        assert ended.get_nowait() == lease.segment_id
    for descriptor in hog:
        os.close(descriptor)
    view = views.view(leases[0].segment_id, leases[0].path, leases[0].size, leases[0].nbytes)
    assert ended.empty(), "mapped"
    del view
    print("ok", *[ended.get(timeout=10)])
"""


@pytest.mark.parametrize("kind", [pytest.param("memory", marks=linux), "named"])
def test_no_descriptor_at_all_to_receive_with(tmp_path: Path, kind: str) -> None:
    """It cost the link: the worker ended, or the master took it for dead."""
    assert run(WITHOUT_DESCRIPTORS, tmp_path, kind) == "ok 1"


@pytest.mark.parametrize("kind", [pytest.param("memory", marks=linux), "named"])
def test_descriptors_exhausted(tmp_path: Path, kind: str) -> None:
    assert run(SHORT_OF_DESCRIPTORS, tmp_path, kind) == "ok"


@linux
def test_a_full_file_system_means_inline_and_no_sigbus(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("may not mount a small tmpfs")
    try:
        code = """if True:
            import sys
            from distpool.transport.shm import SegmentPool
            from distpool.transport.journal import Journal
            import os
            pool = SegmentPool(sys.argv[1], memfd=False)
            leases = [pool.put(b"x" * 300_000) for _ in range(5)]
            assert [lease is None for lease in leases] == [False] * 3 + [True] * 2, leases
            del os.memfd_create
            try:
                while True:
                    Journal.create(sys.argv[1])
            except OSError as error:
                print(error.errno)
        """
        assert run(code, small) == str(errno.ENOSPC)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


# --- what is left behind


def test_named_files_are_private_and_end_with_their_segments(tmp_path: Path) -> None:
    pool = SegmentPool(str(tmp_path), memfd=False)
    leases = [placed(pool.put(bytes(100_000))) for _ in range(3)]
    files = list(tmp_path.iterdir())
    assert len(files) == 3
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    leases[0].release()
    pool.trim()
    assert len(list(tmp_path.iterdir())) == 2
    for lease in leases:
        lease.release()
    pool.close()
    assert list(tmp_path.iterdir()) == []


def test_a_pool_without_a_directory_makes_and_removes_one() -> None:
    pool = SegmentPool(memfd=False)
    lease = placed(pool.put(bytes(100_000)))
    directory = Path(lease.path).parent
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    second = placed(pool.put(bytes(100_000)))
    assert Path(second.path).parent == directory
    pool.close()
    assert not directory.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_directories_go_at_the_end_of_the_program() -> None:
    """That of the program and that of its worker; children of the program leave it alone, and exit hooks of the user's,
    registered before it was made, still find the workers and what is sent to them."""
    code = """if True:
        import atexit, os, sys
        if hasattr(os, "memfd_create"):
            del os.memfd_create
        import distpool, numpy
        from distpool.node import node
        def ask(pid):  # what a function has captured is kept in a segment
            captured = numpy.zeros(1 << 20, "u1")
            return distpool.remotecall_fetch(lambda: len(captured), pid)
        def end():
            print(ask(2), os.path.exists(own), flush=True)
        atexit.register(end)
        distpool.addprocs(1)
        def on_worker():
            from distpool.node import node
            node.existing().segments._memfd = False
            os.__dict__.pop("memfd_create", None)
            assert ask(1) == 1 << 20
            return node.existing().segments._own_directory
        other = distpool.remotecall_fetch(on_worker, 2)
        ask(2)
        own = node.existing().segments._own_directory
        print(own, other, os.path.exists(other), flush=True)
        child = os.fork()
        if not child:
            atexit.unregister(end)
            sys.exit()
        os.waitpid(child, 0)
        print(os.path.exists(own), flush=True)
    """
    # From 3.12 on, Python warns of `fork` in a program with threads.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    own, other, *said = done.stdout.split()
    assert (said, done.stderr) == (["True", "True", str(1 << 20), "True"], "")
    assert own.rpartition("/")[2].startswith("distpool-") and own != other
    assert not os.path.exists(own) and not os.path.exists(other)


@linux
def test_no_memfd_and_no_proc_fall_back_on_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, flags: int = 0) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented")

    with monkeypatch.context() as patch:
        patch.setattr(os, "memfd_create", refuse)
        assert Path(placed(SegmentPool(str(tmp_path)).put(bytes(5000))).path).parent == tmp_path
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "samestat", lambda one, other: False)  # /proc of another pid namespace
        assert Path(placed(SegmentPool(str(tmp_path)).put(bytes(5000))).path).parent == tmp_path


SENDER = """if True:
    import sys, time
    from distpool.transport.shm import SegmentPool
    pool = SegmentPool(sys.argv[1], memfd=sys.argv[2] == "memory")
    leases = [pool.put(bytes([65 + n]) * 300_000) for n in range(2)]
    for lease in leases:
        print(lease.segment_id, lease.path, lease.size, lease.nbytes, flush=True)
    time.sleep(50)
"""


@pytest.mark.parametrize("kind", [pytest.param("memory", marks=linux), "named"])
def test_a_killed_sender_leaves_arrays_valid_and_nothing_else(tmp_path: Path, kind: str) -> None:
    sender = subprocess.Popen([sys.executable, "-c", SENDER, tmp_path, kind], stdout=subprocess.PIPE, text=True)
    assert sender.stdout is not None
    lines = [sender.stdout.readline().split() for _ in range(2)]
    messages = [(int(number), path, int(size), int(nbytes)) for number, path, size, nbytes in lines]
    views = SegmentViews(lambda segment_id: None)
    kept = np.frombuffer(views.view(*messages[0]), "u1")
    sender.send_signal(signal.SIGKILL)
    sender.wait(20)
    sender.stdout.close()
    left = list(tmp_path.iterdir())
    assert len(left) == (2 if kind == "named" else 0)
    for path in left:
        path.unlink()
    assert (kept == 65).all() and kept.size == 300_000
    with pytest.raises(OSError):
        views.view(*messages[1])
    assert not can_attach(messages[1][1], messages[1][2])


@pytest.mark.parametrize("nbytes", [1, 4096, 4097, 100_000, 256 * KIB, 80_000_000, (1 << 30) + 1])
def test_rounded_sizes(nbytes: int) -> None:
    size = shm.rounded(nbytes)
    assert nbytes <= size <= nbytes * 1.125 + mmap.PAGESIZE
    assert size % mmap.PAGESIZE == 0
