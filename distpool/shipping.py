"""Modules that workers fetch from the master when they are first imported: `ship="auto"` (layer 9).

    worker, the thread that imports:  sys.meta_path ... Fetcher.find_spec("mymod")
                                        -> pid 1: offer(name)            digest, or nothing
                                        -> pid 1: content(name, digest)  only if no worker of this host has it yet
                                        -> cache directory of the host -> an ordinary spec of files
    pid 1, library thread:            find the module (it is not imported), pack its files

The finder is the last one, so whatever the host has itself is used. Python calls finders with the import lock held,
which any other thread needs that imports anything: one that decodes the answer, say, or one that has to run first. So
it is released while the answer is awaited; what is left is the lock of one module, on which nothing of ours waits.

Only what lives in the master's own tree is handed out: not the standard library, nor installed packages.
"""

from __future__ import annotations

import _imp
import contextlib
import importlib
import importlib.machinery
import os
import sys
import sysconfig
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from distpool.calls import remotecall_fetch
from distpool.errors import DistpoolError
from distpool.managers import archive
from distpool.managers.unpacking import Cache
from distpool.node import node as nodes
from distpool.node.node import Node

_NEVER = frozenset({*sys.stdlib_module_names, "__main__", "__mp_main__", "cloudpickle", "distpool"})
_INSTALLED = ("site-packages", "dist-packages")
_REMEMBERED = 64  # archives that were offered and may be asked for


# -- the worker --------------------------------------------------------------------------------------------------


class Fetcher:
    """A finder for `sys.meta_path`: top-level modules that pid 1 has and this process has not."""

    def __init__(self, root: str) -> None:
        self._cache = Cache(root)
        self._places: dict[str, str | None] = {}  # name -> directory; None: the master has it not either; atomic
        self._asking: dict[str, threading.Lock] = {}  # name -> whoever asks holds it; atomic

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of a module that has just been fetched, or was; None if it is nobody's.

        ImportError: the master has it, but it cannot be had. Any thread but the leader, which gets None.
        """
        if path is not None or "." in fullname or fullname in _NEVER:
            return None
        if fullname not in self._places:
            node = nodes.existing()
            if node is None or node.pid < 2 or node.loop.leads:  # a forked child; not joined yet
                return None
            with import_lock_released():
                self._fetch(fullname)
        place = self._places.get(fullname)
        return importlib.machinery.PathFinder.find_spec(fullname, [place]) if place is not None else None

    def invalidate_caches(self) -> None:
        """`importlib.invalidate_caches()`: what the master did not have may be there now."""
        for name in [name for name, place in list(self._places.items()) if place is None]:
            self._places.pop(name, None)

    def _fetch(self, name: str) -> None:
        with self._asking.setdefault(name, threading.Lock()):
            if name in self._places:
                return
            try:
                place = self._place(name)
            except (DistpoolError, OSError, ValueError) as error:
                raise ImportError(f"{name} cannot be fetched from process 1: {error}", name=name) from error
            if place is not None and place not in sys.path:
                sys.path.append(place)  # for processes that this one starts
            self._places[name] = place

    def _place(self, name: str) -> str | None:
        digest = remotecall_fetch(offer, 1, name)
        if digest is None:
            return None
        return self._cache.find(digest) or self._cache.store(digest, remotecall_fetch(content, 1, name, digest))


@contextlib.contextmanager
def import_lock_released() -> Iterator[None]:
    """While the calling thread does not hold the import lock, however often it had taken it."""
    depth = 0
    with contextlib.suppress(RuntimeError):  # not ours any more
        while True:
            _imp.release_lock()
            depth += 1
    try:
        yield
    finally:
        for _ in range(depth):
            _imp.acquire_lock()


def install(root: str) -> None:
    """Let this worker fetch modules, and keep them below `root`, a directory of this user's own."""
    sys.meta_path.append(Fetcher(root))


# -- the master --------------------------------------------------------------------------------------------------


def offer(name: str) -> str | None:
    """On pid 1: what identifies the content of a module of its own tree; None if there is none. A remote call."""
    source = own_module(name)
    if source is None:
        return None
    packed = archive.pack(source)
    offered = _offered(nodes.current())
    offered[packed.digest] = packed
    for old in list(offered)[:-_REMEMBERED]:
        offered.pop(old, None)
    return packed.digest


def content(name: str, digest: str) -> bytes:
    """On pid 1: the archive that was offered under this digest. A remote call. ValueError: it has changed since."""
    packed = _offered(nodes.current()).get(digest)
    if packed is None:
        source = own_module(name)
        packed = archive.pack(source) if source is not None else None
    if packed is None or packed.digest != digest:
        raise ValueError(f"module {name} has changed meanwhile")
    return packed.data


def _offered(node: Node) -> dict[str, archive.Archive]:
    """Archives that workers may ask for, oldest first. Each step on it is atomic."""
    found: dict[str, archive.Archive] = node.offered
    return found


def own_module(name: str) -> archive.Source | None:
    """The files of a top-level module that belongs to this program: not to Python, and not installed."""
    if not isinstance(name, str) or not name.isidentifier() or name in _NEVER:
        return None
    try:
        source = archive.find_module(name)
    except ValueError:  # it has no files of its own
        return None
    if source is None or any(is_installed(path) for _, path in source.parts):
        return None
    return source


def is_installed(path: str) -> bool:
    """Whether a file belongs to Python or to an installed package."""
    path = os.path.abspath(path)
    if set(_INSTALLED) & set(path.split(os.sep)):
        return True
    paths = sysconfig.get_paths()
    places = [os.path.join(os.path.realpath(paths[kind]), "") for kind in ("stdlib", "platstdlib")]
    return os.path.realpath(path).startswith(tuple(places))


__all__ = ["Fetcher", "content", "install", "is_installed", "offer", "own_module"]
