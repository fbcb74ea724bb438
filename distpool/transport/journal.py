"""What a worker has finished, in memory that outlives it (layer 2).

Data flow:

    worker                                          master
    set_started(n)    before call n runs            after the worker's death, not before:
    append(record)    when it has finished            started             the call that was running
    send between(..); mark_sent(in the kernel)        read_from(received) records finished but never sent
    revoked(n)        before call n runs  <-------  revoke(first, last): these have been given to others
    set_started(n-1)  if so: it does not run

No thread of its own.  One writer at a time appends, uninterrupted (the worker's caller sees to that), and one thread of
the master at a time revokes.  A worker elsewhere has a `private()` journal: same interface,
nobody else sees it.

Layout: a header of 64-bit words, then the ring of `capacity` bytes.  Offsets count from the beginning of time; byte
`o` lies at `o % capacity`.  `append` stores, in this order: RESERVED >= end (if it is not yet), the
bytes, WRITTEN = end.

Why no lock and no checksum: the reader comes after the writer's death.  A kill takes effect between two instructions,
so what has reached memory is exactly a prefix of the writer's stores in program order; and the reader learns of the
death through the kernel (closed socket, wait), which orders all of them before its reads, on ARM as on x86.  CPython
stores a word by one aligned 8-byte move, so a word is old or new and never half; each store is a call of its own, so
no compiler swaps two.  Hence at any moment: bytes below WRITTEN are complete; a torn record lies between WRITTEN and
RESERVED; the ring still holds everything from RESERVED - capacity on.  (On 32-bit machines a word takes two moves:
right below 4 GiB.)  Appends by several threads need one lock, which also keeps their stores in order for others.
"""

from __future__ import annotations

import mmap
import os

from distpool import config
from distpool.transport import memfile

#: Words of the header.  The master's are in a cache line of their own.
STARTED, WRITTEN, RESERVED, SENT = range(4)
REVOKED_FROM, REVOKED_TO = 8, 9
HEADER = 128
_RESERVE = 4096  # bytes that are reserved ahead


