"""Buffers in shared segments: right bytes, exact ends of life, nothing left behind, and a way out when memory is short.

The tests of liveness fail with each simpler way that `distpool.transport.liveness` names: a weakref on the memoryview
(numpy consumers), a weakref or `__del__` on the exporter (cycles).
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import gc
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distpool.transport import memfile, shm
from distpool.transport.shm import Lease, SegmentPool, SegmentViews, can_attach, map_private

KIB = 1024
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memfd and /proc")


class Side:
    """A pool and a receiver joined by a list of released segments, as a link would join them."""

    def __init__(self, pool: SegmentPool) -> None:
        self.pool = pool
        self.released: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.views = SegmentViews(self.released.put)

    def view(self, lease: Lease) -> memoryview:
        return self.views.view(lease.segment_id, lease.path, lease.size, lease.nbytes)

    def send(self, buffer: Any) -> memoryview:
        lease = self.pool.put(buffer)
        assert lease is not None
        self.leases = [*getattr(self, "leases", []), lease]
        return self.view(lease)

    def ended(self) -> list[int]:
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self.released.get_nowait())
        return found


@pytest.fixture(params=["memory", "named"])
def pool(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SegmentPool]:
    """A pool on memfds, and one on named files."""
    if request.param == "memory" and not hasattr(os, "memfd_create"):
        pytest.skip("no memfd here")
    made = SegmentPool(str(tmp_path), limit=64 << 20, memfd=request.param == "memory")
    yield made
    made.close()


@pytest.fixture
def side(pool: SegmentPool) -> Iterator[Side]:
    made = Side(pool)
    yield made
    made.views.close()


def placed(lease: Lease | None) -> Lease:
    assert lease is not None
    return lease


def data_of(nbytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def run(code: str, *arguments: object) -> str:
    """Run code in another process; its output."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


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


def test_a_message_that_lies_about_sizes_is_refused(side: Side, tmp_path: Path) -> None:
    lease = placed(side.pool.put(bytes(100_000)))
    short = tmp_path / "short"
    short.write_bytes(bytes(100))
    for path, size, nbytes in (
        (lease.path, lease.size, lease.size + 1),
        (lease.path, lease.size, 0),
        (lease.path, lease.size, -1),
        (lease.path, lease.size * 2, 5),
        (str(short), 4096, 100),
        (str(tmp_path), 4096, 100),
        (str(tmp_path / "none"), 4096, 100),
    ):
        with pytest.raises(OSError):
            side.views.view(7, path, size, nbytes)
        with pytest.raises(OSError):
            map_private(path, size, nbytes)
    assert side.view(lease) == bytes(100_000)
    with pytest.raises(OSError, match="do not fit"):
        side.views.view(lease.segment_id, lease.path, lease.size * 4, lease.size * 2)


def test_can_attach(pool: SegmentPool, tmp_path: Path) -> None:
    lease = placed(pool.put(bytes(100_000)))
    assert can_attach(lease.path, lease.size)
    assert not can_attach(lease.path, lease.size + 1)
    assert not can_attach(str(tmp_path / "none"), 10)
    assert not can_attach(str(tmp_path), 10)
    assert not can_attach(lease.path, 0)


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


# --- when a lease ends

