"""`everywhere`, `remotecall_eval`, `include`, `clear`: code on many processes (layer 6).

    source: compiled and its imports run here -> one request per process -> the local run -> errors in order of the pids
    named function, class: defined in each `__main__`      lambda: called on each      (`mainmodule` does it there)
    later=True: kept on pid 1 (`Group.prologues`), for each worker that joins, before it is used

Everything runs in the caller's thread; prologues run on library threads of pid 1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import textwrap
import threading
import types
import zlib
from collections.abc import Callable, Iterable
from typing import Any

from distpool import mainmodule
from distpool.calls import _node, _wrapped, remotecall_fetch
from distpool.config import as_int
from distpool.errors import CompositeException, RemoteException
from distpool.members import procs, workers
from distpool.node import group as groups
from distpool.pools import CachingPool
from distpool.refs.refs import Future
from distpool.replies import request
from distpool.wire.byvalue import share_class
from distpool.wire.failures import captured

Pids = int | Iterable[int] | None
_MAIN = "__main__"


def _new_key() -> str:
    return os.urandom(8).hex()


@dataclasses.dataclass(frozen=True, eq=False)
class _Kept:
    """What `later=True` keeps. Known by `key`: comparing bindings would be the user's code, and on the leader."""

    key: str = dataclasses.field(default_factory=_new_key, kw_only=True)


@dataclasses.dataclass(frozen=True, eq=False)
class _Source(_Kept):
    """Source text for a module. `code`: what it was compiled to, here. `place`: the module itself, if it was given."""

    text: str
    filename: str
    module: str
    bindings: dict[str, Any]
    code: mainmodule.Code | None = None
    place: types.ModuleType | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "code": None, "place": None}

    def start(self, pid: int, times: int) -> Future[Any]:
        """Run it on another process; the future has a list of `None` or the error's outcome."""
        me = _node().pid
        return request(
            mainmodule.run_times, pid, (self.text, self.filename, self.module, self.bindings, times, me), remote=True
        )

    def here(self) -> Any:
        """Run it in this process."""
        module = self.module if self.place is None else self.place
        return mainmodule.run(self.text, self.filename, module, self.bindings, self.code)

    def there(self, pid: int) -> Any:
        """The value of the last expression, computed on another process."""
        return remotecall_fetch(mainmodule.run, pid, self.text, self.filename, self.module, self.bindings)


@dataclasses.dataclass(frozen=True, eq=False)
class _Definition(_Kept):
    """A function or class with a name."""

    name: str
    value: Any
    bindings: dict[str, Any]

    def start(self, pid: int, times: int) -> Future[Any]:
        return request(_define, pid, (self.name, self.value, self.bindings, times), remote=True)

    def here(self) -> Any:
        names = mainmodule.namespace()
        names.update(self.bindings)
        names[self.name] = self.value
        return self.value

    def there(self, pid: int) -> Any:
        remotecall_fetch(_define, pid, self.name, self.value, self.bindings, 1)
        return self.value


@dataclasses.dataclass(frozen=True, eq=False)
class _Run(_Kept):
    """Something callable without a name."""

    function: Callable[[], Any]
    bindings: dict[str, Any]

    def start(self, pid: int, times: int) -> Future[Any]:
        return request(_call_times, pid, (self.function, self.bindings, times), remote=True)

    def here(self) -> Any:
        return _call(self.function, self.bindings)

    def there(self, pid: int) -> Any:
        return remotecall_fetch(_call, pid, self.function, self.bindings)


_Action = _Source | _Definition | _Run


def _define(name: str, value: Any, bindings: dict[str, Any], times: int) -> list[None]:
    mainmodule.namespace().update(bindings)
    mainmodule.define(name, value)
    return [None] * times


def _call(function: Callable[[], Any], bindings: dict[str, Any]) -> Any:
    mainmodule.namespace().update(bindings)
    return function()


def _call_times(function: Callable[[], Any], bindings: dict[str, Any], times: int) -> list[None]:
    for _ in range(times):
        _call(function, bindings)
    return [None] * times


# -- public ------------------------------------------------------------------------------------------------------


def everywhere(code_or_function: Any, pids: Pids = None, /, *, later: bool = False, **bindings: Any) -> Any:
    """Run source text in `__main__` of these processes (default: all, this one included), or define a function there.

    Text: `bindings` are defined first; import statements run here first of all; with one pid (an int) the value of the
    last expression is returned, else None. A named function or a class is *defined* under its name in each `__main__`
    and returned, so this is a decorator; a lambda is *run*. `later=True`: also on workers that join afterwards.

    Classes that it defines are found by their names: an instance that comes from another process is one of the class
    that `everywhere` defined here, if it did. Functions of `__main__` travel as they are here.

    SyntaxError and the errors of imports are raised here, before anything is sent. One pid: `RemoteException`; several:
    `CompositeException` in the order of `pids`, with the plain errors of this process (`SystemExit` and its like, which
    are no `Exception`, as `RemoteException`). Ctrl-C is raised as it is.

    Example: `everywhere("import numpy as np; table = np.zeros(size)", size=100)`
    """
    if isinstance(code_or_function, str):
        action: _Action = _source(code_or_function, sys._getframe(1), bindings)
    elif callable(code_or_function):
        action = _for_callable(code_or_function, bindings)
    else:
        raise TypeError(f"everywhere() takes source text or something callable, not {type(code_or_function).__name__}")
    if later and pids is not None:
        raise ValueError("later=True is for all processes: it cannot be combined with pids")
    pids = as_int(pids)
    targets = _targets(pids)
    if isinstance(action, _Source) and action.code is not None:
        mainmodule.import_first(action.code)
    if later:
        targets = [_node().pid, *(pid for pid in _keep_for_later(action) if pid != _node().pid)]
    try:
        value = _spread(action, targets, isinstance(pids, int))
    except BaseException:
        if later:
            _forget_later(action.key)
        raise
    return action.value if isinstance(action, _Definition) else value


