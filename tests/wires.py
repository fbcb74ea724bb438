"""Two ends of a link inside one process, for the tests of what runs at either end."""

from __future__ import annotations

import gc
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from distpool.node.tasks import TaskRunner
from distpool.node.threads import ThreadCache
from distpool.transport.ioloop import IoLoop
from distpool.transport.journal import Journal
from distpool.transport.link import Link
from distpool.transport.segments import Segments
from distpool.transport.shm import SegmentPool
from distpool.wire import codec, messages
from distpool.wire.failures import decode_exception
from distpool.wire.frames import Frame, Kind
from distpool.wire.functions import FunctionEncoder
from distpool.wire.protocol import Handshake, Role

PATIENCE = 30.0
COOKIE = "c" * 16


class End:
    """One end: a loop with its thread, the link, and what came in."""

    def __init__(self, name: str, role: Role, sock: socket.socket, cookie: str = COOKIE) -> None:
        self.loop = IoLoop(name)
        self.frames: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        self.ready = threading.Event()
        self.closed = threading.Event()
        self.reasons: list[BaseException | None] = []
        self.on_frame: Callable[[Frame], object] = self.frames.put
        self.link = Link(
            self.loop,
            sock,
            Handshake(role, cookie),
            lambda link: self.ready.set(),
            lambda link, frame: self.on_frame(frame),
            self._on_closed,
        )

    def _on_closed(self, link: Link, reason: BaseException | None) -> None:
        self.reasons.append(reason)
        self.closed.set()

    def start(self) -> None:
        self.loop.start()
        self.loop.call_soon(self.link.open)

    def stop(self) -> None:
        self.link.close(None)
        self.closed.wait(PATIENCE)
        self.loop.stop()

    def next_frame(self, seconds: float = PATIENCE) -> Frame:
        try:
            return self.frames.get(timeout=seconds)
        except queue.Empty:
            raise AssertionError(f"no frame after {seconds} s") from None


@contextmanager
def ends(start: bool = True, cookies: tuple[str, str] = (COOKIE, COOKIE)) -> Iterator[tuple[End, End]]:
    """A connector and an acceptor, joined by a socket pair; both ready if `start`."""
    left_socket, right_socket = socket.socketpair()
    left = End("left", Role.CONNECTOR, left_socket, cookies[0])
    right = End("right", Role.ACCEPTOR, right_socket, cookies[1])
    try:
        if start:
            right.start()
            left.start()
            assert left.ready.wait(PATIENCE) and right.ready.wait(PATIENCE)
        yield left, right
    finally:
        for end in (left, right):
            if end.loop._thread is not None:
                end.stop()
            else:
                end.loop.close_descriptors()
        left_socket.close()
        right_socket.close()


