"""Byte streams between any two processes, all through one hub process (used by broker.py; needs pyzmq).

    process --DEALER--> [to, connection, kind, data] --> hub (ROUTER) --> [from, connection, kind, data] --> process

kinds: hello (the hub knows me), open (a new connection), data, end. The hub answers with `end` for whom it does not
know. It ends with the process that started it; who loses it ends all its connections.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import sys
import threading
from collections.abc import Callable
from typing import Any

import zmq

HELLO, OPEN, DATA, END = b"hello", b"open", b"data", b"end"


class Reader:
    """The chunks of one connection as a stream; an empty one is its end."""

    def __init__(self) -> None:
        self.chunks: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._rest = memoryview(b"")

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = memoryview(self.chunks.get())
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def close(self) -> None:
        self.chunks.put(b"")  # whoever reads hears of it


class Writer:
    """The way to the other end of one connection."""

    def __init__(self, send: Callable[[bytes, bytes], None]) -> None:
        self._send = send

    def write(self, data: bytes) -> int:
        self._send(DATA, bytes(data))
        return len(data)

    def close(self) -> None:
        self._send(END, b"")


class Client:
    """A process's place in the star. Its thread owns the socket to the hub; everybody else hands messages to it."""

    def __init__(self, endpoint: str, name: str, on_open: Callable[[Reader, Writer], object] | None = None) -> None:
        self.known = threading.Event()  # the hub knows us, or is gone
        self.over = threading.Event()  # it is gone, or we are
        self._name, self._on_open = name.encode(), on_open
        self._context = context = zmq.Context()
        self._hub, self._outbox, self._box = map(context.socket, (zmq.DEALER, zmq.PUSH, zmq.PULL))
        for end in (self._hub, self._outbox, self._box):
            end.set_hwm(0)  # no limit: what a full queue drops would be missing from a stream
        self._hub.setsockopt(zmq.IDENTITY, self._name)
        self._monitor = self._hub.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._hub.connect(endpoint)
        self._box.bind("inproc://box")
        self._outbox.connect("inproc://box")
        self._lock = threading.Lock()  # protects _outbox: a socket is for one thread at a time
        self._numbers = itertools.count()
        self._readers: dict[bytes, Reader] = {}
        threading.Thread(target=self._run, name="star", daemon=True).start()
        self._send(self._name, b"", HELLO, b"")

    def connect(self, other: str) -> tuple[Reader, Writer]:
        """A new connection to the process of that name."""
        connection = b"%s %d" % (self._name, next(self._numbers))
        ends = self._ends(other.encode(), connection)
        self._send(other.encode(), connection, OPEN, b"")
        return ends

    def close(self) -> None:
        """Leave the star, which ends all connections."""
        self._send(b"")

    def _ends(self, other: bytes, connection: bytes) -> tuple[Reader, Writer]:
        self._readers[connection] = reader = Reader()
        return reader, Writer(lambda kind, data: self._send(other, connection, kind, data))

    def _send(self, *parts: bytes) -> None:
        with self._lock:
            if self._outbox.closed:
                raise ConnectionError("the hub is gone")
            self._outbox.send_multipart(parts)

    def _run(self) -> None:
        poller = zmq.Poller()
        for source in (self._hub, self._box, self._monitor):
            poller.register(source, zmq.POLLIN)
        while self._monitor not in (ready := dict(poller.poll())):  # it tells when the hub is gone
            if self._hub in ready:
                self._take(*self._hub.recv_multipart())
            if self._box in ready:
                parts = self._box.recv_multipart()
                if len(parts) == 1:
                    break
                self._hub.send_multipart(parts)
        with self._lock:
            self._outbox.close()
        for reader in list(self._readers.values()):
            reader.close()
        self.known.set()
        self.over.set()
        self._context.destroy(linger=200)

    def _take(self, other: bytes, connection: bytes, kind: bytes, data: bytes) -> None:
        reader = self._readers.get(connection)
        if kind == HELLO:
            self.known.set()
        elif kind == OPEN and self._on_open is not None:
            self._on_open(*self._ends(other, connection))
        elif kind == DATA and reader is not None:
            reader.chunks.put(data)
        elif kind == END and reader is not None:
            del self._readers[connection]
            reader.close()


def be_hub(endpoint: str) -> None:
    """Pass messages on until stdin ends or brings something: who started us is gone, or needs us no longer."""
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.set_hwm(0)
    router.setsockopt(zmq.LINGER, 0)  # at its end it does not wait until everybody has read everything
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # an error for unknown names, instead of silence
    router.bind(endpoint)
    poller, stdin = zmq.Poller(), sys.stdin.fileno()
    poller.register(router, zmq.POLLIN)
    poller.register(stdin, zmq.POLLIN)
    while stdin not in dict(poller.poll()):
        sender, to, connection, kind, data = router.recv_multipart()
        for message in ([to, sender, connection, kind, data], [sender, to, connection, END, b""]):
            with contextlib.suppress(zmq.ZMQError):  # gone: its peer hears of that, unless it is gone as well
                router.send_multipart(message)
                break
