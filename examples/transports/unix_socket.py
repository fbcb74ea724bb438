"""A transport of one's own: workers behind Unix sockets, also towards each other.

    python examples/transports/unix_socket.py             starts three workers and lets them call each other

A manager that overrides `connect` decides what the bytes travel over. Here each worker listens at a path in a private
directory; the master makes that listener before it starts the process, so nobody has to wait for anybody.

    master:  launch -> listener + process -> connect(pid, config): dial, leave the path in config.connect_at
    worker:  init_worker(cookie, manager); each accepted connection -> process_messages
             first call to another worker -> connect(pid, config): dial the path that the master left
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import distpool


class UnixSocketManager(distpool.ClusterManager):
    """`addprocs(UnixSocketManager(4))` starts four local workers that talk over Unix sockets and nothing else."""

    program = __file__  # what the workers run

    def __init__(self, count: int = 0) -> None:
        self.count = count
        self.processes: list[subprocess.Popen[bytes]] = []

    def launch(self, params: dict[str, Any]) -> Iterator[distpool.WorkerConfig]:
        for _ in range(self.count):
            path = os.path.join(tempfile.mkdtemp(prefix="unix-transport-"), "worker")
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(path)
                listener.listen()
                process = subprocess.Popen(
                    [sys.executable, self.program, "--worker", str(listener.fileno())],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    pass_fds=[listener.fileno()],
                    start_new_session=True,  # Ctrl-C in the terminal is for the master
                )
            assert process.stdin is not None
            with contextlib.suppress(OSError), process.stdin as stdin:  # it may have died: `connect` will tell
                stdin.write(params["cookie"].encode() + b"\n")
            self.processes.append(process)
            yield distpool.WorkerConfig(io=process.stdout, process=process, userdata=path)

    def connect(self, pid: int, config: distpool.WorkerConfig) -> socket.socket:
        """On the master (`userdata` is ours) and on workers (only `connect_at` came along)."""
        if config.connect_at is None:
            config.connect_at = config.userdata
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(config.connect_at)
        except OSError:
            sock.close()
            raise
        return sock

    def manage(self, pid: int, config: distpool.WorkerConfig, op: str) -> None:
        if op == "finalize":
            shutil.rmtree(os.path.dirname(config.userdata), ignore_errors=True)


def be_worker(descriptor: int) -> None:
    """What a launched process does: hand each connection over. The library ends the process."""
    distpool.init_worker(sys.stdin.readline().strip(), UnixSocketManager())
    listener = socket.socket(fileno=descriptor)
    while True:
        connection, _ = listener.accept()
        distpool.process_messages(connection, connection)


def main() -> None:
    pids = distpool.addprocs(UnixSocketManager(3))
    ring = [pids[(index + 1) % len(pids)] for index in range(len(pids))]
    answers = [
        distpool.remotecall_fetch(distpool.remotecall_fetch, pid, distpool.myid, neighbour)
        for pid, neighbour in zip(pids, ring, strict=True)
    ]
    assert answers == ring
    print(f"workers {pids} asked their neighbours over Unix sockets: {answers}")
    distpool.rmprocs(pids)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        be_worker(int(sys.argv[2]))
    else:
        main()