def until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> None:
    """Wait for what only a look can tell; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not after {seconds} s"
        pause.wait(0.002)


def wait_until(holds: Callable[[], object]) -> None:
    """Wait for what holds once garbage is collected: distributed collection has no event to wait for."""

    def look() -> object:
        gc.collect()
        return holds()

    until(look, "what is garbage is collected")


class Bench:
    """A `TaskRunner` in a thread of this process, and the master's end of its link."""

    def __init__(self, master: End, worker: End, shared: bool = True) -> None:
        self.master, self.worker = master, worker
        self.journal = Journal.create() if shared else Journal.private()
        worker.link.shares_memory = master.link.shares_memory = False
        worker.loop.owns_interrupts = True
        self.threads = ThreadCache("bench")
        self.pool = SegmentPool()
        self.runner = TaskRunner(worker.link, self.journal, Segments(worker.link, self.pool), self.threads.run)
        runner = self.runner
        self.handlers: dict[int, Callable[[Frame], object]] = {
            Kind.CALLS: runner.on_calls,
            Kind.FUNCTION: runner.on_function,
            Kind.FORGET: runner.on_forget,
            Kind.INITIALIZE: runner.on_initialize,
            Kind.RECALL: runner.on_recall,
            Kind.SHUTDOWN: runner.on_shutdown,
        }
        worker.on_frame = lambda frame: self.handlers[frame.kind](frame)
        worker.loop.on_tick = runner.tick
        self.encoder = FunctionEncoder()
        self.exit: list[int] = []
        self.thread = threading.Thread(target=lambda: self.exit.append(runner.run()), daemon=True)
        self.thread.start()
        self.known: set[int] = set()
        self.sequence = 1

    # -- the master's side -------------------------------------------------------------------------------------

    def function(self, fn: Callable[..., Any]) -> Any:
        encoded = self.encoder.encode(fn)
        if encoded.number not in self.known:
            self.known.add(encoded.number)
            control = messages.Function(encoded.number, encoded.name).pack()
            self.master.link.send(Kind.FUNCTION, control, encoded.data, encoded.buffers)
        return encoded

    def record(self, fn: Callable[..., Any], payload: bytes, flags: int, elements: int = 1, buffers: int = 0) -> bytes:
        number = self.function(fn).number
        return messages.CALL.pack(number, elements, len(payload), buffers, flags) + payload

    def one(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> bytes:
        payload, buffers = codec.encode_args(args, kwargs)
        assert not buffers
        return self.record(fn, payload, messages.ONE)

    def span(self, fn: Callable[..., Any], items: list[Any]) -> bytes:
        return self.record(fn, codec.encode(items)[0], messages.SPAN_OF_SCALARS, len(items))

    def send(self, *records: bytes) -> int:
        """One CALLS frame; the first sequence number."""
        first = self.sequence
        self.sequence += sum(messages.CALL.unpack_from(record)[1] for record in records)
        self.master.link.send(Kind.CALLS, messages.CALLS.pack(first, len(records)), b"".join(records))
        return first

    def recall(self, count: int = 0, sequences: list[int] | None = None) -> None:
        self.master.link.send(Kind.RECALL, messages.Recall(count, sequences or []).pack())

    def results(self, frame: Frame) -> list[tuple[int, int, Any]]:
        """What a RESULTS frame says: (sequence number, status, value or exception)."""
        buffers = list(frame.buffers)
        found = []
        for sequence, elements, status, payload, parts in messages.result_records(frame.body):
            if status == messages.VALUES:  # consecutive scalars in one pickle
                values = codec.decode(bytes(payload))
                assert len(values) == elements
                found.extend((sequence + offset, messages.VALUE, value) for offset, value in enumerate(values))
                continue
            if status == messages.VALUE:
                value = codec.decode(bytes(payload), buffers[:parts])
            else:
                value = decode_exception(bytes(payload), 2)
            del buffers[:parts]
            found.append((sequence, status, value))
        return found

    def collect(self, count: int, seconds: float = PATIENCE) -> dict[int, Any]:
        """Results until `count` calls have ended or were recalled; recalled ones are the string "recalled"."""
        deadline = time.monotonic() + seconds
        ended: dict[int, Any] = {}
        while len(ended) < count:
            frame = self.master.next_frame(max(0.001, deadline - time.monotonic()))
            if frame.kind == Kind.RESULTS:
                new = {sequence: value for sequence, _, value in self.results(frame)}
            elif frame.kind == Kind.RECALLED:
                ranges = messages.Recalled.unpack(frame.control).ranges
                new = {first + offset: "recalled" for first, number in ranges for offset in range(number)}
            else:
                continue
            assert not set(ended) & set(new), "ended twice"
            ended.update(new)
        return ended

    def close(self) -> None:
        self.master.link.send(Kind.SHUTDOWN, messages.Shutdown("").pack())
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive(), "the runner hangs"


@contextmanager
def bench(shared: bool = True) -> Iterator[Bench]:
    with ends() as (left, right):
        made = Bench(left, right, shared)
        try:
            yield made
        finally:
            made.close()
    made.journal.close()  # after the loop, which looks at it
    made.pool.close()
