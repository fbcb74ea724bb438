"""Large buffers between processes of one host, without pickling or socket copies: the sending side (layer 2).

Data flow:

    sender                                             receiver
    SegmentPool.put(buffer) -> Lease                   SegmentViews.view(id, path, size, nbytes) -> memoryview
      copy into a free segment, else a new one           mapped once per segment, kept for the next lease
      Lease(segment_id, path, size, nbytes) ------->     pickle.loads(buffers=[view]); user's arrays live in the segment
      Lease.release() -> segment is free again <----     last array gone: released(segment_id)

No thread of its own.  The pool's methods run on any thread but never in a finalizer (they take a lock).  `views` is the
receiving side; `memfile` says what a segment is and why nobody meets SIGBUS.

Why segments are kept: page faults and the clearing of pages cost four times more than copying (80 MB here: new segment
30 ms, reused 7 ms, memcpy 7 ms).  New pages are filled by `pwrite`, which allocates without clearing or faulting and
releases the GIL (30 ms; through a fresh mapping 55); filled ones through a mapping (7 ms; `pwrite` 14).  What keeps
memory from piling up: `limit`, best fit, `trim` by a timer.  A trimmed segment is truncated, so its memory is free
at once although receivers still have it mapped; they notice by its size when they next map something.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from bisect import bisect_left, insort
from pickle import PickleBuffer

from distpool.hints import Any
from distpool.transport import memfile
from distpool.transport.views import SegmentViews, can_attach, map_private

__all__ = ["Lease", "SegmentPool", "SegmentViews", "can_attach", "map_private"]

#: The copy holds the GIL; between chunks of this size other threads get their turn (1.5 ms each).
CHUNK = 16 * 1024 * 1024
#: A free segment is used for a buffer if it is at most this many times larger than a new one would be.
TOO_BIG = 2
#: Upper bound of the default limit of a pool.
DEFAULT_LIMIT = 4 << 30


class Lease:
    """One buffer placed in a segment: `segment_id`, `path`, `size` (bytes to map) and `nbytes` go into the message.

    Starts with one reference; each further receiver needs `retain()`, and each answer of a receiver is one
    `release()`.  Surplus releases do nothing.
    """

    __slots__ = ("_count", "_pool", "_reusable", "_segment", "nbytes", "path", "segment_id", "size")

    def __init__(self, pool: SegmentPool, segment: _Segment, nbytes: int) -> None:
        self.segment_id = segment.segment_id
        self.path = segment.file.path
        self.size = segment.size
        self.nbytes = nbytes
        self._pool = pool
        self._segment = segment
        self._count = 1
        self._reusable = True

    def retain(self) -> None:
        """One more holder; `ValueError` when the lease has ended."""
        with self._pool._lock:
            if self._count == 0:
                raise ValueError("this lease has ended; its segment may hold another buffer by now")
            self._count += 1

    def release(self) -> None:
        """One holder less; at none the segment goes back to the pool."""
        self._end(reusable=True)

    def abandon(self) -> None:
        """One holder less, who may still read it (link lost, process perhaps alive): the segment is not used again."""
        self._end(reusable=False)

    def _end(self, reusable: bool) -> None:
        with self._pool._lock:
            if self._count == 0:
                return
            self._reusable = self._reusable and reusable
            self._count -= 1
            if self._count:
                return
        self._pool._give_back(self._segment, self._reusable)


class _Segment:
    """One file and, from its second use on, this process's own mapping of it."""

    __slots__ = ("_mapping", "_target", "file", "filled", "idle_since", "segment_id", "size")

    def __init__(self, segment_id: int, file: memfile.MemoryFile, size: int) -> None:
        self.segment_id = segment_id
        self.file = file
        self.size = size
        self.filled = 0  # pages of [0, filled) are allocated: only these may be touched through the mapping
        self.idle_since = 0.0
        self._mapping: mmap.mmap | None = None
        self._target: memoryview | None = None

    def fill(self, data: memoryview) -> None:
        """Copy `data` to the start of the segment."""
        target = self._mapped()
        known = min(data.nbytes, self.filled) if target is not None else 0
        if target is not None:
            for start in range(0, known, CHUNK):
                stop = min(start + CHUNK, known)
                target[start:stop] = data[start:stop]
        if known < data.nbytes:
            memfile.write_at(self.file.descriptor, data[known:], known)
            self.filled = max(self.filled, data.nbytes)

    def _mapped(self) -> memoryview | None:
        """The mapping once it pays (not for the first filling); `None` also where none can be had."""
        if self._target is None and self.filled:
            try:
                self._mapping = mmap.mmap(self.file.descriptor, self.size)
            except (OSError, ValueError):
                return None
            memfile.populate(self._mapping, self.filled)
            self._target = memoryview(self._mapping)
        return self._target

    def discard(self, free_pages: bool) -> None:
        """Unmap and close; see `MemoryFile.discard`."""
        if self._target is not None and self._mapping is not None:
            self._target.release()
            self._mapping.close()
            self._target = self._mapping = None
        self.file.discard(free_pages)


