"""The ways in which four workers can be reached: the same cases run over each of them (fixture `w`).

fork    processes of the zygote, Unix sockets, shared memory      (what `addprocs(4)` gives on Linux)
exec    fresh interpreters, loopback TCP
unix    examples/transports/unix_socket.py: a manager whose `connect` returns sockets
star    examples/transports/broker.py: everything through one hub process, pairs of streams (needs pyzmq)
bytes   as `unix`, but every read and every write moves a single byte
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import socket
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import distpool

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
EXAMPLES = os.path.join(ROOT, "examples", "transports")
KINDS = ("fork", "exec", "unix", "star", "bytes")
CUSTOM = KINDS[2:]


def example(name: str) -> Any:
    """A module of examples/transports."""
    if EXAMPLES not in sys.path:
        sys.path.append(EXAMPLES)
    return importlib.import_module(name)


def manager_of(kind: str, count: int) -> Any:
    """What to give to `addprocs`."""
    if kind == "unix":
        return example("unix_socket").UnixSocketManager(count)
    if kind == "star":
        pytest.importorskip("zmq", reason="pyzmq is not installed: pip install '.[test]'")
        return example("broker").BrokerManager(count)
    if kind == "bytes":
        return bytewise_manager()(count)
    if kind == "astray":
        return astray_manager()(count)
    return count


@contextlib.contextmanager
def environment(kind: str) -> Iterator[None]:
    """What has to be set while workers of this kind are launched."""
    path = [ROOT, os.path.join(ROOT, "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(path))
        if kind == "exec":
            patch.setenv("DISTPOOL_LAUNCH", "exec")
            patch.setenv("DISTPOOL_TRANSPORT", "tcp")
        yield


def add(kind: str, count: int) -> list[int]:
    """Pids of `count` new workers."""
    with environment(kind):
        return distpool.addprocs(manager_of(kind, count))


# -- a byte at a time --------------------------------------------------------------------------------------------


class OneByte:
    """A stream over a socket: each call moves one byte."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def readinto(self, buffer: Any) -> int:
        return self._sock.recv_into(buffer, 1)

    def write(self, data: bytes) -> int:
        return self._sock.send(data[:1])

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes who reads
        self._sock.close()


def bytewise_manager() -> Any:
    base = example("unix_socket").UnixSocketManager

    class Bytewise(base):  # type: ignore[misc,valid-type]
        program = __file__

        def connect(self, pid: int, config: Any) -> Any:
            stream = OneByte(super().connect(pid, config))
            return stream, stream

    return Bytewise


def astray_manager() -> Any:
    """On workers, every `connect` goes to the first of them (whose place comes along with the right one)."""
    base = example("unix_socket").UnixSocketManager

    class Astray(base):  # type: ignore[misc,valid-type]
        program = __file__
        first = ""

        def launch(self, params: Any) -> Iterator[Any]:
            for config in super().launch(params):
                self.first = self.first or config.userdata  # not in `connect`: which of those comes first is chance
                yield config

        def connect(self, pid: int, config: Any) -> Any:
            if config.connect_at is None:  # on the master
                sock = super().connect(pid, config)
                config.connect_at = "astray", self.first
                return sock
            config.connect_at = config.connect_at[1]
            return super().connect(pid, config)

    return Astray


class _Either:
    """The manager on workers of this file's program."""

    def connect(self, pid: int, config: Any) -> Any:
        kind = astray_manager() if isinstance(config.connect_at, tuple) else bytewise_manager()
        return kind().connect(pid, config)


def be_worker(descriptor: int) -> None:
    distpool.init_worker(sys.stdin.readline().strip(), _Either())
    listener = socket.socket(fileno=descriptor)
    while True:
        stream = OneByte(listener.accept()[0])
        distpool.process_messages(stream, stream)


if __name__ == "__main__":
    be_worker(int(sys.argv[2]))