def remotecall_eval(module: str | types.ModuleType, pids: int | Iterable[int], source: str) -> Any:
    """Run source text in `module` (a module or its name) of these processes; errors and values as for `everywhere`.

    A module is found by its name elsewhere; in this process it is the given one, which need not be in `sys.modules`.
    Example: `remotecall_eval("__main__", 2, "x + 1")`
    """
    name, place = _module(module)
    if not isinstance(source, str):
        raise TypeError(f"source must be a str, not {type(source).__name__}")
    if pids is None:
        raise TypeError("pids must be a pid or several")
    pids = as_int(pids)
    action = dataclasses.replace(_source(source, sys._getframe(1), {}), module=name, place=place)
    return _spread(action, _targets(pids), isinstance(pids, int))


def include(path: str | os.PathLike[str], pids: Pids = None) -> Any:
    """Run a file in `__main__` of these processes (default: all). A relative path starts at the calling file's folder.

    The file is read here, so other hosts need not have it. Values, classes and errors as for `everywhere`; OSError if
    it cannot be read. Example: `include("functions.py")`
    """
    full = os.path.join(_folder(sys._getframe(1)), os.fspath(path))
    full = os.path.abspath(full)
    with open(full, "rb") as file:
        data = file.read()
    text = _decoded(data, full)
    code = mainmodule.check(text, full)  # a SyntaxError here, not on each of them
    pids = as_int(pids)
    mainmodule.import_first(code)
    return _spread(_Source(text, full, _MAIN, {}, code), _targets(pids), isinstance(pids, int))


def clear(names_or_pool: Any, pids: Pids = None, mod: str | types.ModuleType = _MAIN) -> Any:
    """Set global names of module `mod` to None on these processes (default: all workers), where they are defined.

    With a `CachingPool`: its `clear()`, which returns it. TypeError if `mod` is neither a module nor a name.

    Example: `clear(["table", "index"])`
    """
    if isinstance(names_or_pool, CachingPool):
        return names_or_pool.clear()
    names = [names_or_pool] if isinstance(names_or_pool, str) else list(names_or_pool)
    if not all(isinstance(name, str) for name in names):
        raise TypeError("clear() takes names (str) or a CachingPool")
    module, place = _module(mod)
    targets = dict.fromkeys(workers() if pids is None else _targets(as_int(pids)))
    where: dict[int, Any] = {} if place is None else {_node().pid: place}
    for future in [
        request(mainmodule.clear_names, pid, (names, where.get(pid, module)), remote=True) for pid in targets
    ]:
        future.result()
    return None


# -- making an action --------------------------------------------------------------------------------------------


def _source(text: str, frame: types.FrameType, bindings: dict[str, Any]) -> _Source:
    if next(filter(str.strip, text.splitlines()), "")[:1].isspace():  # else it would only change texts in the text
        text = textwrap.dedent(text)
    file = _file(frame)
    # The calling file stays visible to `include` inside the text; the number tells texts apart. What stands in angle
    # brackets is no file for coverage.py and `trace`, which otherwise end with an error because they cannot read it.
    number = f"{zlib.crc32(text.encode('utf-8', 'replace')):08x}"
    filename = f"<{os.path.abspath(file)} (everywhere {number})>" if file else f"<everywhere {number}>"
    return _Source(text, filename, _MAIN, bindings, mainmodule.check(text, filename))


def _module(module: Any) -> tuple[str, types.ModuleType | None]:
    """Its name, and itself if it was given."""
    if isinstance(module, types.ModuleType):
        return module.__name__, module
    if not isinstance(module, str):
        raise TypeError(f"module must be a module or its name, not {type(module).__name__}")
    return module, None


def _for_callable(function: Any, bindings: dict[str, Any]) -> _Action:
    name = getattr(function, "__name__", None)
    if not isinstance(name, str) or not name.isidentifier():  # "<lambda>"
        return _Run(function, bindings)
    return _Definition(name, function, bindings)


