"""Julia's macros for single calls: `spawn`, `spawnat`, `fetchfrom`, `fetch_any`, and `sync` (layer 6).

    with sync():  remotecall, spawn, spawnat, distributed note their futures in `Node.collecting[thread]`
                  end of the block -> waits for each, in the order of starting -> CompositeException

All of it runs in the caller's thread.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

from distpool.calls import _node, remotecall, remotecall_fetch
from distpool.errors import CompositeException
from distpool.refs.refs import Future

T = TypeVar("T")


def spawn(f: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
    """Run `f(*args, **kwargs)` on some worker (round robin) and return a Future at once; as `remotecall(f, "any")`.

    Example: `fetch(spawn(pow, 2, 10))` is 1024.
    """
    return remotecall(f, "any", *args, **kwargs)


def spawnat(pid: int | Literal["any"], f: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
    """Run `f(*args, **kwargs)` on process `pid` ("any": some worker) and return a Future at once.

    Errors as for `remotecall`. Example: `fetch(spawnat(2, os.getpid))`
    """
    return remotecall(f, pid, *args, **kwargs)


def fetchfrom(pid: int | Literal["any"], f: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
    """The value of `f(*args, **kwargs)`, computed on process `pid`; `RemoteException` if it raises there.

    Example: `fetchfrom(2, os.getpid)`
    """
    return remotecall_fetch(f, pid, *args, **kwargs)


def fetch_any(f: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
    """The value of `f(*args, **kwargs)`, computed on some worker (round robin). Example: `fetch_any(os.getpid)`"""
    return remotecall_fetch(f, "any", *args, **kwargs)


@contextlib.contextmanager
def sync() -> Iterator[None]:
    """A block whose end waits for all that was started inside of it, by this thread: calls of `remotecall`, `spawn`,
    `spawnat`, and `distributed` loops.

    `CompositeException` with the errors in the order of starting, also if there is only one. An error of the block
    itself is raised at once, and nothing is waited for.

    Example:
        with sync():
            for pid in workers():
                spawnat(pid, load)
    """
    node = _node()
    started: list[Any] = []
    thread = threading.get_ident()  # a block inside a generator may be closed by another one
    blocks = node.collecting.setdefault(thread, [])
    blocks.append(started)
    try:
        yield
    finally:
        blocks[:] = [block for block in blocks if block is not started]  # others may be equal: they are empty, too
        if not blocks:
            node.collecting.pop(thread, None)
    errors: list[Exception] = []
    for future in started:
        try:
            future.wait()
        except CompositeException as error:  # of a loop: its errors stand for themselves
            errors.extend(error.exceptions)
        except Exception as error:
            errors.append(error)
    if errors:
        raise CompositeException(errors)


__all__ = ["fetch_any", "fetchfrom", "spawn", "spawnat", "sync"]
