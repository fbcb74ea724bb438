"""The receiving side of shared segments: mapping, private mappings, refusals, and the end of a link."""

from __future__ import annotations

import gc
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sides import Side, data_of, joined, placed

from distpool.transport import memfile
from distpool.transport.shm import SegmentPool
from distpool.transport.views import can_attach, map_private


@pytest.fixture(params=["memory", "named"])
def side(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Side]:
    with joined(request.param, tmp_path) as made:
        yield made


@pytest.fixture
def pool(side: Side) -> SegmentPool:
    return side.pool


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


def test_each_view_of_a_segment_is_one_lease(side: Side) -> None:
    lease = placed(side.pool.put(data_of(1000)))
    first, second = side.view(lease), side.view(lease)
    del first
    assert side.ended() == [lease.segment_id]
    del second
    assert side.ended() == [lease.segment_id]


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


def test_private_mappings_share_memory_and_keep_their_own_writes(pool: SegmentPool) -> None:
    data = data_of(300_000)
    lease = placed(pool.put(data))
    first = map_private(lease.path, lease.size, lease.nbytes)
    second = map_private(lease.path, lease.size, lease.nbytes)
    array = np.frombuffer(first, "u1")
    array[:] = 7
    assert second == data
    assert not second.readonly
    lease.abandon()  # it is not used again
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


def test_a_pin_before_the_first_view_pins_nothing(side: Side) -> None:
    side.views.pin()
    side.send(data_of(1000)).release()
    assert side.ended() == [side.leases[0].segment_id]


# -- short of descriptors or mappings ------------------------------------------------------------------------------


@pytest.mark.parametrize("lacking", ["descriptors", "mappings"])
def test_bytes_are_copied_and_the_lease_ends_at_once(side: Side, lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = placed(side.pool.put(data_of(5000)))
    with monkeypatch.context() as patch:
        if lacking == "descriptors":
            patch.setattr(memfile, "has_spare", lambda descriptor: False)
        else:
            patch.setattr(mmap, "mmap", refuse)
        copy = side.view(lease)
    assert side.ended() == [lease.segment_id]
    assert copy == data_of(5000) and not copy.readonly
    lease.release()
    assert placed(side.pool.put(b"z" * 5000)).segment_id == lease.segment_id
    assert copy == data_of(5000)
    del copy
    assert side.ended() == [], "once"


def refuse(*arguments: object, **options: object) -> None:
    raise OSError("no more")


def test_a_copy_after_the_end_of_the_link_is_not_reported(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = placed(side.pool.put(data_of(5000)))
    side.views.close()
    monkeypatch.setattr(memfile, "has_spare", lambda descriptor: False)
    assert side.view(lease) == data_of(5000) and side.ended() == []


# -- mappings that are kept ----------------------------------------------------------------------------------------


def test_a_segment_is_mapped_once(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = placed(side.pool.put(data_of(5000)))
    side.view(lease).release()
    monkeypatch.setattr(memfile, "open_checked", refuse)
    assert side.view(lease) == data_of(5000), "mapping costs more than copying"
    with pytest.raises(OSError):
        side.views.view(lease.segment_id, lease.path, lease.size, lease.nbytes, private=True)


def test_what_the_sender_has_freed_is_unmapped_by_the_next_mapping(side: Side) -> None:
    lease = placed(side.pool.put(data_of(5000)))
    side.view(lease).release()
    lease.release()
    side.pool.trim()
    assert list(side.views._mappings) == [lease.segment_id]
    other = side.send(data_of(700_000))
    assert list(side.views._mappings) == [side.leases[-1].segment_id]
    other.release()


def test_a_closed_link_keeps_no_mapping(side: Side) -> None:
    kept = side.send(data_of(5000))
    side.views.close()
    assert not side.views._mappings and kept == data_of(5000)
    again = side.view(side.leases[0])
    assert not side.views._mappings and again == data_of(5000)
