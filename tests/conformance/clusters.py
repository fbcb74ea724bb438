"""Cluster managers that the cases use: each starts real processes in a way of its own."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import distpool
from distpool import ClusterManager, WorkerConfig

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")])}

SERVE_STREAMS = """
import socket, sys, distpool
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
distpool.init_worker(sys.stdin.readline().strip())
{serve}
"""
WHOLE = "distpool.process_messages(sock, sock)"
ONE_BYTE = """
class Reader:
    def readinto(self, buffer):
        return sock.recv_into(buffer, 1)
    def close(self):
        sock.close()
class Writer:
    def write(self, data):
        return sock.send(data[:1])
    def close(self):
        sock.shutdown(socket.SHUT_RDWR)
distpool.process_messages(Reader(), Writer())
"""


class Recording(ClusterManager):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []
        self.killed: list[int] = []
        self.params: dict[str, Any] = {}

    def manage(self, pid: int, config: WorkerConfig, op: str) -> None:
        self.told.append((op, pid))

    def kill(self, pid: int, config: WorkerConfig) -> None:
        self.killed.append(pid)
        super().kill(pid, config)

    def ops(self, pid: int) -> list[str]:
        return [op for op, told in self.told if told == pid]


def start(command: list[str], cookie: str, **options: Any) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ENVIRONMENT, **options
    )
    assert process.stdin is not None
    try:
        with process.stdin as stdin:
            stdin.write(cookie.encode() + b"\n")
    except OSError:
        pass  # it does not read
    return process


class ByCommand(Recording):
    """Workers by `python -m distpool worker`, or whatever the command is; the header line comes over stdout."""

    def __init__(self, n: int = 1, command: list[str] | None = None, wrap: Any = None) -> None:
        super().__init__()
        self.n = n
        self.command = command or [sys.executable, "-m", "distpool", "worker", "--bind-to", "127.0.0.1"]
        self.wrap = wrap or (lambda stream: stream)
        self.processes: list[subprocess.Popen[bytes]] = []

    def launch(self, params: dict[str, Any]) -> Iterator[WorkerConfig]:
        self.params = params
        for _ in range(self.n):
            process = start(self.command, params["cookie"])
            self.processes.append(process)
            yield WorkerConfig(io=self.wrap(process.stdout), process=process)


class Unpollable(io.RawIOBase):
    """A stream without a descriptor."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return int(self._stream.readinto1(buffer))


class OverStreams(Recording):
    """Workers that connect to a Unix socket of ours: no header line, no listening worker."""

    def __init__(self, n: int = 1, serve: str = WHOLE, pair: bool = False, known: bool = True) -> None:
        super().__init__()
        self.n = n
        self.serve = serve
        self.pair = pair
        self.known = known  # whether it tells which processes they are
        self.sockets: dict[int, socket.socket] = {}
        self.streams: dict[int, Any] = {}
        self.processes: list[subprocess.Popen[bytes]] = []

    def launch(self, params: dict[str, Any]) -> list[WorkerConfig]:
        configs = []
        for _ in range(self.n):
            directory = tempfile.mkdtemp()
            path = os.path.join(directory, "s")
            with socket.socket(socket.AF_UNIX) as listener:
                listener.settimeout(50)
                listener.bind(path)
                listener.listen(1)
                code = SERVE_STREAMS.format(serve=self.serve)
                process = start([sys.executable, "-c", code, path], params["cookie"])
                self.processes.append(process)
                connected, _ = listener.accept()
            os.unlink(path)
            os.rmdir(directory)
            connected.settimeout(None)
            known = process if self.known else None
            configs.append(WorkerConfig(io=process.stdout, process=known, userdata=connected))
        return configs

    def connect(self, pid: int, config: WorkerConfig) -> Any:
        sock = self.sockets[pid] = config.userdata
        if not self.pair:
            return sock
        self.streams[pid] = reader, writer = sock.makefile("rb"), sock.makefile("wb", buffering=0)
        return reader, writer

    def kill(self, pid: int, config: WorkerConfig) -> None:
        self.killed.append(pid)
        for stream in self.streams.get(pid, ()):
            stream.close()
        self.sockets[pid].close()


def from_any_thread(function: Any) -> threading.Thread:
    thread = threading.Thread(target=function)
    thread.start()
    return thread


def others() -> list[int]:
    """Pids of the workers; empty when alone."""
    return distpool.procs()[1:]
