"""The buffers of one link: big ones go through shared memory where both ends are on one host (layer 2).

    sender:    buffer --stage--> segment (copied once) --SegmentRef in the frame--> peer
    receiver:  SegmentRef --open--> a view of the mapped segment; when the last view is gone: SEGMENTS_FREE
    sender:    on_free -> the lease is released and the segment used again

`Kept` is for what many peers read: a function's buffers are copied once, and each worker of this host maps that copy.

`stage` runs on any thread; `open`, `on_free` and `close` on the leader. The receiver learns from a finalizer that a
view is gone; that may only append to a deque and wake the loop, which then sends the message.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable

from distpool.hints import Any
from distpool.transport.link import Link
from distpool.transport.shm import Lease, SegmentPool, SegmentViews
from distpool.wire import messages
from distpool.wire.frames import Kind, SegmentRef


class Kept:
    """Copies of buffers that this process keeps, in shared memory: one copy serves all workers of the host."""

    def __init__(self, pool: SegmentPool, call_soon: Callable[[Callable[[], object]], object]) -> None:
        self._pool = pool
        self._call_soon = call_soon
        self._leases: dict[int, Lease] = {}  # segment id -> lease of a copy that lives; dict operations are atomic
        self._views = SegmentViews(self._on_released)

    def keep(self, buffer: memoryview) -> tuple[Any, Lease | None]:
        """A copy, and the lease of its segment, which ends with the copy (`None`: the copy is plain bytes).

        Copying into bytes as well, to have something to compare later functions with, was rejected: 80 MB of fresh
        pages cost as much as all the rest.
        """
        lease = self._pool.put(buffer)
        if lease is None:
            return bytes(buffer), None
        self._leases[lease.segment_id] = lease
        try:
            return self._views.view(lease.segment_id, lease.path, lease.size, lease.nbytes, private=True), lease
        except OSError:  # no descriptor left
            self._release(lease.segment_id)
            return bytes(buffer), None

    def _on_released(self, segment_id: int) -> None:
        # In a finalizer: no lock.
        self._call_soon(lambda: self._release(segment_id))

    def _release(self, segment_id: int) -> None:
        lease = self._leases.pop(segment_id, None)
        if lease is not None:
            lease.release()


class Segments:
    """What one link has lent to its peer and borrowed from it."""

    def __init__(self, link: Link, pool: SegmentPool) -> None:
        self._link = link
        self._pool = pool
        self._lent: dict[int, list[Lease]] = {}  # segment id -> leases that the peer holds; dict operations are atomic
        self._views = SegmentViews(self._on_released)
        self._released: collections.deque[int] = collections.deque()
        self._closed = False  # nobody will say any more that something is free

    def stage(self, buffer: Any, link: Link | None = None) -> Any:
        """`buffer` as it goes into a frame: a `SegmentRef`, or the buffer itself where memory is not shared."""
        if self._closed or not self._link.shares_memory:
            return buffer
        lease = self._pool.put(buffer)
        if lease is None:
            return buffer
        return self.lend(lease)

    def lend(self, lease: Lease) -> SegmentRef:
        """Note that the peer holds `lease` (whose count the caller has raised for that) until it says otherwise."""
        while True:
            leases = self._lent.setdefault(lease.segment_id, [])
            leases.append(lease)
            if self._closed:  # looked at after the lease is there, and set before `close` looks what is there
                _abandon(leases)
            elif self._lent.get(lease.segment_id) is not leases:  # emptied and dropped before the append
                continue
            break
        return SegmentRef(lease.segment_id, lease.path, lease.size, lease.nbytes)

    def open(self, buffer: Any, private: bool = False) -> Any:
        """The received buffer as memory: writable, and only ours (`private`: copy on write, shared by many readers)."""
        if not isinstance(buffer, SegmentRef):
            return buffer
        if private:
            # Copy on write, and a lease like any other: it is given back when the payload is forgotten.
            return self._views.view(buffer.segment_id, buffer.path, buffer.size, buffer.nbytes, private=True)
        return self._views.view(buffer.segment_id, buffer.path, buffer.size, buffer.nbytes)

    def _on_released(self, segment_id: int) -> None:
        # In a finalizer: no lock, no send. `call_soon` is an atomic append and a non-blocking wake-up byte.
        self._released.append(segment_id)
        self._link.loop.call_soon(self._report)

    def _report(self) -> None:
        gone = []
        while self._released:
            gone.append(self._released.popleft())
        if gone and not self._link.closed:
            self._link.send(Kind.SEGMENTS_FREE, messages.SegmentsFree(gone).pack())

    def pin(self) -> None:
        """This process is about to fork: what is borrowed now is never given back, because the child reads it too."""
        self._views.pin()

    def on_free(self, segments: list[int]) -> None:
        """The peer has let go of these segments (each mention is one lease)."""
        for segment_id in segments:
            leases = self._lent.get(segment_id)
            if leases:
                leases.pop().release()
                if not leases:  # nothing is called between the two: see `lend`
                    del self._lent[segment_id]

    def close(self) -> None:
        """The link is gone: take back what was lent; what user code still views stays valid."""
        self._closed = True
        lent, self._lent = self._lent, {}
        for leases in list(lent.values()):
            _abandon(leases)
        self._views.close()


def _abandon(leases: list[Lease]) -> None:
    """Not release(): the peer may live on and hold arrays there (a worker that leaves, a cut link). A segment used
    again would change them; one trimmed (truncated) would kill the peer with SIGBUS."""
    with contextlib.suppress(IndexError):  # another thread may do the same
        while True:
            leases.pop().abandon()
