"""How a process that a launcher started becomes a worker (layer 11).

    zygote's fork --> become_worker --\
                                      --> prepare: cwd, sys.path, clean __main__ --> run(listener, settings) --> finish
    python -c     --> exec_main    ---/

Runs on the main thread of the worker. `settings` are what the launcher was told (`LaunchSpec.settings`), as JSON. A
worker dies with whoever started it: see `arm_lifeline`.
"""

from __future__ import annotations

import _thread
import atexit
import builtins
import importlib
import io
import json
import os
import select
import signal
import socket
import sys
import threading
from types import ModuleType

from distpool.hints import Any, NoReturn

if sys.platform != "win32":
    import fcntl
    import resource

ENTRY = "distpool.worker:run"
"""What a worker runs, unless its settings name another `entry`: `run(listener, settings) -> exit code`."""

EXIT_SECONDS = 5.0
"""What a worker's non-daemon threads and atexit hooks may take at its end; then it goes without them."""

_STACK = 256 * 1024  # bytes for a thread that only waits; little may be left of the memory that this worker may use

LEFT_ALONE = ("SIGKILL", "SIGSTOP", "SIGPIPE", "SIGXFSZ")
"""Signals that nobody may set, or that Python itself ignores."""

BACKLOG = 128

_ignored: list[int] = []

_old_main: list[ModuleType] = []
"""The original `__main__`, kept because frames of it are still on the stack of every worker."""


lifeline = -1
"""What can be read when whoever started this worker is gone; -1: nobody would tell."""


# --- sockets ----------------------------------------------------------------------------------------------------------


def listen(settings: dict[str, Any], name: str) -> socket.socket:
    """A listening socket as `settings` want it; TCP where the file system refuses a Unix socket (full, read-only)."""
    if settings["transport"] == "unix" and sys.platform != "win32":
        listener = socket.socket(socket.AF_UNIX)
        path = os.path.join(settings["directory"], f"{name}.sock")
        try:
            listener.bind(path)
            listener.listen(BACKLOG)
            return listener
        except OSError:
            listener.close()
            remove(path)
    listener = socket.socket(socket.AF_INET6 if ":" in settings["bind"] else socket.AF_INET)
    try:
        listener.bind((settings["bind"], 0))
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def unix_path(listener: socket.socket) -> str:
    """The file of a listening Unix socket, or an empty text."""
    name = listener.getsockname()
    return name if isinstance(name, str) else ""


def address_of(listener: socket.socket, settings: dict[str, Any]) -> list[Any]:
    """`["unix", path]` or `["tcp", host, port]`, as peers dial it."""
    name = listener.getsockname()
    return ["unix", name] if isinstance(name, str) else ["tcp", settings["bind"], name[1]]


def remove(path: str) -> None:
    """Remove a socket's file if there is one."""
    try:
        if path:
            os.unlink(path)
    except OSError:
        pass  # somebody cleaned up before us


# --- becoming a worker ------------------------------------------------------------------------------------------------


def become_worker(
    listener: socket.socket, settings: dict[str, Any], output: int, lifeline: int, own_path: list[str]
) -> NoReturn:
    """The rest of a forked child's life."""
    code = 1
    try:
        os.setsid()
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        arm_lifeline(lifeline)
        take_limits(settings.get("limits") or {})
        _set_environment(_as_wrapped(settings["env"], settings.get("given")))
        prepare(settings, own_path)
        code = run(listener, settings)
    except BaseException:
        sys.__excepthook__(*sys.exc_info())
    finish(code)


def default_signals() -> None:
    """What was handed on by whoever started this process (a launch thread with a mask, say) does not hold: a master
    says which signals its workers are to `ignore`."""
    for number in signal.valid_signals() - {getattr(signal, name, None) for name in LEFT_ALONE}:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_SETMASK, ())


def ignore(signals: list[int]) -> None:
    """Ignore these, and none that was ignored by another call."""
    for number in set(_ignored) - set(signals):
        signal.signal(number, signal.SIG_DFL)
    for number in signals:
        signal.signal(number, signal.SIG_IGN)
    _ignored[:] = signals


