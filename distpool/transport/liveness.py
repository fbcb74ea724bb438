"""Know exactly when the last view of a received buffer is gone (layer 2; imported by the first large buffer only).

Data flow:  mmap of a segment <- ctypes array (one per lease) <- memoryview that `pickle.loads` gets <- user's arrays
            ctypes array -> `datetime.time` -> `_Owner`, whose `__del__` reports the segment's id
`_Owner.__del__` runs on whatever thread drops the last view, at any bytecode: it calls one function that may only do
`SimpleQueue.put` or `deque.append`.

"Too early" here means that the sender overwrites memory which the user still reads.  What was tried:
- `weakref` on the memoryview given to pickle: numpy keeps a memoryview of its own on the same *exporter*; ours dies
  first.  A `PickleBuffer` is no exporter either.  So each lease has its own exporter: a ctypes array over the shared
  mmap, about 1 us.  (A Python class with `__buffer__` needs 3.12; an mmap per lease pays all page faults again.)
- `weakref` callback or `__del__` on that array: right, except in reference cycles.  The collector runs callbacks, and
  `__del__` of all that is unreachable in any order, before anything is freed; a user's `__del__` in the same cycle
  may then still read the array, or even bring it back to life.
- Hence an object which the collector cannot see inside the garbage: `datetime.time` is not tracked by the collector
  and does not show it its `tzinfo`, so the owner counts as reachable until the array is really torn down.  (Any class
  defined in Python is tracked, whatever its `__slots__`; a code object's constants would do as well, less readably.)
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from datetime import datetime as _datetime
from datetime import time, timedelta, tzinfo


class Gate:
    """What the owners of one link ask before they report: `released` is `None` once the link is gone.

    `floor`: leases with lower numbers are pinned, their segments are never given back.
    """

    __slots__ = ("floor", "released")

    def __init__(self, released: Callable[[int], None]) -> None:
        self.released: Callable[[int], None] | None = released
        self.floor = 0


class _Owner(tzinfo):
    """Dies with the array of one lease and reports it; a `tzinfo` only because that is what `time` holds."""

    __slots__ = ("_gate", "_number", "_segment_id")

    def __init__(self, gate: Gate, number: int, segment_id: int) -> None:
        self._gate = gate
        self._number = number
        self._segment_id = segment_id

    def __del__(self) -> None:
        gate = self._gate
        released = gate.released
        if released is not None and self._number >= gate.floor:
            released(self._segment_id)

    def utcoffset(self, moment: _datetime | None, /) -> timedelta | None:
        """Unused; abstract in `tzinfo`."""
        return None

    def dst(self, moment: _datetime | None, /) -> timedelta | None:
        """Unused; abstract in `tzinfo`."""
        return None

    def tzname(self, moment: _datetime | None, /) -> str | None:
        """Unused; abstract in `tzinfo`."""
        return None


def exporter_type(size: int) -> type[ctypes.Array[ctypes.c_ubyte]]:
    """The array type for a mapping of `size` bytes: 10 us and cyclic garbage each, so kept with the mapping."""
    return ctypes.c_ubyte * size


def lease_view(
    array_type: type[ctypes.Array[ctypes.c_ubyte]],
    mapping: mmap.mmap,
    nbytes: int,
    gate: Gate,
    number: int,
    segment_id: int,
) -> memoryview:
    """A writable view (format B) of the first `nbytes`; when it and all that was made of it is gone, `gate` hears."""
    array = array_type.from_buffer(mapping)
    array.owner = time(tzinfo=_Owner(gate, number, segment_id))  # type: ignore[attr-defined]
    return memoryview(array).cast("B")[:nbytes]