class SegmentPool:
    """Sending side, one per process: `put(buffer)` gives a `Lease`, or `None`: then send the bytes inline.

    `directory`: private directory for named files where memfd and /proc are missing (without it one is made, and
    removed by `close`).  `limit`: bytes that all segments together may take; default: 4 GiB,
    or a quarter of the memory if that is less.  `bytes_held` (all segments), `bytes_in_use` (leased ones), `created`,
    `reused` and `refused` count.

    Example: `lease = pool.put(array); message = (lease.segment_id, lease.path, lease.size, lease.nbytes)`
    """

    def __init__(self, directory: str | None = None, limit: int | None = None, *, memfd: bool = True) -> None:
        self.limit = default_limit() if limit is None else limit
        self.bytes_held = 0
        self.bytes_in_use = 0
        self.created = 0
        self.reused = 0
        self.refused = 0
        self._directory = directory
        self._own_directory: str | None = None
        self._memfd = memfd and hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd")
        self._closed = False
        self._ospid = os.getpid()
        # Protects everything above and the counts of leases; never held while bytes are copied or files made.
        # Reentrant: a `__del__` that the collector runs inside may give leases back; it is given none (`put`).
        self._lock: Any = threading.RLock()
        #: Free segments as (size, -idle_since, segment_id, segment): best fit, the most recently used of equal ones.
        self._free: list[tuple[int, float, int, _Segment]] = []

    def put(self, buffer: Any) -> Lease | None:
        """Copy a contiguous buffer into a segment that one receiver after the other reads through `SegmentViews`."""
        if self._lock._is_owned():
            return None
        with PickleBuffer(buffer).raw() as data:
            segment = self._take(data.nbytes) if data.nbytes else None
            if segment is None:
                return None
            try:
                segment.fill(data)
            except BaseException as error:  # also a KeyboardInterrupt: the segment is half written, not lost
                self._give_back(segment, reusable=True)
                if isinstance(error, (OSError, MemoryError)):
                    self._refuse()
                    return None
                raise
            return Lease(self, segment, data.nbytes)

    def trim(self, keep: float = 0.0) -> None:
        """Free the segments that have been idle for longer than `keep` seconds."""
        latest = time.monotonic() - keep
        with self._lock:
            doomed = [entry for entry in self._free if entry[3].idle_since <= latest]
            self._free = [entry for entry in self._free if entry[3].idle_since > latest]
            self.bytes_held -= sum(entry[0] for entry in doomed)
        for entry in doomed:
            entry[3].discard(free_pages=True)

    def close(self) -> None:
        """Free what is free, take no more; leased segments end with their leases."""
        with self._lock:
            self._closed = True
            directory, self._own_directory = self._own_directory, None
        self.trim()
        if directory is not None and self._ospid == os.getpid():  # else it is of the process that forked this one
            memfile.discard_directory(directory)

    def _take(self, nbytes: int) -> _Segment | None:
        """A free segment that fits, else a new one; `None` when there is no room for it."""
        size = rounded(nbytes)
        with self._lock:
            if self._closed or self._ospid != os.getpid():  # a forked child would write into its parent's segments
                return None
            index = bisect_left(self._free, (nbytes,))
            if index < len(self._free) and self._free[index][0] <= size * TOO_BIG:
                entry = self._free.pop(index)
                segment = entry[3]
                if segment.size >= nbytes:
                    self.bytes_in_use += segment.size
                    self.reused += 1
                    return segment
                insort(self._free, entry)  # leases were given back, in there, between the look and the pop
            fits = self.bytes_in_use + size <= self.limit
            doomed = self._make_room(size) if fits else []
            if fits:
                self.bytes_held += size
                self.bytes_in_use += size
                self.created += 1
                segment_id = self.created
        for idle in doomed:
            idle.discard(free_pages=True)
        if not fits:
            self._refuse()
            return None
        try:
            return _Segment(segment_id, self._make_file(size), size)
        except BaseException as error:
            with self._lock:
                self.bytes_held -= size
                self.bytes_in_use -= size
            if isinstance(error, (OSError, MemoryError)):
                self._refuse()
                return None
            raise

    def _make_room(self, size: int) -> list[_Segment]:
        """Take free segments out, longest idle first, until `size` more bytes are within the limit (lock held)."""
        doomed: list[_Segment] = []
        for entry in sorted(self._free, key=lambda entry: entry[3].idle_since):
            if self.bytes_held + size <= self.limit:
                break
            self._free.remove(entry)
            self.bytes_held -= entry[0]
            doomed.append(entry[3])
        return doomed

    def _make_file(self, size: int) -> memfile.MemoryFile:
        try:
            return memfile.create(size, self._directory, memfd=self._memfd)
        except OSError:
            if self._directory is not None or self._memfd:
                raise
        with self._lock:
            if self._own_directory is None and not self._closed:
                self._own_directory = memfile.private_directory()
            directory = self._own_directory
        return memfile.create(size, directory, memfd=False)

    def _refuse(self) -> None:
        """Count a buffer that has to be sent inline, and give back what is idle: somebody is short of something."""
        with self._lock:
            self.refused += 1
        self.trim()

    def _give_back(self, segment: _Segment, reusable: bool) -> None:
        segment.idle_since = time.monotonic()
        with self._lock:
            self.bytes_in_use -= segment.size
            keep = reusable and not self._closed
            if keep:
                insort(self._free, (segment.size, -segment.idle_since, segment.segment_id, segment))
            else:
                self.bytes_held -= segment.size
        if not keep:
            segment.discard(free_pages=reusable)


def rounded(nbytes: int) -> int:
    """Size of a new segment for `nbytes`: up to an eighth more, so that sizes which vary a little share segments.

    What is not written is never allocated, so the rest costs address space only.
    """
    unit = max(mmap.PAGESIZE, 1 << max(0, nbytes.bit_length() - 4))
    return -(-nbytes // unit) * unit


def default_limit() -> int:
    """4 GiB, or a quarter of the memory that this machine or container has."""
    limits = [DEFAULT_LIMIT]
    try:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4)
    except (AttributeError, ValueError, OSError):
        pass  # Windows: unknown
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path, "rb") as source:  # as text, each process would load a codec for it
                limits.append(int(source.read()) // 4)
        except (OSError, ValueError):
            pass  # another version of cgroups, or "max"
    return min(limit for limit in limits if limit > 0)