CONSUMERS: dict[str, Callable[[memoryview], Any]] = {
    "memoryview": lambda view: view,
    "slice of a slice": lambda view: view[100:900][10:50],
    "cast": lambda view: view[:800].cast("d"),
    "read-only": lambda view: view.toreadonly()[3:],
    "PickleBuffer": pickle.PickleBuffer,
    "PickleBuffer.raw": lambda view: pickle.PickleBuffer(view).raw()[1:],
    "frombuffer": lambda view: np.frombuffer(view, "u1"),
    "frombuffer of a slice": lambda view: np.frombuffer(view[8:], "u1"),
    "array slice": lambda view: np.frombuffer(view, "u1")[5:10],
    "array of another type": lambda view: np.frombuffer(view, "f8")[10:20].view("u4")[::3],
    "transposed": lambda view: np.frombuffer(view, "u1").reshape(10, 100).T[3],
    "structured field": lambda view: np.frombuffer(view, [("a", "u4"), ("b", "u4")])["b"],
    "asarray": lambda view: np.asarray(view)[1:],
    "ndarray constructor": lambda view: np.ndarray((10,), "u1", view, 50),
    "interface of an array": lambda view: np.asarray(type("T", (), {"__array_interface__": _interface(view)})),
    "unpickled array": lambda view: _unpickled(view),
    "slice of an unpickled array": lambda view: _unpickled(view)[3:7],
    "memoryview of an array": lambda view: memoryview(np.frombuffer(view, "u1"))[4:],
    "array of a memoryview of an array": lambda view: np.frombuffer(memoryview(np.frombuffer(view, "u1")), "u1"),
    "ctypes": lambda view: (ctypes.c_char * 100).from_buffer(view, 8),
    "iterator": lambda view: iter(view),
    "flat": lambda view: np.frombuffer(view, "u1").flat,
    "in a structure": lambda view: {"a": [(np.frombuffer(view, "u1"),)]},
    "closure": lambda view: lambda: view,
}


def _interface(view: memoryview) -> dict[str, Any]:
    return {"shape": (10,), "typestr": "|u1", "data": view, "version": 3}


def _unpickled(view: memoryview) -> Any:
    buffers: list[pickle.PickleBuffer] = []
    body = pickle.dumps(np.zeros(view.nbytes, "u1"), protocol=5, buffer_callback=buffers.append)
    return pickle.loads(body, buffers=[view])


@pytest.mark.parametrize("name", CONSUMERS)
def test_a_lease_lives_as_long_as_any_consumer(side: Side, name: str) -> None:
    kept = CONSUMERS[name](side.send(data_of(1000)))
    gc.collect()
    assert side.ended() == [], "reported while somebody can still read it: the sender would overwrite the user's data"
    del kept
    gc.collect()
    assert side.ended() == [side.leases[0].segment_id], "never reported: the segment would be lost"


def test_bytes_made_of_a_view_do_not_hold_the_lease(side: Side) -> None:
    copies = [bytes(side.send(data_of(1000))), np.array(side.send(data_of(1000)))]
    assert len(side.ended()) == len(copies)


def test_an_explicit_release_ends_the_lease(side: Side) -> None:
    side.send(data_of(1000)).release()
    assert len(side.ended()) == 1


class Reader:
    """A user's object in a cycle, whose `__del__` reads the buffer one last time."""

    def __init__(self, buffer: Any, report: Callable[[bytes], object]) -> None:
        self.buffer = buffer
        self.report = report
        self.cycle = self

    def __del__(self) -> None:
        self.report(bytes(self.buffer[:10]))


@pytest.mark.parametrize("consume", [lambda view: view, lambda view: np.frombuffer(view, "u1")], ids=["view", "array"])
def test_a_finalizer_in_a_cycle_still_reads_the_lease(side: Side, consume: Callable[[memoryview], Any]) -> None:
    order: list[Any] = []
    side.views._released = order.append
    data = data_of(1000)
    Reader(consume(side.send(data)), order.append)
    gc.collect()
    assert order == [data[:10], side.leases[0].segment_id]


def test_an_object_brought_back_to_life_keeps_its_lease(side: Side) -> None:
    saved: list[Any] = []

    class Phoenix:
        def __init__(self, buffer: memoryview) -> None:
            self.buffer = buffer
            self.cycle = self

        def __del__(self) -> None:
            saved.append(self)

    data = data_of(1000)
    Phoenix(side.send(data))
    gc.collect()
    assert side.ended() == []
    assert saved[0].buffer == data
    saved.pop().cycle = None
    gc.collect()
    assert side.ended() == [side.leases[0].segment_id]


