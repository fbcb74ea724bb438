"""Buffers of one link: through shared memory where both ends can, and every lease comes back."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from wires import PATIENCE, End, ends, until

from distpool.transport.segments import Kept, Segments
from distpool.transport.shm import SegmentPool
from distpool.wire import messages
from distpool.wire.frames import Frame, Kind, SegmentRef


class Both:
    """Two ends that lend each other buffers."""

    def __init__(self, left: End, right: End) -> None:
        self.left, self.right = left, right
        self.pool = SegmentPool()
        left.link.shares_memory = right.link.shares_memory = True
        self.sender = Segments(left.link, self.pool)
        self.receiver = Segments(right.link, SegmentPool())
        self.freed = threading.Event()
        left.on_frame = self._on_left

    def _on_left(self, frame: Frame) -> None:
        assert frame.kind == Kind.SEGMENTS_FREE
        self.sender.on_free(messages.SegmentsFree.unpack(frame.control).segments)
        self.freed.set()

    def pass_on(self, buffer: Any, private: bool = False) -> Any:
        self.left.link.send(Kind.RESULTS, b"", b"", [self.sender.stage(buffer)])
        received = self.right.next_frame().buffers[0]
        assert isinstance(received, SegmentRef)
        return self.receiver.open(received, private)


@pytest.fixture
def both() -> Iterator[Both]:
    with ends() as (left, right):
        yield Both(left, right)


def test_a_buffer_crosses_and_its_lease_comes_back(both: Both) -> None:
    data = os.urandom(500_000)
    view = both.pass_on(data)
    assert bytes(view) == data and both.pool.bytes_in_use >= len(data)
    del view
    gc.collect()
    assert both.freed.wait(PATIENCE)
    until(lambda: both.pool.bytes_in_use == 0, "the segment is free")
    created = both.pool.created
    again = both.pass_on(b"x" * 500_000)
    assert bytes(again[:3]) == b"xxx" and both.pool.created == created, "it is used again"


def test_private_views_are_leases_too(both: Both) -> None:
    view = both.pass_on(b"p" * 300_000, private=True)
    view[:1] = b"q"
    assert bytes(view[:2]) == b"qp"
    del view
    gc.collect()
    until(lambda: both.pool.bytes_in_use == 0, "the segment is free")


def test_without_shared_memory_buffers_travel_as_they_are(both: Both) -> None:
    both.left.link.shares_memory = False
    data = bytearray(300_000)
    assert both.sender.stage(data) is data
    assert both.receiver.open(data) is data and both.pool.created == 0


def test_a_pool_without_room_lets_buffers_travel(both: Both) -> None:
    both.pool.limit = 1000
    data = bytearray(300_000)
    assert both.sender.stage(data) is data and both.pool.refused == 1


def test_one_segment_lent_several_times(both: Both) -> None:
    lease = both.pool.put(b"m" * 300_000)
    assert lease is not None
    lease.retain()
    views = []
    for _ in range(2):
        both.left.link.send(Kind.RESULTS, b"", b"", [both.sender.lend(lease)])
        views.append(both.receiver.open(both.right.next_frame().buffers[0]))
    views.pop()
    gc.collect()
    assert both.freed.wait(PATIENCE)
    assert both.pool.bytes_in_use > 0, "one of them is still looked at"
    assert bytes(views[0][:2]) == b"mm"
    views.pop()
    gc.collect()
    until(lambda: both.pool.bytes_in_use == 0, "both are back")


def test_what_is_freed_twice_or_unknown_is_ignored(both: Both) -> None:
    both.sender.on_free([12345, 12345])
    view = both.pass_on(b"z" * 300_000)
    (segment,) = both.sender._lent
    both.sender.on_free([segment, segment, segment])
    assert bytes(view[:1]) == b"z"


def test_a_closed_link_keeps_views_valid(both: Both) -> None:
    data = os.urandom(300_000)
    view = both.pass_on(data)
    both.sender.close()
    both.receiver.close()
    other = both.pool.put(b"other" * 60_000)
    assert bytes(view) == data, "its segment was not used for something else"
    del view, other
    gc.collect()


def test_nothing_is_lent_any_more_once_the_link_is_gone(both: Both) -> None:
    """Nobody would say that it is free: an answer to a dead worker kept its segment, and a descriptor, for good."""
    data = os.urandom(300_000)
    both.sender.close()
    assert both.sender.stage(data) is data and both.pool.bytes_in_use == 0


def test_a_link_that_goes_while_something_is_lent(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    put = both.pool.put

    def put_and_close(buffer: Any) -> Any:
        lease = put(buffer)
        both.sender.close()
        return lease

    monkeypatch.setattr(both.pool, "put", put_and_close)
    both.sender.stage(os.urandom(300_000))
    assert both.pool.bytes_in_use == 0


def test_a_kept_copy_holds_its_segment_until_it_is_gone(both: Both) -> None:
    kept = Kept(both.pool, both.left.link.loop.call_soon)
    data = bytearray(os.urandom(500_000))
    copy, lease = kept.keep(memoryview(data))
    assert lease is not None
    was, data[0] = data[0], data[0] ^ 1
    lease.retain()
    received = both.receiver.open(both.sender.lend(lease), private=True)
    assert received[0] == copy[0] == was
    received[0] = was ^ 1
    assert copy[0] == was, "what a reader writes is its own"
    del received
    gc.collect()
    assert both.freed.wait(PATIENCE)
    assert both.pool.bytes_in_use >= len(data), "the copy is still there"
    del copy
    gc.collect()
    until(lambda: both.pool.bytes_in_use == 0, "the segment is free")


def test_without_shared_memory_a_kept_copy_is_bytes(both: Both) -> None:
    copy, lease = Kept(SegmentPool(limit=0), both.left.link.loop.call_soon).keep(memoryview(b"x" * 300_000))
    assert copy == b"x" * 300_000 and lease is None


def test_a_segment_that_is_lent_again_just_when_its_last_lease_comes_back(both: Both) -> None:
    class Lent(dict[int, Any]):
        def setdefault(self, key: int, default: Any = None) -> Any:
            found = super().setdefault(key, default)
            if found:  # the leader comes between the two steps of `lend`
                both.sender.on_free([key])
            return found

    lease = both.pool.put(b"m" * 300_000)
    assert lease is not None
    lease.retain()
    both.sender.lend(lease)
    both.sender._lent = Lent(both.sender._lent)
    both.sender.lend(lease)
    both.sender.on_free([lease.segment_id])
    assert both.pool.bytes_in_use == 0
