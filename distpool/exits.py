"""What happens to pending work when the program ends (layer 9).

    normal end, uncaught exception   pending calls of executors complete, as with the standard library
    uncaught KeyboardInterrupt       they are dropped; the program is gone within a second
    workers of addprocs              stay until user `atexit` hooks have run, then are interrupted and end; before that
                                     if threads of the user's do nothing but wait for them (`lingering`)

The hook is registered with `threading._register_atexit`, which runs before the interpreter waits for threads and
before user `atexit` hooks (plain `atexit` would be too late: "cannot schedule new futures" has to be said already
inside them). Whatever still lives when the process is gone is ended by the zygote, which sees its pipe close.
"""

from __future__ import annotations

import contextlib
import importlib
import shutil  # noqa: F401  (see below)
import sys
import threading
import time
from collections.abc import Callable

from distpool import lingering
from distpool.hints import TYPE_CHECKING, Any
from distpool.node import node as nodes

if TYPE_CHECKING:
    from distpool.node.node import Node

# `shutil` is wanted by what the end of an interrupted program loads (`concurrent.futures.process`, for the errors of
# its calls). It evaluates the text of a named tuple, and then CPython forgets that a KeyboardInterrupt was not caught:
# the program would exit with status 1, and not die of SIGINT as shells and other parents expect.

_TOLD = 5.0  # seconds that handlers of the user's may take at the end
_RESERVE = 2  # threads
_PATIENCE = 4.0  # seconds that a busy worker has to end when the program ends


def register(node: Node) -> None:
    """Have the executors of this node finished at the end of the program (once per node)."""
    if not node.exit_registered:
        node.exit_registered = True
        if (3, 12) <= sys.version_info < (3, 12, 2):  # no thread starts at the end (python/cpython#113964), and those
            node.threads.reserve(_RESERVE)  # that idle may have gone by then
        register_atexit: Any = threading._register_atexit  # type: ignore[attr-defined]
        register_atexit(_at_exit, node)


def register_cluster(node: Node, end: Callable[[Node, float], object]) -> None:
    """Have `end(node, patience in seconds)` called when user `atexit` hooks have run: they may use the workers. On the
    leader it does not wait for their end."""
    if node.end_workers is None:
        node.end_workers = end
        # That module's own hook waits for its threads, which may wait for us: the last one registered runs first.
        importlib.import_module("concurrent.futures.thread")
        register_atexit: Any = threading._register_atexit  # type: ignore[attr-defined]
        register_atexit(_watch, node)
    register(node)


def end_cluster() -> None:
    """`distpool/__init__.py` has this called by `atexit`, before it whatever was registered after the import."""
    node = nodes.existing()
    if node is None or node.end_workers is None or not node.is_master:
        return
    with contextlib.suppress(RuntimeError):  # no new threads: the zygote ends the workers when we are gone
        node.end_workers(node, _patience(_interrupted()))


def _interrupted() -> bool:
    """Whether the program ends by an uncaught KeyboardInterrupt."""
    return isinstance(getattr(sys, "last_value", None), KeyboardInterrupt) and not hasattr(sys, "ps1")


def ending() -> bool:
    """Whether the interpreter is shutting down."""
    node = nodes.existing()
    return node is not None and node.exiting


def check_alive() -> None:
    """RuntimeError if the interpreter is shutting down."""
    if ending():
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")


def _watch(node: Node) -> None:
    if nodes.existing() is not node:
        return
    interrupted = _interrupted()
    lingering.watch(node, lambda: node.end_workers(node, _patience(interrupted)), interrupted)


def _patience(interrupted: bool) -> float:
    return 0.2 if interrupted else _PATIENCE


def _at_exit(node: Node) -> None:
    node.exiting = True
    if nodes.existing() is not node:
        return
    interrupted = _interrupted()
    deadline = time.monotonic() + 0.5
    for crew in list(node.crews):
        if not crew.ends_at_exit:
            continue
        crew.scheduler.closing = True
        if interrupted:
            node.loop.call_soon(lambda crew=crew: crew.kill(9))  # type: ignore[misc]
            with node.loop.following():
                crew.finished.wait(max(0.0, deadline - time.monotonic()))
        else:
            node.loop.call_soon(crew.scheduler.pump)
            node.loop.call_soon(crew.scheduler.check_done)
            crew.wait()
    if not interrupted:
        for deliveries in list(node.delivering):
            deliveries.wait()
        node.tell(_TOLD, whole=True)
