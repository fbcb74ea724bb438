"""A link: one framed, authenticated connection to one peer (layer 2).

    any thread --send--> outbox --(inline, non-blocking)--> stream
    leader: stream readable --> FrameReader --> Handshake until READY --> on_frame(link, frame)
    leader: stream writable --> rest of the outbox

Sending never blocks: what the socket does not take at once stays in the outbox and is written by the leader. A side
that both reads and writes with blocking calls stops for ever when both sides send much. `drain` is the back-pressure
for those who may wait (a worker's task threads), never for the leader.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import socket
import threading
import time
from collections.abc import Callable

from distpool import config
from distpool.depth import is_deep
from distpool.errors import AuthenticationError, ProtocolError
from distpool.flag import Flag
from distpool.hints import Any
from distpool.sigpipe import QUIET
from distpool.transport.ioloop import IoLoop, Timer
from distpool.transport.silence import Watch, acknowledged, tune
from distpool.transport.stream import Stream
from distpool.wire.frames import Frame, FrameReader, Kind, pack_frame
from distpool.wire.protocol import Handshake, Role

_SPARE_SECONDS = 1.0  # memory for big frames is kept for so long without any
_SPARE_BYTES = 1 << 20
_ROUNDS = 32  # reads of a big frame before other links have their turn
_TRY_AGAIN = 0.01  # seconds until the system may have memory again
_NO_MEMORY = (errno.ENOBUFS, errno.ENOMEM)
_LAST_LOOK = 1.0  # seconds that the last read may wait for a thread which is writing (TLS)
_GATHER = 64  # buffers per sendmsg; Linux allows 1024


class Link:
    """One connection. `on_ready(link)`, `on_frame(link, frame)` and `on_closed(link, reason)` run on the leader."""

    def __init__(
        self,
        loop: IoLoop,
        stream: Stream,
        handshake: Handshake,
        on_ready: Callable[[Link], None],
        on_frame: Callable[[Link, Frame], None],
        on_closed: Callable[[Link, BaseException | None], None],
    ) -> None:
        self.loop = loop
        self.peer: Any = None  # who is at the other end: set by the node
        self.segments: Any = None  # the `Segments` of this link: set by the node
        self.adopted: Any = None  # what a manager has handed over for it: set by whoever has adopted that
        self.shares_memory = False  # whether the peer can map our segments: set by the node
        self.bytes_in = 0
        self.bytes_out = 0
        self.handshake = handshake
        self._sock: Any = stream
        self._plain = type(stream) is socket.socket
        self._on_ready = on_ready
        self._on_frame = on_frame
        self._on_closed = on_closed
        self._reader = FrameReader()
        self._read_size = config.MAX_BEFORE_AUTH  # of one read, until the peer has proved who it is
        # Bytes that the stream keeps where no poller sees them (TLS).
        self._pending: Callable[[], int] | None = None if isinstance(stream, socket.socket) else _pending_of(stream)
        self._watch: Watch | None = None
        self._spare_timer: Timer | None = None  # looks whether memory for big frames is still worth keeping
        self._outbox: collections.deque[memoryview] = collections.deque()
        self._queue: collections.deque[list[Any]] = collections.deque()  # frames not yet begun; append is atomic
        # Protects _outbox, _writing and the order of bytes on the socket. Reentrant only to tell who has it.
        self._write_lock: Any = threading.RLock()
        #: Whether the calling thread is in the middle of a send: what it sends now stays behind that.
        self.writes: Callable[[], bool] = self._write_lock._is_owned  # type: ignore[attr-defined]
        self._sending = False  # a frame is neither in the queue nor all in the kernel or the outbox
        self._writing = False  # the leader has been asked to write when the socket has room
        self._closed = False
        self._drained = Flag()
        self._drained.set()
        self._drainers: list[Any] = []  # one entry for each thread in `drain`; append and pop are atomic

    def open(self) -> None:
        """Start the handshake and take part in the loop."""
        self._sock.setblocking(False)
        tune(self._sock)
        self._watch = Watch(self.loop, self._sock, self._on_silence)
        try:
            self.loop.register_link(self._sock, self._on_event)
        except OSError as error:  # no memory, or no more may be watched: that costs this connection and nothing else
            self.close(error)
            return
        parts = self.handshake.begin()
        if parts:
            self.send_parts(parts)

    def carries(self, stream: Any) -> bool:
        """Whether this link runs over `stream`."""
        return self._sock is stream

    @property
    def closed(self) -> bool:
        """Whether the connection is gone."""
        return self._closed

    # -- sending (any thread) ----------------------------------------------------------------------------------

    def send(self, kind: Kind, control: bytes = b"", body: Any = b"", buffers: Any = (), roomy: bool = False) -> bool:
        """Send one frame; False if the link is closed (whoever waits for an answer hears of it by `on_closed`).
        `roomy`: the caller knows that the recursion limit is far."""
        return self.send_parts(pack_frame(kind, control, body, buffers), roomy)

    def send_parts(self, parts: list[Any], roomy: bool = False) -> bool:
        """Send the parts of one frame, in order and unmixed with other frames. `roomy`: see `send`.

        Never waits for a lock: who finds it taken leaves the frame in the queue, and the holder looks again after
        releasing. A plain lock would deadlock when the collector runs a user's `__del__` inside the locked region
        and that calls us again.
        """
        if self._closed:
            return False
        loop = self.loop
        guard = loop.guard
        inside = guard.enter(None) if guard is not None else None
        try:
            if guard is not None and inside is None:  # of a worker, and no call of the user's: no signal raises here
                self._queue.append(parts)
                self._pump()
            elif not loop.leads and not roomy and is_deep():
                self._queue.append(parts)
                loop.call_soon(self._pump)
            elif loop.enter_critical():  # Ctrl-C would tear the frame and leave the lock held
                try:
                    self._queue.append(parts)
                    self._pump()
                finally:
                    loop.leave_critical()
            else:
                self._queue.append(parts)
                loop.call_soon(self._pump)
            return not self._closed
        finally:
            if guard is not None and inside is not None:
                guard.leave(inside)

    def _pump(self) -> None:
        queue, lock = self._queue, self._write_lock
        while queue and not self.writes() and lock.acquire(blocking=False):
            self._sending = True
            try:
                while queue:
                    self._write_parts(queue.popleft())
                if self._outbox and not self._writing and not self._closed:
                    self._drained.clear()
                    self._writing = True
                    self.loop.want_write(self._sock, True)
            finally:
                self._sending = False
                lock.release()
            if self._drainers and not self.loop.leads:
                self.loop.wake()  # one that leads took the held lock for bytes that are not out yet

    def _write_parts(self, parts: list[Any]) -> None:
        """Called with `_write_lock` held."""
        if self._closed:
            return
        outbox = self._outbox
        if outbox or len(parts) > 1:
            waiting = bool(outbox)
            outbox.extend(memoryview(part).cast("B") for part in parts if len(part))
            if not waiting:
                self._write_some()
            return
        data = parts[0]
        try:
            sent = self._sock.send(data, QUIET) if self._plain else self._sock.send(data)
        except OSError as error:
            if not _goes_later(error):
                return  # the reading side sees the end of the stream and reports it, once
            sent = 0
        self.bytes_out += sent
        if sent < len(data):
            outbox.append(memoryview(data)[sent:])

    def _write_some(self) -> bool:
        """Write as much as the socket takes; False: there is no memory for more. Called with `_write_lock` held."""
        outbox = self._outbox
        while outbox:
            try:
                flags = (QUIET,) if self._plain else ()
                if len(outbox) > 1 and hasattr(self._sock, "sendmsg"):
                    parts = [outbox[i] for i in range(min(len(outbox), _GATHER))]
                    sent = self._sock.sendmsg(parts, (), *flags) if flags else self._sock.sendmsg(parts)
                else:
                    sent = self._sock.send(outbox[0], *flags)
            except OSError as error:
                if not _goes_later(error):
                    outbox.clear()  # nobody will read it; the end of the stream is reported by the reading side
                return error.errno not in _NO_MEMORY
            self.bytes_out += sent
            while sent:
                first = outbox[0]
                if sent >= len(first):
                    sent -= len(first)
                    outbox.popleft()
                else:
                    outbox[0] = first[sent:]
                    sent = 0
        return True

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until everything is in the kernel (or the link is closed); False after `timeout` seconds. Not on the
        leader.
        """
        if self._idle():
            return True
        deadline = None if timeout is None else time.monotonic() + timeout
        self._drainers.append(deadline)
        try:
            if self.loop.lead(self._idle, deadline):
                # In time it was idle, though others may have sent something since.
                return deadline is None or time.monotonic() < deadline or self._idle()
            with self.loop.following():
                while True:  # no condition: see tests/test_interruptible.py
                    if self._idle():
                        break
                    if not self._drained.wait(None if deadline is None else max(0.0, deadline - time.monotonic())):
                        return False
            return True
        finally:
            self._drainers.pop()

    @property
    def idle(self) -> bool:
        """Whether everything is in the kernel, or the link is closed."""
        return self._idle()

    def _idle(self) -> bool:
        return self._closed or not (self._queue or self._outbox or self._sending)

    @property
    def acknowledged(self) -> bool:
        """Whether the peer's kernel says that it has all that ours has sent."""
        return acknowledged(self._sock)

    # -- receiving (leader) ------------------------------------------------------------------------------------

    def _on_event(self, events: int) -> None:
        if events & 2:
            self._on_writable()
        if events & 1:
            self._on_readable()

    def _on_writable(self) -> None:
        if not self._write_lock.acquire(blocking=False):
            return  # somebody is writing right now; the poller reports again
        try:
            if self._closed:
                return
            memory = self._write_some()
            if not self._outbox:
                self._writing = False
                self.loop.want_write(self._sock, False)
                self._drained.set()
            elif not memory:  # the socket has room, so the poller would report it again and again
                self.loop.want_write(self._sock, False)
                self.loop.call_later(_TRY_AGAIN, self._write_again)
        finally:
            self._write_lock.release()
        self._pump()

    def _write_again(self) -> None:
        if self._writing and not self._closed:
            self.loop.want_write(self._sock, True)

    def _on_readable(self) -> None:
        if self._closed:
            return
        rounds = _ROUNDS
        try:
            while True:
                frames = self._read()
                if frames is None:
                    self.close(None)
                    return
                while frames:
                    for frame in frames:
                        if self.handshake.ready:
                            self._on_frame(self, frame)
                        else:
                            self._shake(frame)
                    frames = self._reader.feed(b"") if self._reader.again else []
                rounds -= 1
                if self._closed:
                    return
                if self._pending is not None:
                    if not self._pending():
                        return
                elif not rounds or self._reader.target() is None:
                    return  # of a big frame, more has often come already: that saves turns of the loop
        except BlockingIOError:
            if self._pending is not None and self._pending():  # a thread is writing; no poller sees what is left
                self.loop.call_soon(self._on_readable)
        except (ProtocolError, AuthenticationError, OSError, MemoryError) as error:
            # (No memory for a frame: what follows on this link cannot be told from it. Others go on.)
            # Kept as the reason: not with its traceback, whose frames are those of the user who leads the loop.
            self.close(error.with_traceback(None))

    def _read(self) -> list[Frame] | None:
        """Frames that one read completed; `None` at the end of the stream."""
        target = self._reader.target()
        if target is None:
            data = self._sock.recv(self._read_size)
            self.bytes_in += len(data)
            return self._reader.feed(data) if data else None
        count = self._sock.recv_into(target)
        self.bytes_in += count
        frames = self._reader.filled(count) if count else None
        if self._reader.has_spare and self._spare_timer is None:
            self._watch_spare()
        return frames

    def _watch_spare(self) -> None:
        before = self.bytes_in
        self._spare_timer = self.loop.call_later(_SPARE_SECONDS, lambda: self._look_at_spare(before))

    def _look_at_spare(self, before: int) -> None:
        """Keep the memory of big frames as long as more of them come."""
        self._spare_timer = None
        if self.bytes_in - before < _SPARE_BYTES:
            self._reader.drop_spare()
        elif not self._closed:
            self._watch_spare()

    def _shake(self, frame: Frame) -> None:
        try:
            parts = self.handshake.receive(frame)
        except AuthenticationError:
            if self.handshake.role is Role.ACCEPTOR:
                self.send(Kind.REFUSED)
            raise
        if parts:
            self.send_parts(parts)
        if self.handshake.ready:
            self._reader.unlock()
            self._read_size = config.READ_SIZE
            self._on_ready(self)

    def read_rest(self) -> None:
        """Read what the kernel still holds after the peer's death; ends with the link closed."""
        if self._pending is not None:
            self._sock.patience = _LAST_LOOK  # who writes keeps us out for a moment; that is not the end
        while not self._closed:
            before = self.bytes_in
            self._on_readable()
            if self.bytes_in == before:
                self.close(None)

    # -- the end -----------------------------------------------------------------------------------------------

    def _on_silence(self) -> None:
        seconds = config.silent_seconds()
        self.close(TimeoutError(f"its host has not answered for {seconds:g} seconds"))

    def close(self, reason: BaseException | None = None) -> None:
        """Close the connection and report it, once. Any thread; `on_closed` runs on the leader."""
        if not self.loop.leads or self.writes():
            self.loop.call_soon(lambda: self.close(reason))
            return
        if self._closed:
            return
        self._closed = True
        if self._watch is not None:
            self._watch.end()
        if self._spare_timer is not None:
            self._spare_timer.cancel()
        self.loop.unregister(self._sock)
        # A thread that is writing this very moment may use the descriptor: `shutdown` first, the number stays ours
        # until that thread has let go of the lock (its `send` cannot block, so this is short).
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        with self._write_lock:
            self._sock.close()
            self._outbox.clear()
            self._queue.clear()
        self._reader.drop_spare()  # the link may be known for longer than it is of use
        self._drained.set()
        self._on_closed(self, reason)

    def close_descriptor(self) -> None:
        """In a forked child: only close what was inherited."""
        self._closed = True
        self._sock.close()
        if self.adopted is not None:
            self.adopted.forget()


def _goes_later(error: OSError) -> bool:
    """Whether the connection is as it was: no room in it, or the system has no memory at the moment."""
    return isinstance(error, BlockingIOError | InterruptedError) or error.errno in _NO_MEMORY


def _pending_of(stream: Any) -> Callable[[], int] | None:
    return getattr(stream, "pending", None)
