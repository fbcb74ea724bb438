"""The end of the last view of a buffer is known exactly.

Fail with each simpler way that `distpool.transport.liveness` names: a weakref on the memoryview (numpy consumers), a
weakref or `__del__` on the exporter (cycles).
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sides import Side, data_of, joined

from distpool.transport import liveness


@pytest.fixture(params=["memory", "named"])
def side(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Side]:
    with joined(request.param, tmp_path) as made:
        yield made


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


# -- by itself -----------------------------------------------------------------------------------------------------


@pytest.fixture
def mapping() -> mmap.mmap:
    return mmap.mmap(-1, 8192)


def view_of(mapping: mmap.mmap, gate: liveness.Gate, number: int, segment_id: int) -> memoryview:
    return liveness.lease_view(liveness.exporter_type(len(mapping)), mapping, 100, gate, number, segment_id)


def test_a_view_is_writable_bytes_of_the_mapping(mapping: mmap.mmap) -> None:
    view = view_of(mapping, liveness.Gate(lambda segment_id: None), 1, 5)
    assert (view.format, view.nbytes, view.readonly) == ("B", 100, False)
    view[:3] = b"abc"
    assert mapping[:3] == b"abc"


def test_leases_of_one_mapping_are_reported_one_by_one(mapping: mmap.mmap) -> None:
    ended: list[int] = []
    gate = liveness.Gate(ended.append)
    first, second = view_of(mapping, gate, 1, 5), view_of(mapping, gate, 2, 6)
    del second
    assert ended == [6]
    del first
    assert ended == [6, 5]


def test_pinned_leases_and_those_of_a_closed_link_are_not_reported(mapping: mmap.mmap) -> None:
    ended: list[int] = []
    gate = liveness.Gate(ended.append)
    first, second, third = (view_of(mapping, gate, number, number) for number in (1, 2, 3))
    gate.floor = 2
    del first
    assert ended == []
    del second
    assert ended == [2]
    gate.released = None
    del third
    assert ended == [2]


def test_the_mapping_lives_as_long_as_a_view(mapping: mmap.mmap) -> None:
    view = view_of(mapping, liveness.Gate(lambda segment_id: None), 1, 5)
    with pytest.raises(BufferError):
        mapping.close()
    view.release()
    mapping.close()


def test_the_owner_is_a_time_zone_without_times() -> None:
    """`datetime.time` holds a `tzinfo` and does not show it to the collector; nobody shall be surprised by its look."""
    owner = liveness._Owner(liveness.Gate(lambda segment_id: None), 1, 1)
    assert owner.utcoffset(None) is owner.dst(None) is owner.tzname(None) is None
    assert not gc.is_tracked(__import__("datetime").time(tzinfo=owner))
