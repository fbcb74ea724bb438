"""A manager that starts workers on the hosts of a rig without logging in: what links do is tested apart from SSH."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from distpool import ClusterManager, WorkerConfig
from distpool.managers.base import parse_header
from hosts.rig import ROOT, Rig

_WORKER = r"""
import json, os, sys
sys.path.insert(0, sys.argv[1])
line = bytearray()
while not line.endswith(b"\n"):
    line += os.read(0, 1)
settings = json.loads(line)
os.environ.update(settings["env"])
from distpool.standalone import serve
serve(None, settings["cookie"], settings["host"], 0, tls=settings["tls"])
"""


class OnHosts(ClusterManager):
    """Workers on these hosts: names, each for one worker. `encrypt`: TLS; `loopback`: they listen there only."""

    def __init__(
        self,
        rig: Rig,
        names: list[str],
        encrypt: bool = True,
        loopback: bool = False,
        env: dict[str, str] | None = None,
    ) -> None:
        self.rig, self.names, self.encrypt, self.loopback, self.env = rig, names, encrypt, loopback, env or {}

    def launch(self, params: dict[str, Any]) -> Iterator[WorkerConfig]:
        tls = params["identity"]().settings() if self.encrypt else None
        for name in self.names:
            host = self.rig[name]
            process = subprocess.Popen(
                host.command(sys.executable, "-c", _WORKER, ROOT),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            bind = "127.0.0.1" if self.loopback else host.address
            settings = {"cookie": params["cookie"], "host": bind, "tls": tls, "env": self.env}
            assert process.stdin is not None
            process.stdin.write(json.dumps(settings).encode() + b"\n")
            process.stdin.close()
            yield WorkerConfig(
                io=process.stdout, process=process, bind_addr=host.address, environ={"tls": True} if tls else None
            )


class Disguised(OnHosts):
    """Their listeners encrypt, but the master is not told."""

    def launch(self, params: dict[str, Any]) -> Iterator[WorkerConfig]:
        for worker in super().launch(params):
            worker.environ = None
            yield worker


class Tunnelled(OnHosts):
    """They listen on loopback only, and a process beside them carries the master's bytes over its pipes."""

    def __init__(self, rig: Rig, names: list[str]) -> None:
        super().__init__(rig, names, encrypt=False, loopback=True)

    def launch(self, params: dict[str, Any]) -> Iterator[WorkerConfig]:
        for name, worker in zip(self.names, super().launch(params), strict=True):
            worker.userdata = self.rig[name]
            found = parse_header(worker.io.readline().decode())
            assert found is not None
            worker.host, worker.port = found
            yield worker

    def connect(self, pid: int, config: WorkerConfig) -> Any:
        command = config.userdata.command(sys.executable, "-Sc", _CARRY, config.port)
        # The pipes end with the link, and that ends the process.
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return process.stdout, process.stdin


_CARRY = r"""
import os, socket, sys, threading
sock = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
def carry():
    while data := os.read(0, 65536):
        sock.sendall(data)
    os._exit(0)
threading.Thread(target=carry, daemon=True).start()
while data := sock.recv(65536):
    os.write(1, data)
os._exit(0)
"""
