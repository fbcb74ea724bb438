"""Large buffers between processes of one host: the receiving side (layer 2; `shm` draws the data flow).

    view(segment_id, path, size, nbytes) -> memoryview -> pickle.loads(buffers=[...]) -> arrays of the user
                                                                 the last of them gone -> released(segment_id)

No thread of its own: `view` runs where messages are read, `released` inside finalizers on any thread.  How the end of
the last array is known exactly: `liveness`.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable

from distpool.hints import TYPE_CHECKING, Any
from distpool.transport import memfile

if TYPE_CHECKING:
    import ctypes

    from distpool.transport.liveness import Gate


class SegmentViews:
    """Receiving side, one per link: `view()` maps a lease; `released(segment_id)` is called once per lease at its end.

    `released` runs inside finalizers, on any thread: it may only do `SimpleQueue.put` or `deque.append`.

    Example: `value = pickle.loads(body, buffers=[views.view(1, "/proc/17/fd/5", 1 << 20, 1000000)])`
    """

    def __init__(self, released: Callable[[int], None]) -> None:
        self._released = released
        self._gate: Gate | None = None
        self._number = 0
        self._closed = False
        # Protects the four above and the cache; `released` never takes it.
        self._lock = threading.Lock()
        #: segment_id -> mapping and its array type; kept after a lease, because mapping costs more than copying.
        self._mappings: dict[int, tuple[mmap.mmap, type[ctypes.Array[ctypes.c_ubyte]]]] = {}
        memfile.reserve()

    def view(self, segment_id: int, path: str, size: int, nbytes: int, *, private: bool = False) -> memoryview:
        """A writable view of one lease; whatever is made of it (arrays, slices) keeps the lease alive.

        Call it while the message is being read: `path` ends with the sender's process.  `OSError` when the segment
        cannot be opened.  With few descriptors left, or none, the bytes are copied and the lease ends at once.
        `private`: for bytes that others read too, at once (function payloads) or later (a call that may be retried):
        what is written stays here (copy on write); the mapping ends with the lease, so it pays page faults each time.
        """
        liveness = _liveness()
        if not 0 < nbytes <= size:
            raise OSError(f"{nbytes} bytes do not fit into a segment of {size}")
        with self._lock:
            known = None if private else self._mappings.get(segment_id)
            if known is None:
                made = self._attach(path, size, nbytes, private, liveness is not None)
                if liveness is None or isinstance(made, bytearray):
                    if not self._closed:
                        self._released(segment_id)
                    return memoryview(made)
                known = made, liveness.exporter_type(size)
                if not self._closed and not private:
                    self._mappings[segment_id] = known
            elif nbytes > len(known[0]):
                raise OSError(f"{nbytes} bytes do not fit into segment {segment_id} of {len(known[0])}")
            if self._gate is None:
                self._gate = liveness.Gate(self._released)
                if self._closed:
                    self._gate.released = None
            self._number += 1
            view: memoryview = liveness.lease_view(known[1], known[0], nbytes, self._gate, self._number, segment_id)
            return view

    def pin(self) -> None:
        """Never report the leases that are alive now: call it before `os.fork`, whose child goes on reading them.

        No lock: a finalizer may fork inside of `view`, and what is in the making elsewhere is not in the child's hands.
        """
        if self._gate is not None:
            self._gate.floor = self._number + 1

    def close(self) -> None:
        """The link is gone: report nothing more, keep no mapping.  Arrays of the user stay valid."""
        with self._lock:
            self._closed = True
            if self._gate is not None:
                self._gate.released = None
            self._mappings.clear()

    def _attach(self, path: str, size: int, nbytes: int, private: bool, map_it: bool) -> mmap.mmap | bytearray:
        """Map a segment for the first time, or read it where the process is short of descriptors."""
        self._forget_freed()
        access = mmap.ACCESS_COPY if private else mmap.ACCESS_WRITE
        descriptor = memfile.open_checked(path, size, writable=not private)
        try:
            if map_it and memfile.has_spare(descriptor):
                try:
                    mapping = mmap.mmap(descriptor, size, access=access)
                except OSError:
                    pass  # too many mappings, or no descriptor for the one that mmap duplicates
                else:
                    memfile.populate(mapping, nbytes)
                    return mapping
            data = bytearray(nbytes)
            memfile.read_into(descriptor, data)
            return data
        finally:
            os.close(descriptor)
            memfile.reserve()

    def _forget_freed(self) -> None:
        """Unmap the segments that their sender has truncated: it does that only when no lease is left (lock held)."""
        for segment_id, (mapping, _) in list(self._mappings.items()):
            if mapping.size() < len(mapping):
                del self._mappings[segment_id]


def _liveness() -> Any:
    """The module, or None: there is no descriptor left to load it with."""
    try:
        from distpool.transport import liveness
    except (ImportError, OSError):
        return None
    return liveness


def map_private(path: str, size: int, nbytes: int) -> memoryview:
    """Map a segment whose lease lasts for as long as the view: shared until somebody writes, and writes stay in this
    process.

    Nobody is told when it ends; for a lease that is to be given back, use `SegmentViews.view(private=True)`.
    `OSError` when it cannot be opened.  The memory is unmapped when nothing uses the view any more.
    """
    if not 0 < nbytes <= size:
        raise OSError(f"{nbytes} bytes do not fit into a segment of {size}")
    descriptor = memfile.open_checked(path, size, writable=False)
    try:
        mapping = mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY)
    finally:
        os.close(descriptor)
    memfile.populate(mapping, nbytes)
    return memoryview(mapping)[:nbytes]


def can_attach(path: str, size: int) -> bool:
    """Whether this process can map a segment of a peer: both on one host, same user, same view of /proc."""
    try:
        descriptor = memfile.open_checked(path, size)
        try:
            mmap.mmap(descriptor, size).close()
        finally:
            os.close(descriptor)
    except (OSError, ValueError):
        return False
    return True
