"""How fast 100 MB get to a worker on another host, beside a plain copy of the same bytes: `python -m hosts.throughput`
(as root, in tests/). Not a test: the figures depend on what else the machine does."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable

from distpool import addprocs, remotecall_fetch, rmprocs
from distpool.transport import tls
from hosts.launching import OnHosts
from hosts.rig import ROOT, Rig

SIZE = 100_000_000
ROUNDS = 7

_RECEIVER = r"""
import json, os, socket, sys
sys.path.insert(0, sys.argv[1])
from distpool.transport.tls import Identity
order = json.loads(sys.stdin.readline())
listener = socket.create_server((order["host"], 0))
print(listener.getsockname()[1], flush=True)
sock, _ = listener.accept()
sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
if order["tls"]:
    sock = Identity.from_settings(order["tls"]).context(True).wrap_socket(sock, server_side=True)
view = memoryview(bytearray(order["size"]))
while True:
    have = 0
    while have < len(view):
        count = sock.recv_into(view[have:])
        if not count:
            os._exit(0)
        have += count
    sock.sendall(b"k")
"""


def timed(once: Callable[[], object]) -> list[float]:
    found = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        once()
        found.append(time.perf_counter() - begin)
    return sorted(found)


def plain(rig: Rig, identity: tls.Identity | None, data: bytes) -> list[float]:
    """`sendall` to a process that reads into one buffer."""
    host = rig["h1"]
    process = subprocess.Popen(
        host.command(sys.executable, "-c", _RECEIVER, ROOT), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    settings = identity.settings() if identity else None
    process.stdin.write(json.dumps({"host": host.address, "tls": settings, "size": len(data)}) + "\n")
    process.stdin.flush()
    sock = socket.create_connection((host.address, int(process.stdout.readline())))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if identity:
        context: ssl.SSLContext = identity.context(server=False)
        sock = context.wrap_socket(sock)

    def once() -> None:
        sock.sendall(data)
        assert sock.recv(1) == b"k"

    once()
    found = timed(once)
    sock.close()
    process.wait(10)
    return found


def ours(rig: Rig, encrypt: bool, data: bytes) -> list[float]:
    """A remote call with an array of so many bytes, which answers with its length."""
    import numpy

    (pid,) = addprocs(OnHosts(rig, ["h1"], encrypt))
    array = numpy.frombuffer(data, dtype="u1")
    remotecall_fetch(len, pid, array)
    found = timed(lambda: remotecall_fetch(len, pid, array))
    rmprocs(pid).result()
    return found


def compare(rig: Rig) -> None:
    data = bytes(SIZE)
    print(f"{'':8}{'plain MB/s':>12}{'distpool MB/s':>15}{'ratio':>8}   (best; medians)")
    for name, identity in (("tcp", None), ("tls", tls.make_identity())):
        copies, calls = plain(rig, identity, data), ours(rig, identity is not None, data)
        middle = ROUNDS // 2
        rate = [SIZE / times[at] / 1e6 for times in (copies, calls) for at in (0, middle)]
        print(
            f"{name:8}{rate[0]:12.0f}{rate[2]:15.0f}{rate[2] / rate[0]:8.2f}"
            f"   {rate[1]:.0f} {rate[3]:.0f} {rate[3] / rate[1]:.2f}"
        )


if __name__ == "__main__":
    with Rig(1) as made:
        made.call("hosts.throughput:compare", seconds=120)