def take_limits(wanted: dict[str, Any]) -> None:
    """Be as a child of the program would be that it starts now (`surroundings.limits`), as far as that is allowed."""
    for name, value in wanted.items():
        try:
            if name == "umask":
                os.umask(value)
            elif name == "nice":
                if os.getpriority(os.PRIO_PROCESS, 0) != value:
                    os.setpriority(os.PRIO_PROCESS, 0, value)
            elif name == "affinity":
                if sorted(os.sched_getaffinity(0)) != value:
                    os.sched_setaffinity(0, value)
            elif list(resource.getrlimit(getattr(resource, name))) != value:
                resource.setrlimit(getattr(resource, name), tuple(value))
        except (OSError, ValueError, AttributeError):
            pass  # only a privileged user may take back what was given up


def exec_main(own_path: list[str]) -> NoReturn:
    """What an executed (not forked) worker runs: settings from stdin, header line to stdout, then the same as above."""
    line = bytearray()
    while not line.endswith(b"\n"):
        # Unbuffered, so that nothing of what may follow is taken away.
        byte = os.read(0, 65536)
        if not byte:
            os._exit(1)  # the launcher went away before it had told us anything
        line += byte
    settings = json.loads(line)
    code = 1
    try:
        lifeline = os.dup(0)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        arm_lifeline(lifeline)
        default_signals()
        ignore(settings.get("ignored") or [])
        take_limits(settings.get("limits") or {})
        prepare(settings, own_path)
        listener = listen(settings, f"{os.getpid()}-0")
        kind, host, *port = address_of(listener, settings)
        header = f"distpool_worker:{port[0]}#{host}\n" if kind == "tcp" else f"distpool_worker:0#unix:{host}\n"
        sys.stdout.flush()
        os.write(1, os.fsencode(header))
        code = run(listener, settings)
    except BaseException:
        sys.__excepthook__(*sys.exc_info())
    finish(code)


def arm_lifeline(descriptor: int) -> None:
    """Die when the other end of this pipe closes, even while holding the GIL in C: the kernel then sends SIGKILL.

    O_ASYNC with F_SETSIG is Linux only. Not taken: PDEATHSIG (it needs ctypes, and it means the death of the parent's
    *thread*); one pipe for all workers (the signal's owner belongs to the open file description, which all readers of
    one pipe would share). Elsewhere a daemon thread reads the pipe: there a worker that holds the GIL survives the
    kill -9 of its zygote, although not that of the master, which the zygote answers with kill -9.
    """
    global lifeline
    lifeline = descriptor
    if sys.platform == "linux":
        try:
            fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
            fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGKILL)
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_ASYNC)
        except OSError:
            pass  # a kernel without it (gVisor): the thread below
        else:
            gone = select.poll()
            gone.register(descriptor, select.POLLIN)
            if gone.poll(0):  # closed before the signal was armed
                os._exit(1)
            return
    threading.Thread(target=_watch_lifeline, args=(descriptor,), name="distpool-lifeline", daemon=True).start()


def _watch_lifeline(descriptor: int) -> None:
    try:
        while os.read(descriptor, 1):
            pass
    finally:
        os._exit(1)


def prepare(settings: dict[str, Any], own_path: list[str]) -> None:
    """Make this process look like a fresh interpreter that was started in the caller's surroundings.

    `own_path` is the interpreter's own sys.path; it is kept behind the caller's where that belongs to another
    interpreter (`settings["own_path"]`).
    """
    _open_output()
    try:
        os.chdir(settings["cwd"])
    except OSError as error:
        try:
            os.chdir(os.path.expanduser("~"))
        except OSError:  # missing, or of those that may not be entered
            os.chdir(os.sep)
        why = f"distpool: cannot work in {settings['cwd']!r} ({error.strerror}); using {os.getcwd()!r}"
        print(why, file=sys.stderr)
    path = list(settings["sys_path"])
    if settings["own_path"]:
        path += [entry for entry in own_path if entry and entry not in path]
    sys.path[:] = path
    _forget_directories()
    sys.argv = list(settings.get("program") or [""])
    if "random" in sys.modules:
        sys.modules["random"].seed()
    _old_main.append(sys.modules["__main__"])
    clean = ModuleType("__main__")
    clean.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = clean
    if "__mp_main__" in sys.modules:  # multiprocessing's name for it
        sys.modules["__mp_main__"] = clean