class Journal:
    """A ring of records and three numbers that the master can still read when its worker was killed.

    `path` and `size` go to the worker, which calls `attach`.

    Example: `journal.set_started(7); journal.append(record) or (send(journal.pending()), ...)`
    """

    __slots__ = (
        "_data", "_file",
        "capacity", "end", "mapping", "path", "reserved", "shared", "size", "words",
    )  # fmt: skip

    def __init__(self, mapping: mmap.mmap, path: str, file: memfile.MemoryFile | None, shared: bool) -> None:
        self.path = path
        self.size = len(mapping)
        self.shared = shared
        self._file = file
        self.mapping = mapping
        self.capacity = self.size - HEADER  # of the ring: the largest record, and the most that can be unsent
        self._data = memoryview(mapping)
        self.words = self._data[:HEADER].cast("Q")
        # The writer's, who reads these more cheaply than words; it may write a record out by itself, as `append` does.
        self.end = self.words[WRITTEN]
        self.reserved = self.words[RESERVED]

    @classmethod
    def create(cls, directory: str | None = None, capacity: int = 0) -> Journal:
        """Master: a new one of `capacity` bytes (0: `config.JOURNAL_SIZE`); `OSError` where there is no memory to
        share."""
        size = HEADER + (capacity or config.JOURNAL_SIZE)
        file = memfile.create(size, directory)
        try:
            memfile.allocate(file.descriptor, size)
            return cls(mmap.mmap(file.descriptor, size), file.path, file, True)
        except BaseException:
            file.discard(free_pages=True)
            raise

    @classmethod
    def attach(cls, path: str, size: int) -> Journal:
        """Worker: the journal that the master has made; `OSError` when it cannot be opened.  Its name is removed."""
        if size <= HEADER:
            raise OSError(f"a journal has more than {HEADER} bytes, not {size}")
        descriptor = memfile.open_checked(path, size)
        try:
            mapping = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
        if not path.startswith("/proc/"):
            memfile.unlink(path)
        return cls(mapping, path, None, True)

    @classmethod
    def private(cls) -> Journal:
        """A journal of this process alone (`shared` is `False`), for a worker whose master is on another host."""
        return cls(mmap.mmap(-1, HEADER + config.JOURNAL_SIZE), "", None, False)

    def attached(self) -> None:
        """Master: the worker has mapped it, so the path (and its descriptor) is no longer needed."""
        if self._file is not None:
            self._file.discard(free_pages=False)

    @property
    def started(self) -> int:
        """Number of the last call that was started."""
        return self.words[STARTED]

    def set_started(self, number: int) -> None:
        """Note that call `number` (0 to 2**64 - 1) starts now."""
        self.words[STARTED] = number

    @property
    def written(self) -> int:
        """Absolute offset of the end of the last complete record."""
        return self.words[WRITTEN]

    def revoke(self, first: int, last: int) -> None:
        """Master: the worker must not start calls `first` to `last` any more. They are above all revoked before."""
        # In this order: between the stores the range is empty (the old end lies below `first`), never too large.
        self.words[REVOKED_FROM] = first
        self.words[REVOKED_TO] = last

    def revoked(self, number: int) -> bool:
        """Worker, after `set_started(number)`: whether that call has been given to others."""
        words = self.words
        return number <= words[REVOKED_TO] and number >= words[REVOKED_FROM]

    @property
    def is_full(self) -> bool:
        """Writer: whether more than half of it is not sent."""
        return self.end - self.words[SENT] > self.capacity // 2

    def append(self, record: bytes) -> bool:
        """Add a record; `False` when there is no room: send what is there, `mark_sent` first (or it is too large)."""
        start = self.end
        length = len(record)
        end = start + length
        if end > self.reserved and not self.reserve(end):
            return False
        place = HEADER + start % self.capacity
        stop = place + length
        if stop <= self.size:
            self.mapping[place:stop] = record
        else:
            first = self.size - place
            self._data[place:] = record[:first]
            self._data[HEADER : stop - self.capacity] = record[first:]
        self.words[WRITTEN] = self.end = end
        return True

    def reserve(self, end: int) -> bool:
        """Writer: say that the ring will be written up to `end` and a little more, so that the next few need not.
        `False` when there is no room."""
        most = self.words[SENT] + self.capacity
        if end > most:
            return False
        self.words[RESERVED] = self.reserved = min(end + _RESERVE, most)
        return True

    def pending(self) -> bytes:
        """The bytes that are written and not yet marked as sent."""
        return self._between(self.words[SENT], self.words[WRITTEN])

    def between(self, start: int, end: int) -> bytes:
        """Writer: the bytes from absolute offset `start` to `end`, which are written and not marked as sent."""
        return self._between(start, end)

    def mark_sent(self, upto: int) -> None:
        """Writer: everything below the absolute offset `upto` is on its way; its room may be used again."""
        words = self.words
        if not words[SENT] <= upto <= words[WRITTEN]:
            raise ValueError(f"cannot mark {upto} as sent: {words[SENT]} are sent, {words[WRITTEN]} written")
        words[SENT] = upto

    def read_from(self, offset: int) -> bytes:
        """Master, after the writer's death: all complete records from the absolute `offset` on.

        `ValueError` when some of them are overwritten, or `offset` lies beyond the end.
        """
        written = self.words[WRITTEN]
        if offset > written:
            raise ValueError(f"offset {offset} is beyond the end, {written}")
        if offset < self.words[RESERVED] - self.capacity:
            raise ValueError(f"the records from offset {offset} on are overwritten; {written} are written")
        return self._between(offset, written)

    def snapshot(self, offset: int) -> bytes:
        """Master, while the worker lives: complete records from `offset` on; none if it writes over them just now."""
        written = self.words[WRITTEN]
        data = self._between(offset, written) if 0 < written - offset <= self.capacity else b""
        return data if offset >= self.words[RESERVED] - self.capacity else b""

    def close(self) -> None:
        """Unmap; may be called twice.  Nothing else works afterwards (`ValueError`)."""
        self.words.release()
        self._data.release()
        self.mapping.close()
        if self._file is not None:
            self._file.discard(free_pages=False)

    def _between(self, start: int, end: int) -> bytes:
        place = HEADER + start % self.capacity
        stop = place + end - start
        if stop <= self.size:
            return bytes(self._data[place:stop])
        return b"".join((self._data[place:], self._data[HEADER : stop - self.capacity]))
