"""A transport of one's own: a star. All traffic of all processes goes through one hub process (needs pyzmq).

    python examples/transports/broker.py                  starts three workers and lets them call each other

A manager that overrides `connect` decides what the bytes travel over. Here it is a connection of star.py: the hub and
a name there are all that one has to know to reach a worker, so that is what the master leaves in `config.connect_at`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import star

import distpool


class BrokerManager(distpool.ClusterManager):
    """`addprocs(BrokerManager(4))` starts a hub and four local workers that talk through it and nothing else."""

    def __init__(self, count: int = 0) -> None:
        self.count = count
        self.clients: dict[str, star.Client] = {}  # by the address of the hub: a worker may have to reach other stars
        self.processes: list[subprocess.Popen[bytes]] = []
        self.hub: subprocess.Popen[bytes] | None = None
        self._living = 0
        self._streams: dict[int, tuple[star.Reader, star.Writer]] = {}
        self._lock = threading.Lock()  # protects _living (workers, and launches under way), hub, clients

    def launch(self, params: dict[str, Any]) -> Iterator[distpool.WorkerConfig]:
        with self._lock:
            self._living += 1  # this launch: it may fail half-way, or be given up, and the star is to end all the same
        started: list[tuple[str, subprocess.Popen[bytes]]] = []  # and nobody else knows of them yet
        try:
            with self._lock:
                if self.hub is None:
                    self._directory = tempfile.mkdtemp(prefix="broker-")
                    self._endpoint = f"ipc://{self._directory}/hub"
                    self.hub = self._start("hub", self._endpoint)
                    self.clients[self._endpoint] = star.Client(self._endpoint, "master")
            for _ in range(self.count):
                name = f"worker-{len(self.processes)}"
                process = self._start("worker", self._endpoint, name, stdout=subprocess.PIPE)
                self.processes.append(process)
                started.append((name, process))
                assert process.stdin is not None
                with contextlib.suppress(OSError), process.stdin as stdin:  # it may have died: `connect` will tell
                    stdin.write(params["cookie"].encode() + b"\n")
            while started:
                name, process = started[0]
                assert process.stdout is not None
                while process.stdout.readline() not in (b"", b"ready\n"):
                    pass
                with self._lock:
                    self._living += 1
                del started[0]
                yield distpool.WorkerConfig(io=process.stdout, process=process, userdata=(self._endpoint, name))
        finally:
            for _, process in started:
                process.kill()
                process.wait()
            self._leave()

    def _start(self, *arguments: str, stdout: int | None = None) -> subprocess.Popen[bytes]:
        command = [sys.executable, __file__, *arguments]  # a session of its own: Ctrl-C is for the master
        error = None if stdout is None else subprocess.STDOUT
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stdout, stderr=error, start_new_session=True)

    def connect(self, pid: int, config: distpool.WorkerConfig) -> tuple[star.Reader, star.Writer]:
        """On the master (`userdata` is ours) and on workers (only `connect_at` came along)."""
        if config.connect_at is None:
            config.connect_at = config.userdata
        endpoint, name = config.connect_at
        with self._lock:
            if endpoint not in self.clients:  # the star of another manager
                self.clients[endpoint] = star.Client(endpoint, secrets.token_hex(8))
            self._streams[pid] = streams = self.clients[endpoint].connect(name)
        return streams

    def kill(self, pid: int, config: distpool.WorkerConfig) -> None:
        """A worker without its master ends by itself."""
        for stream in self._streams.pop(pid, ()):
            with contextlib.suppress(ConnectionError):
                stream.close()

    def manage(self, pid: int, config: distpool.WorkerConfig, op: str) -> None:
        if op == "finalize":
            self._streams.pop(pid, None)
            self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._living -= 1
            if not self._living and self.hub is not None:
                self._end_star(self.hub)
                self.hub = None

    def _end_star(self, hub: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(ConnectionError, KeyError):
            self.clients.pop(self._endpoint).close()
        try:
            hub.communicate(b"end", timeout=10)  # not only the end of stdin: a fork of this process keeps that open
        except subprocess.TimeoutExpired:
            hub.kill()
            hub.wait()
        shutil.rmtree(self._directory, ignore_errors=True)


def be_worker(endpoint: str, name: str) -> None:
    """What a launched process does: hand each connection over. The library ends the process."""
    manager = BrokerManager()
    distpool.init_worker(sys.stdin.readline().strip(), manager)
    client = manager.clients[endpoint] = star.Client(endpoint, name, distpool.process_messages)
    client.known.wait()
    print("ready", flush=True)
    client.over.wait()  # a program whose main thread has ended cannot start thread pools any more


def main() -> None:
    pids = distpool.addprocs(BrokerManager(3))
    ring = [pids[(index + 1) % len(pids)] for index in range(len(pids))]
    answers = [
        distpool.remotecall_fetch(distpool.remotecall_fetch, pid, distpool.myid, neighbour)
        for pid, neighbour in zip(pids, ring, strict=True)
    ]
    assert answers == ring
    print(f"workers {pids} asked their neighbours through the hub: {answers}")
    distpool.rmprocs(pids)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["hub", endpoint]:
            star.be_hub(endpoint)
            directory = os.path.dirname(endpoint.removeprefix("ipc://"))
            shutil.rmtree(directory, ignore_errors=True)  # the master may be gone
        case ["worker", endpoint, name]:
            be_worker(endpoint, name)
        case _:
            main()
