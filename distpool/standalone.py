"""Workers that were not started by distpool itself: by hand, by a queue, by a custom transport (layer 11).

    python -m distpool worker, start_worker()   cookie (argument or stdin) -> listener -> header line on stdout -> serve
    init_worker(cookie, manager)                no listener: the transport hands over streams
    process_messages(reader, writer)            ... which are served as connections of the master or of other workers

`start_worker` and `serve` run on the main thread and do not return; the others return at once.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import sys
from typing import Any, NoReturn

from distpool import config, startup
from distpool.managers.record import WorkerConfig
from distpool.managers.surroundings import here, routable_address
from distpool.node import node as nodes
from distpool.transport.stream import Adopted, adopt
from distpool.wire import codec
from distpool.wire.protocol import Role
from distpool.worker import Worker


def start_worker(
    out: Any = None, cookie: str | None = None, *, close_stdin: bool = True, stderr_to_stdout: bool = True
) -> NoReturn:
    """Be a worker: print `distpool_worker:PORT#ADDR` on `out` (default: stdout) and serve whoever connects there and
    knows the cookie (default: the first line of stdin). Does not return: the process exits when its master is done with
    it, with status 1 if no master comes within `DISTPOOL_WORKER_TIMEOUT` (60) seconds.

    `close_stdin`: user code finds nothing to read there; `stderr_to_stdout`: errors go where the output goes.
    ValueError: no usable cookie. RuntimeError: not on the main thread, or this process is in a group already.

    Example: `python -c "import distpool; distpool.start_worker()"`, with the cookie on its stdin.
    """
    check_unused()
    serve(out, read_cookie() if cookie is None else cookie, routable_address(), 0, close_stdin, stderr_to_stdout)


def serve(
    out: Any,
    cookie: str,
    host: str,
    port: int,
    close_stdin: bool = True,
    stderr_to_stdout: bool = True,
    tls: dict[str, str] | None = None,
) -> NoReturn:
    """As `start_worker`, at this address; with `tls` (`{"certificate", "key"}`, PEM) for encrypted connections only.

    OSError: it cannot listen there. ValueError: `tls` is no certificate with its key.
    """
    config.check_cookie(cookie)
    started_by = os.environ.pop("DISTPOOL_STARTED_BY", None)
    if started_by is not None:  # by `siblings`
        from distpool.orphans import take_over

        take_over(started_by)
    listener = listen(host, port)
    if stderr_to_stdout:
        out = as_it_is(out)
    redirect(close_stdin, stderr_to_stdout)
    # A clean `__main__`, as every worker has it: the caller's functions must not meet this program's names there.
    startup.prepare({"cwd": here(), "sys_path": sys.path, "own_path": False}, [])
    name = listener.getsockname()
    announce(out, f"distpool_worker:{name[1]}#{name[0]}\n")
    del out  # whoever reads the header there, from the descriptor that we have kept, waits for its end perhaps
    startup.finish(startup.run(listener, {"cookie": cookie, "tls": tls}))


def init_worker(cookie: str, manager: Any = None) -> None:
    """Make this process a worker that is reached through a transport of your own: hand each connection over to
    `process_messages`. Returns at once; calls run on a thread of the library, and the process ends when its master is
    done with it (or, with status 1, if none comes within `DISTPOOL_WORKER_TIMEOUT` seconds).

    `manager`: whose `connect(pid, config)` makes links to other workers, when they are first needed (on a library
    thread); `config.connect_at` is what `connect` of the master's manager left there for that worker. Without one,
    calls to workers of custom transports fail. ValueError: no usable cookie. RuntimeError: this process is in a group.

    Keep the main thread waiting (accepting connections, say): after its end, Python refuses user code new thread pools.
    `interrupt` reaches calls here between two bytecodes and in waits of this library, but not inside a call of C, such
    as `time.sleep`: only the main thread can be woken from those.

    Example: `init_worker(cookie); process_messages(sock, sock)`
    """
    check_unused()
    config.check_cookie(cookie)
    worker = Worker(cookie)
    if manager is not None:

        def connect(pid: int, connect_at: str) -> Adopted:
            given = manager.connect(pid, WorkerConfig(connect_at=codec.decode(bytes.fromhex(connect_at))))
            return adopt(given)

        worker.node.peers.connect_by_manager = connect
    worker.run_beside()


def process_messages(reader: Any, writer: Any, incoming: bool = True) -> None:
    """Serve the process at the other end of these streams; returns at once. They may be one connected socket.

    `reader`: `readinto(buffer) -> n`, 0 at the end; `writer`: `write(bytes) -> n`, `flush` if it has one. Both belong
    to the library from now on; closing one means the end of the connection. `incoming=False`: this process made the
    connection, to another worker. RuntimeError: this process is not a worker (`init_worker`).

    Example: `process_messages(channel_in, channel_out)`
    """
    node = nodes.existing()
    worker = None if node is None else node.worker
    if worker is None:
        raise RuntimeError("process_messages works on workers: call init_worker first")
    adopted = adopt((reader, writer))
    role = Role.ACCEPTOR if incoming else Role.CONNECTOR
    worker.loop.call_soon(lambda: worker.take(adopted.stream, role, adopted))


# -- parts -------------------------------------------------------------------------------------------------------


def check_unused() -> None:
    """RuntimeError if this process is a member of a group."""
    node = nodes.existing()
    if node is not None and (node.worker is not None or node.group is not None):
        raise RuntimeError("this process belongs to a process group already")


def read_cookie() -> str:
    """The first line of stdin, and not a byte of what follows."""
    line = bytearray()
    while not line.endswith(b"\n") and len(line) <= config.MAX_COOKIE + 2:
        byte = os.read(0, 1)
        if not byte:
            break
        line += byte
    return line.decode("utf-8", "replace").removesuffix("\n").removesuffix("\r")


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        if port and os.name == "posix":  # a worker that was here a moment ago must not keep its successor out
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(startup.BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def redirect(close_stdin: bool, stderr_to_stdout: bool) -> None:
    """The standard streams as a worker has them."""
    if close_stdin:
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
    if stderr_to_stdout:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.flush()
        os.dup2(1, 2)


def as_it_is(out: Any) -> Any:
    """A stream to where `out` goes now, should that be stderr: `redirect` leads it elsewhere."""
    try:
        if out.fileno() != 2:
            return out
        out.flush()
    except (OSError, ValueError, AttributeError):  # it has no descriptor
        return out
    return os.fdopen(os.dup(2), "wb", buffering=0)  # closed when it is dropped: the header is all that goes there


def announce(out: Any, header: str) -> None:
    """Print the header line in one write, so that nothing can get into it."""
    if out is None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stdout.flush()
        os.write(1, header.encode())
        return
    out.write(header if isinstance(out, io.TextIOBase) else header.encode())
    flush = getattr(out, "flush", None)
    if flush is not None:
        flush()


__all__ = ["init_worker", "process_messages", "serve", "start_worker"]