def _targets(pids: Pids) -> list[int]:
    if pids is None:
        return procs()
    found = [pids] if isinstance(pids, int) else list(map(as_int, pids))
    for pid in found:
        if isinstance(pid, bool) or not isinstance(pid, int):
            raise TypeError(f"a pid is an int, not {type(pid).__name__}")
    node = _node()
    for pid in found:  # before anything is sent
        if pid != node.pid:
            node.peers.ensure(pid)
    return found


def _folder(frame: types.FrameType) -> str:
    file = _file(frame)
    return os.path.dirname(os.path.abspath(file)) if file else os.getcwd()


def _file(frame: types.FrameType) -> str:
    """The file of the code that runs there, or "" if it comes from none."""
    name = frame.f_code.co_filename
    if not name.startswith("<"):
        return name
    return name[1:].rpartition(" (everywhere ")[0]


def _decoded(data: bytes, filename: str) -> str:
    """The text of a source file; SyntaxError if it has bytes that are none in its encoding."""
    import io
    import tokenize

    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        return io.TextIOWrapper(io.BytesIO(data), encoding).read()
    except (SyntaxError, UnicodeError):
        compile(data, filename, "exec", dont_inherit=True)  # says it in the interpreter's words, with the file's name
        raise


# -- running it --------------------------------------------------------------------------------------------------


def _spread(action: _Action, pids: list[int], single: bool) -> Any:
    """Run it on these processes, each as often as it is named; the value if it is a single one."""
    me = _node().pid
    if single:
        return _one(action, pids[0], me)
    counts: dict[int, int] = {}
    for pid in pids:
        counts[pid] = counts.get(pid, 0) + 1
    futures: dict[int, Future[Any] | Exception] = {}
    for pid, times in counts.items():
        if pid != me:
            try:
                futures[pid] = action.start(pid, times)
            except Exception as failure:
                futures[pid] = failure
    _share(action)
    outcomes = {me: _run_here(action, counts.get(me, 0))}
    for pid, future in futures.items():
        outcomes[pid] = _errors_of(pid, future)
    errors = [error for pid in pids if outcomes[pid] and (error := outcomes[pid].pop(0)) is not None]
    if errors:
        raise CompositeException(errors)
    return None


def _one(action: _Action, pid: int, me: int) -> Any:
    if pid != me:
        value = action.there(pid)
        _share(action)
        return value
    _share(action)
    return remotecall_fetch(action.here, me)


def _share(action: _Action) -> None:
    """After it was sent: from now on instances of this class are recognised by the class's name (API 8.4)."""
    if isinstance(action, _Definition) and isinstance(action.value, type) and mainmodule.travels(action.value):
        share_class(action.value, f"everywhere:{action.name}")


def _run_here(action: _Action, times: int) -> list[Exception | None]:
    outcomes: list[Exception | None] = []
    for _ in range(times):
        try:
            action.here()
        except KeyboardInterrupt:
            raise  # Ctrl-C, or `interrupt` of the call that this is part of: it is not the text's
        except Exception as error:
            outcomes.append(error)
        except BaseException as error:  # an ExceptionGroup has no place for it
            outcomes.append(_wrapped(_node(), error))
        else:
            outcomes.append(None)
    return outcomes


def _errors_of(pid: int, future: Future[Any] | Exception) -> list[Exception | None]:
    """One entry for each run there; one in all if the whole request failed."""
    if isinstance(future, Exception):
        return [future]
    try:
        found = future.result()
    except Exception as error:
        return [error]
    return [None if error is None else RemoteException(pid, captured(error.failure)) for error in found]


# -- workers that join later -------------------------------------------------------------------------------------


def _keep_for_later(action: _Action) -> list[int]:
    """Have pid 1 run it on each worker that joins; the pids that have joined before."""
    node = _node()
    if not node.is_master:
        found: list[int] = remotecall_fetch(_keep_for_later, 1, action)
        return found
    group = groups.of(node)
    done = threading.Event()
    pids: list[int] = []

    def keep() -> None:  # on the leader, where workers join: each gets it either this way or the other
        group.prologues.append(action)
        pids.extend([1, *group.listed()])
        done.set()

    group.run_prologue = _run_prologue  # first: a worker may join as soon as it is kept
    node.loop.call_soon(keep)
    with node.loop.following():
        done.wait()
    return pids


def _forget_later(key: str) -> None:
    """It has failed where it was tried first."""
    node = _node()
    if not node.is_master:
        remotecall_fetch(_forget_later, 1, key)
        return
    group = groups.of(node)

    def forget() -> None:
        group.prologues[:] = [action for action in group.prologues if action.key != key]

    node.loop.call_soon(forget)


def _run_prologue(action: _Action, pid: int) -> None:
    """On a library thread of pid 1: a worker has joined. An error that nobody else can get goes to stderr."""
    try:
        errors = [error for error in _errors_of(pid, action.start(pid, 1)) if error is not None]
    except Exception as failure:
        errors = [failure]
    for each in errors:
        with contextlib.suppress(OSError, ValueError):  # stderr is closed: nobody can read it
            print(f"everywhere(later=True) failed on worker {pid}: {each}", file=sys.stderr, flush=True)


__all__ = ["clear", "everywhere", "include", "remotecall_eval"]
