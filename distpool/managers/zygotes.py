"""The start of a zygote process (layer 8).

    first executor of a program --begin()--> ZygoteProcess, meanwhile the rest of distpool is loaded --> Launcher.adopt
    later, or for other workers --------------------------> ZygoteProcess(spec) <------------------------ Launcher

A zygote and its master both take 45 ms to load what they need: one after the other they were most of the time to the
first result. So a new program's first executor has its zygote started before it loads more than this module needs.
"""

from __future__ import annotations

# Not `socket`, which takes 2 ms to load: whoever takes the object has it.
import _socket
import os
import sys

from distpool import config
from distpool.managers.command import command, environment, import_path
from distpool.managers.process import LaunchSpec, boot_code, no_forks
from distpool.managers.spawned import Spawned, spawn
from distpool.managers.surroundings import here

TYPE_CHECKING = False  # not from `typing`: see `hints`
if TYPE_CHECKING:
    import subprocess
    from typing import Any

_STARTUP_NAMES = ("LANG", "TZDIR", "GLIBC_TUNABLES")
_STARTUP_PREFIXES = ("PYTHON", "LC_", "LD_", "DYLD_", "MALLOC_")


def key_of(spec: LaunchSpec) -> tuple[Any, ...]:
    """What makes two orders go to the same zygote: the command, and the variables that are read at process start."""
    env = spec.env
    startup = sorted(name for name in env if name in _STARTUP_NAMES or name.startswith(_STARTUP_PREFIXES))
    return tuple(spec.argv), tuple((name, env[name]) for name in startup), spec.entry, spec.own_path


def _above_standard(descriptor: int) -> int:
    """The same file under a number above 2. In a program whose standard streams are closed ours would get those, and
    in the new process what becomes its standard streams would take their place."""
    if descriptor > 2:
        return descriptor
    import fcntl

    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(descriptor)


class ZygoteProcess:
    """A zygote that has been started, and our ends of its channels. OSError: it cannot be started.

    `control`: a socket for requests. `startup`: read end of the pipe for what it prints before it serves. Both are
    descriptors that do not block; they belong to whoever takes the object (`ForkServer`), unless it is discarded.
    `given`: the environment that a command of the user's was started with, which it may have changed for its workers.
    """

    def __init__(self, spec: LaunchSpec) -> None:
        self.key = key_of(spec)
        self.given = spec.env if spec.own_path else None
        with no_forks:
            self._open(spec)
        os.set_blocking(self.control, False)
        os.set_blocking(self.startup, False)

    def _open(self, spec: LaunchSpec) -> None:
        self.control, theirs = (_above_standard(end.detach()) for end in _socket.socketpair())
        try:
            self.startup, output = map(_above_standard, os.pipe())
            try:
                self.process = self._start(spec, theirs, output)
            except BaseException:
                os.close(self.startup)
                raise
            finally:
                os.close(output)
        except BaseException:
            os.close(self.control)
            raise
        finally:
            os.close(theirs)

    @staticmethod
    def _start(spec: LaunchSpec, control: int, output: int) -> Spawned | subprocess.Popen[bytes]:
        call = f"main({control}, {os.getpid()}, {spec.entry!r}, own)"
        # Collections while modules are loaded, of which nothing is garbage, are 2.5 ms of 45.
        call = f"import gc; gc.disable(); from distpool.zygote import main; {call}"
        code = boot_code(call, spec.sys_path, spec.own_path)
        return spawn([*spec.argv, "-c", code], spec.env, output, control)

    def discard(self) -> None:
        """Nobody has taken it: end it. It has not made anything yet that would stay behind."""
        self.process.kill()
        self.process.wait()
        os.close(self.control)
        os.close(self.startup)


def begin(hosts: Any, options: dict[str, Any]) -> ZygoteProcess | None:
    """Start what plain local workers will be forked by, if that is what is asked for, and if it is worth it: the rest
    of distpool is not loaded, so nobody can have started one. None otherwise, and where it fails: whoever really needs
    a zygote will hear why.
    """
    wanted = hosts is None or hosts == "local://" or (type(hosts) is int and hosts > 0)
    if not wanted or options or "distpool.node.node" in sys.modules:
        return None
    try:
        if config.launch_method() != "fork":
            return None
        argv, foreign = command(None, ())
        path = import_path({}, foreign, moved=False)
        return ZygoteProcess(LaunchSpec(1, argv, environment({}, False), here(), path, "", own_path=foreign))
    except (OSError, ValueError):
        return None


__all__ = ["ZygoteProcess", "begin", "key_of"]
