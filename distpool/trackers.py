"""The resource tracker that `multiprocessing` uses in a worker (layer 6).

    the worker begins: share() --> whoever first imports `multiprocessing.resource_tracker` --> settle()
    a task's first SharedMemory, Semaphore, ... --> Lent (the worker's tracker object)
        master on this host:  --> pid 1: lend() starts the program's tracker; /proc/<ospid>/fd/<n> of its pipe --> open
        elsewhere:            --> the worker's own tracker process, which is not told of what is only attached to

A tracker removes what its last user leaves behind. Children of `multiprocessing` inherit the pipe to their parent's, so
that what they attach to, or make, lives as long as the program. Our workers may be there before the program has a
tracker, and most never need one (the process takes 20 ms to start): they ask when they do.

By its path, as segments are (`transport.memfile`): that works over any link. Where there is no such path, nothing of a
program's may be removed because a worker has looked at it: only what a worker itself has made goes with that worker.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading

from distpool.hints import Any
from distpool.node import node as nodes

_TRACKER = "multiprocessing.resource_tracker"
_SEGMENT = "shared_memory"


# -- the worker --------------------------------------------------------------------------------------------------


def share() -> None:
    """Have what `multiprocessing` tracks in this process tracked with the program, once that module is loaded."""
    if _TRACKER not in sys.modules:
        sys.meta_path.insert(0, _Finder)
    else:  # something that Python loads at its start wanted it
        settle(sys.modules[_TRACKER])


class _Finder:
    """In front of all other finders. `find_spec` imports nothing: Python calls it with the import lock held, which the
    leader may want as well."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _TRACKER:
            return None
        for finder in list(sys.meta_path):
            find = None if finder is cls else getattr(finder, "find_spec", None)
            spec: Any = None if find is None else find(name, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader:
    """Loads the module as its own loader does, and more."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        settle(module)
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(_Finder)  # it has nothing left to find


def settle(module: Any) -> None:
    """Make the tracker of this module, just loaded, the program's. One that runs already stays what it is."""
    try:
        tracker = module._resource_tracker
        if tracker._fd is not None or tracker._pid is not None:
            return
        tracker.__class__ = _lent(type(tracker))
        tracker.borrows()
        for name in ("ensure_running", "register", "unregister", "getfd"):
            setattr(module, name, getattr(tracker, name))
    except (AttributeError, TypeError):
        pass  # a Python in which it is something else: then it stays what it is there


def _lent(kind: Any) -> Any:
    class Lent(kind):  # type: ignore[misc]
        """All asking is done before the base takes its lock, which finalizers want as well."""

        _fd: int | None
        _pid: int | None

        def borrows(self) -> None:
            self._worker = os.getpid()
            self._settled = self._asked = False
            self._asking = threading.RLock()  # reentrant: a finalizer may come here while the thread asks
            self._made: set[str] = set()  # segments of which our own tracker knows; each step is atomic
            self._seen: set[str] = set()  # those that it has not been told of

        def getfd(self) -> Any:
            self._borrow()
            return super().getfd()

        def ensure_running(self) -> Any:
            self._borrow()
            return super().ensure_running()

        def register(self, name: str, rtype: str) -> None:
            self.ensure_running()
            if rtype == _SEGMENT and self._pid is not None:  # a process that was started here, not the program's
                # SharedMemory.__init__ calls, for what it makes and what it attaches to alike.
                if name not in self._made and not sys._getframe(1).f_locals.get("create", True):
                    self._seen.add(name)
                    return
                self._made.add(name)
                self._seen.discard(name)
            super().register(name, rtype)

        def unregister(self, name: str, rtype: str) -> None:
            if rtype == _SEGMENT and name in self._seen:
                self._seen.discard(name)
                return
            self._made.discard(name)
            self.ensure_running()
            super().unregister(name, rtype)

        def _borrow(self) -> None:
            if self._settled or os.getpid() != self._worker:  # a forked child cannot ask
                return
            with self._asking:
                if self._asked:
                    return
                self._asked = True
                try:
                    descriptor = _borrowed()
                except BaseException:  # an interrupt of the task: the next one asks again
                    self._asked = False
                    raise
                if descriptor >= 0 and self._fd is None:
                    self._fd = descriptor
                elif descriptor >= 0:
                    os.close(descriptor)
                self._settled = True

    Lent.__name__ = Lent.__qualname__ = kind.__name__
    return Lent


def _borrowed() -> int:
    """The write end of the pipe to the program's tracker, ours to close; -1: it cannot be had."""
    node = nodes.existing()
    link = None if node is None else node.master_link
    # Whose memory can be mapped is on this host, and sees the same /proc.
    if node is None or node.pid < 2 or link is None or not link.shares_memory or node.loop.leads:
        return -1
    try:
        from distpool.calls import remotecall_fetch  # here: this module is loaded while others are being imported

        found = remotecall_fetch(lend, 1)
        return _open(*found) if found else -1
    except Exception:  # whatever it is: the task wants shared memory, and gets it with a tracker of its own
        return -1


def _open(path: str, device: int, inode: int) -> int:
    # Not to wait for a reader, if the tracker has ended meanwhile.
    descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    if (status.st_dev, status.st_ino) != (device, inode):
        os.close(descriptor)
        return -1
    os.set_blocking(descriptor, True)
    return descriptor


# -- the master --------------------------------------------------------------------------------------------------


def lend() -> tuple[str, int, int] | None:
    """On pid 1: where this program's tracker listens, which is started if need be, and what the pipe is known by. A
    remote call. None: nobody else could open it."""
    if not os.path.isdir("/proc/self/fd"):
        return None
    from multiprocessing import resource_tracker

    descriptor: Any = resource_tracker.getfd()  # it may have to be started
    status = os.fstat(descriptor)
    return f"/proc/{os.getpid()}/fd/{descriptor}", status.st_dev, status.st_ino


__all__ = ["lend", "settle", "share"]
