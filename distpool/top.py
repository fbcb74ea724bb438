"""The live table of workers: the endpoint in the watched program, and what draws it elsewhere (layer 9).

    DISTPOOL_TOP=127.0.0.1:8790 python program.py            or a path for a Unix socket (mode 0700)
    python -m distpool top 127.0.0.1:8790

    program: leader accepts -> a library thread per client: line "stats" -> one line of JSON
    top:     connects, asks once per interval, prints (main thread)

No authentication: only loopback addresses and private Unix sockets are served, and nothing but numbers and names of
functions is told. Any other request ends the connection, so a web page that makes a browser connect learns nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import ipaddress
import json
import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

from distpool import monitor
from distpool.logs import Log
from distpool.node.node import Node
from distpool.sigpipe import QUIET
from distpool.transport.door import Door

log = Log("top")

_CLIENTS = 8  # at a time; further ones are turned away
_IDLE = 60.0  # seconds without a request after which a client is dropped
_MAX_ANSWER = 16 << 20
_COLUMNS = ("pid", "host", "ospid", "cpu %", "memory", "done", "failed", "queued", "in", "out", "since", "running")
_LEFT = frozenset((1, 11))  # columns that are text
_making = threading.Lock()  # protects Node.top while it is made


def parse_address(text: str) -> str | tuple[str, int]:
    """`"HOST:PORT"` as a pair (IPv6 in brackets), anything with a slash as the path of a Unix socket.

    ValueError for what is neither.
    """
    if "/" in text or os.sep in text:
        return text
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{text!r} is neither HOST:PORT nor the path of a socket")
    return host, int(port)


# -- the watched program -----------------------------------------------------------------------------------------


def serve_if_wanted(node: Node) -> None:
    """Start the endpoint that `DISTPOOL_TOP` names, once per node. Any thread: before the first workers are started, by
    an executor or by `addprocs` (so by `python -m distpool run` as well).

    ValueError if the variable names no address, or one that is not loopback. An address in use is only logged: the
    programs that this one starts inherit the variable.
    """
    text = os.environ.get("DISTPOOL_TOP", "")
    if not text or node.top is not None:
        return
    address = parse_address(text)
    if isinstance(address, tuple) and not is_loopback(address[0]):
        raise ValueError(
            f"DISTPOOL_TOP must be a loopback address or a path, not {text!r}: whoever connects is answered"
        )
    with _making:
        if node.top is not None:  # another thread adds its first workers at the same time
            return
        try:
            node.top = Endpoint(node, address)
        except OSError as error:
            node.top = error  # do not try again
            log.warning("cannot listen on DISTPOOL_TOP=%s: %s", text, error)


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Endpoint:
    """Answers "stats" on a listening socket."""

    def __init__(self, node: Node, address: str | tuple[str, int]) -> None:
        self._node = node
        self._path = ""
        self._clients = threading.Semaphore(_CLIENTS)
        self._listener = self._listen(address)
        self.address: Any = self._listener.getsockname()
        node.on_fork.append(self._listener.close)
        self._door = Door(node.loop, self._listener, None, self._on_client, log.warning)

    def _listen(self, address: str | tuple[str, int]) -> socket.socket:
        if isinstance(address, tuple):
            family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
            return socket.create_server(address, family=family, backlog=_CLIENTS)
        if not hasattr(socket, "AF_UNIX"):
            raise OSError("this system has no Unix sockets")
        remove_stale(address)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(address)
            self._path = address
            atexit.register(self._remove, os.getpid())
            os.chmod(address, 0o700)  # before `listen`: until then nobody can connect
            listener.listen(_CLIENTS)
        except OSError:
            listener.close()
            raise
        return listener

    def _remove(self, ospid: int) -> None:
        if os.getpid() == ospid:  # a forked child must not remove its parent's
            with contextlib.suppress(OSError):
                os.unlink(self._path)

    def _on_client(self, client: socket.socket) -> None:
        if not self._clients.acquire(blocking=False):
            client.close()
            return
        self._node.deliver(lambda: self._serve(client))

    def _serve(self, client: socket.socket) -> None:
        try:
            with client, contextlib.suppress(OSError):
                client.settimeout(_IDLE)
                with client.makefile("rb") as requests:
                    while requests.readline(64).strip() == b"stats":
                        answer = {"ospid": os.getpid(), "time": time.time(), "workers": monitor.stats()}
                        client.sendall(json.dumps(answer).encode() + b"\n", QUIET)
        finally:
            self._clients.release()


def remove_stale(path: str) -> None:
    """Remove the socket that a killed program left; OSError if somebody listens there, or if it is no socket."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(f"{path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise OSError(f"another program listens on {path}")


# -- the watching one --------------------------------------------------------------------------------------------


class Client:
    """A connection to the endpoint of a program; OSError if there is none."""

    def __init__(self, address: str | tuple[str, int], timeout: float = 10.0) -> None:
        if isinstance(address, tuple):
            self._socket = socket.create_connection(address, timeout)
        else:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.settimeout(timeout)
            try:
                self._socket.connect(address)
            except OSError:
                self._socket.close()
                raise
        self._answers = self._socket.makefile("rb")

    def stats(self) -> dict[str, Any]:
        """What the program tells; EOFError if it has ended, ValueError if it is none of ours."""
        try:
            self._socket.sendall(b"stats\n")
            line = self._answers.readline(_MAX_ANSWER)
        except ConnectionError:  # it had our question unread when it ended
            line = b""
        if not line:
            raise EOFError("the program has ended")
        answer = json.loads(line)
        if not isinstance(answer, dict) or not isinstance(answer.get("workers"), list):
            raise ValueError("not an answer of a distpool program")
        return answer

    def close(self) -> None:
        """Close the connection."""
        self._answers.close()
        self._socket.close()


def table(workers: list[dict[str, Any]]) -> str:
    """Rows of `stats` as text, one line per worker under a line of titles."""
    rows = [_COLUMNS, *(_cells(row) for row in workers)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column in _LEFT else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    cpu, since = row["cpu"], row["since"]
    return (
        str(row["pid"]),
        printable(str(row["host"])),
        str(row["ospid"]),
        "-" if cpu is None else f"{cpu:.0f}",
        size(row["memory"]),
        str(row["done"]),
        str(row["failed"]),
        str(row["queued"]),
        size(row["bytes_in"]),
        size(row["bytes_out"]),
        "-" if since is None else f"{since:.1f} s",
        "-" if row["running"] is None else printable(str(row["running"])),
    )


def printable(text: str) -> str:
    """`text` without what a terminal would obey; function names and labels are anybody's."""
    return "".join(character if character.isprintable() else "?" for character in text[:80])


def size(count: int | None) -> str:
    """Bytes as people read them: `17.3 MB`."""
    if count is None:
        return "-"
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def watch(
    client: Client,
    once: bool,
    interval: float,
    out: TextIO | None = None,
    pause: Callable[[float], object] | None = None,
) -> None:
    """Print the table, once or until the program ends (EOFError). `interval`: seconds between two looks."""
    out = out if out is not None else sys.stdout
    pause = pause if pause is not None else time.sleep
    while True:
        answer = client.stats()
        workers = answer["workers"]
        text = table(workers)
        if once:
            print(text, file=out, flush=True)
            return
        running = sum(row["running"] is not None for row in workers)
        clock = time.strftime("%H:%M:%S", time.localtime(answer["time"]))
        head = f"program {answer['ospid']}   {clock}   {len(workers)} workers, {running} busy   (Ctrl-C ends)"
        # Home, then each line and the rest of the screen are cleared behind what is written: no flicker.
        lines = "\x1b[K\n".join([head, "", *text.split("\n")])
        print(f"\x1b[H{lines}\x1b[K\n\x1b[J", end="", file=out, flush=True)
        pause(interval)


__all__ = ["Client", "Endpoint", "parse_address", "serve_if_wanted", "table", "watch"]