def test_each_view_of_a_segment_is_one_lease(side: Side) -> None:
    lease = placed(side.pool.put(data_of(1000)))
    first, second = side.view(lease), side.view(lease)
    del first
    assert side.ended() == [lease.segment_id]
    del second
    assert side.ended() == [lease.segment_id]


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


def test_arrays_outlive_their_link(side: Side) -> None:
    data = data_of(100_000)
    kept = np.frombuffer(side.send(data), "u1")
    side.views.close()
    side.views.close()
    gc.collect()
    assert kept.tobytes() == data
    del kept
    assert side.ended() == [], "nobody is there to be told"
    late = side.view(side.leases[0])
    assert late == data
    del late
    assert side.ended() == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_child_goes_on_reading_what_its_parent_drops(side: Side) -> None:
    data = data_of(100_000)
    kept = side.send(data)
    go_read, go_write = os.pipe()
    side.views.pin()
    child = os.fork()
    if child == 0:
        os.read(go_read, 1)
        forbidden = side.pool.put(b"x" * 100_000)
        os._exit(0 if kept == data and forbidden is None else 1)
    del kept
    assert side.ended() == []
    after = side.send(b"y" * 100_000)
    os.write(go_write, b"!")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for descriptor in (go_read, go_write):
        os.close(descriptor)
    del after
    assert side.ended() == [side.leases[1].segment_id], "later leases are not pinned"


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


def test_private_mappings_share_memory_and_keep_their_own_writes(pool: SegmentPool) -> None:
    data = data_of(300_000)
    lease = placed(pool.publish(data))
    first = map_private(lease.path, lease.size, lease.nbytes)
    second = map_private(lease.path, lease.size, lease.nbytes)
    array = np.frombuffer(first, "u1")
    array[:] = 7
    assert second == data
    assert not second.readonly
    lease.release()
    pool.trim()
    for _ in range(3):
        placed(pool.put(bytes(300_000)))
    pool.close()
    assert second == data
    assert (array == 7).all()


def test_a_private_view_is_a_lease_and_keeps_its_writes(side: Side) -> None:
    data = data_of(300_000)
    lease = placed(side.pool.put(data))
    message = (lease.segment_id, lease.path, lease.size, lease.nbytes)
    first = np.frombuffer(side.views.view(*message, private=True), "u1")
    first[:] = 7
    shared = side.view(lease)
    assert shared == data, "a retried call must see what the caller has sent"
    second = side.views.view(*message, private=True)[5:]
    shared[10] ^= 255
    assert second[5] == shared[10], "the pages are shared until they are written"
    del shared
    assert side.ended() == [lease.segment_id]
    del first
    assert side.ended() == [lease.segment_id]
    del second
    assert side.ended() == [lease.segment_id]


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
    memfile.discard_files(str(tmp_path), sender.pid + 1)
    assert len(list(tmp_path.iterdir())) == (2 if kind == "named" else 0)
    memfile.discard_files(str(tmp_path), sender.pid)
    assert list(tmp_path.iterdir()) == []
    memfile.discard_files(str(tmp_path / "none"), sender.pid)
    assert (kept == 65).all() and kept.size == 300_000
    with pytest.raises(OSError):
        views.view(*messages[1])
    assert not can_attach(messages[1][1], messages[1][2])


@pytest.mark.parametrize("nbytes", [1, 4096, 4097, 100_000, 256 * KIB, 80_000_000, (1 << 30) + 1])
def test_rounded_sizes(nbytes: int) -> None:
    size = shm.rounded(nbytes)
    assert nbytes <= size <= nbytes * 1.125 + mmap.PAGESIZE
    assert size % mmap.PAGESIZE == 0


def test_reading_less_than_announced_is_an_error(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb+") as file:
        memfile.write_at(file.fileno(), memoryview(b"abc"), 0)
        with pytest.raises(OSError, match="shorter"):
            memfile.read_into(file.fileno(), bytearray(4))
        memfile.allocate(file.fileno(), 10_000)
        assert os.fstat(file.fileno()).st_size == 10_000