def _open_output() -> None:
    """Standard output and errors of a worker, on descriptors 1 and 2 as they are now.

    Whole lines in one write each, also under PYTHONUNBUFFERED: the master shows lines, and must not mix them. UTF-8
    whatever the locale: this is a pipe to the master, which decodes it so; no print may fail. New streams, not
    `reconfigure`: that asks a stream which was opened on a file for its position, and here there is a pipe by now.
    """
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        raw = open(descriptor, "wb", closefd=False)  # noqa: SIM115  # for as long as the process lives
        stream = io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", line_buffering=True)
        stream.mode = "w"  # type: ignore[misc]  # as that of the interpreter's own
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _forget_directories() -> None:
    """Directories may have changed since the zygote looked. Not `importlib.invalidate_caches`: it imports
    importlib.metadata for its part, 15 ms in each worker."""
    for finder in sys.path_importer_cache.values():
        invalidate = getattr(finder, "invalidate_caches", None)
        if invalidate is not None:
            invalidate()


def _as_wrapped(wanted: dict[str, str], given: dict[str, str] | None) -> dict[str, str]:
    """With what the user's command (`env A=1 python`, a script) has changed of the environment that it was `given`: it
    ran once, for the zygote, and not for each worker."""
    if given is None:
        return wanted
    changed = {name: value for name, value in os.environ.items() if given.get(name) != value}
    return {name: value for name, value in wanted.items() if name in os.environ or name not in given} | changed


def _set_environment(wanted: dict[str, str]) -> None:
    """Replace os.environ; only the differences are written (each is a `setenv`)."""
    if os.environ == wanted:
        return
    for name in set(os.environ) - set(wanted):
        del os.environ[name]
    for name, value in wanted.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
    import time

    time.tzset()


def run(listener: socket.socket, settings: dict[str, Any]) -> int:
    """Call the entry point and turn its outcome into an exit code, as the interpreter would."""
    module, _, name = settings.get("entry", ENTRY).partition(":")
    try:
        result = getattr(importlib.import_module(module), name)(listener, settings)
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.__excepthook__(*sys.exc_info())
        return 1
    return int(result or 0)


def finish(code: int, main: bool = True) -> NoReturn:
    """End this worker as an interpreter ends: threads, atexit hooks, buffers; but surely, within `EXIT_SECONDS`.

    `main=False`: this is not the main thread, so other threads (the main one among them) are not waited for.

    The interpreter's own end is not used: it would tear down the modules, which costs 10 ms and can hang in C
    extensions, and a forked child would run through the zygote's frames.
    """
    # In C, all of it: a call may have replaced what `threading` is written in (`builtins.len = ...`).
    goes_on = _thread.allocate_lock()
    goes_on.acquire()

    def give_up() -> None:
        if not goes_on.acquire(timeout=EXIT_SECONDS):
            os._exit(code)

    try:
        try:
            usual = threading.stack_size(_STACK)
            try:
                _thread.start_new_thread(give_up, ())
            finally:
                threading.stack_size(usual)  # exit hooks may start threads
            if main:
                threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
        except BaseException:
            sys.__excepthook__(*sys.exc_info())
        # The user's own first: they may write to ours.
        for name in ("stdout", "stderr", "__stdout__", "__stderr__"):
            try:
                getattr(sys, name).flush()
            except BaseException:
                pass  # the master is gone, or user code closed the stream, put None there, or what cannot flush
        goes_on.release()
    finally:
        os._exit(code & 0xFF)
