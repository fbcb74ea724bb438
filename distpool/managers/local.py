"""Workers on this machine (layer 8): works out what the caller's surroundings are and lets the launcher start them.

    addprocs(n) --params (with `launcher`, `cookie`, `extra`)--> LocalManager.launch --LaunchSpec--> Launcher

Runs on the launch thread of `addprocs`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from distpool import config
from distpool.managers.base import ClusterManager, WorkerConfig
from distpool.managers.launch import LaunchSpec
from distpool.managers.resources import wishes
from distpool.managers.surroundings import BLAS_VARIABLES, here, routable_address


class LocalManager(ClusterManager):
    """`n` workers on this machine; with `restrict` (default) they listen on private sockets or loopback only.

    Example: `addprocs(LocalManager(4))`, which is what `addprocs(4)` does.
    """

    def __init__(self, n: int, restrict: bool = True) -> None:
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"the number of workers must be an int, not {type(n).__name__}")
        if n < 0:
            raise ValueError(f"the number of workers must not be negative: {n}")
        self.n = n
        self.restrict = restrict

    def __repr__(self) -> str:
        return "LocalManager()"

    def check(self, params: dict[str, Any]) -> None:
        """ValueError, TypeError: bad `env`, `exename`, ..., or a package in `ship` that is not there."""
        self.spec({"cookie": "", **params})
        if params.get("ship"):
            from distpool.managers import archive

            archive.wishes(params["ship"])

    def launch(self, params: dict[str, Any]) -> Iterator[WorkerConfig]:
        """Start the workers; each config's `process` is the launcher's handle (`add_exit_callback`, `output`, `kill`).

        Of `params`: `launcher` (the node's `Launcher`), `cookie`, `extra` (handed to the workers), and the keywords.
        """
        if not self.n:
            return
        for process in params["launcher"].launch(self.spec(params)):
            kind, host, *port = process.address
            yield WorkerConfig(
                process=process,
                ospid=process.ospid,
                host=f"unix:{host}" if kind == "unix" else host,
                port=port[0] if port else 0,
                enable_threaded_blas=params.get("enable_threaded_blas", False),
            )

    def spec(self, params: Mapping[str, Any]) -> LaunchSpec:
        """The order for the launcher. ValueError, TypeError: bad `env`, `exename` or `exeflags`."""
        limit = wishes(params).memory
        argv, foreign = command(params.get("exename"), params.get("exeflags") or ())
        wanted = pairs(params.get("env"))
        directory = params.get("dir")
        cwd = os.path.abspath(os.path.expanduser(os.fspath(directory))) if directory is not None else here()
        timeout = params.get("timeout")
        return LaunchSpec(
            count=self.n,
            argv=argv,
            env=environment(wanted, bool(params.get("enable_threaded_blas", False))),
            cwd=cwd,
            sys_path=import_path(wanted, foreign, moved=directory is not None),
            cookie=params["cookie"],
            transport=config.local_transport() if self.restrict else "tcp",
            method=config.launch_method(),
            timeout=config.worker_timeout() if timeout is None else float(timeout),
            extra={**(params.get("extra") or {}), **({"memory_limit": limit} if limit is not None else {})},
            bind="127.0.0.1" if self.restrict else routable_address(),
            own_path=foreign,
        )

    def manage(self, pid: int, config: WorkerConfig, op: str) -> None:
        """Nothing to do: the worker interrupts itself, and the launcher cleans up after it."""

    def sized(self, n: int) -> LocalManager:
        """The same with `n` workers."""
        return type(self)(n, self.restrict)

    def parts(self) -> list[tuple[ClusterManager, int | None]]:
        """This machine."""
        return [(self, self.n)]

    def default_addprocs_params(self) -> dict[str, Any]:
        """The keywords of `addprocs(n)`. `ship`: nothing has to be sent, workers here find what this program finds."""
        return {**super().default_addprocs_params(), "restrict": True, "ship": ()}


def command(exename: Any, exeflags: Any) -> tuple[list[str], bool]:
    """The interpreter's command, and whether it is another interpreter than this one.

    Our own gets the options that this program was started with (-O, -W, -X, as multiprocessing does it). A path
    may be relative; a name is looked up in PATH.
    """
    flags = [exeflags] if isinstance(exeflags, str) else [os.fspath(flag) for flag in exeflags]
    if exename is None:
        if not sys.executable:
            raise ValueError("sys.executable is not known here: pass exename=")
        exename = sys.executable
    argv = [os.fspath(exename)] if isinstance(exename, (str, os.PathLike)) else [os.fspath(part) for part in exename]
    if not argv:
        raise ValueError("exename must name a program")
    program = shutil.which(argv[0]) or argv[0]
    argv[0] = os.path.abspath(program) if os.path.dirname(program) else program
    own = len(argv) == 1 and argv[0] == os.path.abspath(sys.executable or "")
    if own:
        flags = [*getattr(subprocess, "_args_from_interpreter_flags", list)(), *flags]
    return [*argv, *flags], not own


def pairs(env: Any) -> dict[str, str]:
    """`env` as given by the user, a mapping or pairs, as a dict of texts."""
    if env is None:
        return {}
    wanted = dict(env.items() if isinstance(env, Mapping) else env)
    for name, value in wanted.items():
        if not isinstance(name, str) or not isinstance(value, (str, os.PathLike)):
            raise TypeError(f"env must map str to str, not {name!r} to {value!r}")
        if not name or "=" in name or "\0" in name + str(value):
            raise ValueError(f"not an environment variable: {name!r}")
    return {name: os.fspath(value) for name, value in wanted.items()}


def environment(wanted: dict[str, str], threaded_blas: bool) -> dict[str, str]:
    """The complete environment of a worker: this program's, the user's wishes, and one thread for BLAS libraries."""
    env = dict(os.environ)
    if not threaded_blas:
        env.update(dict.fromkeys(BLAS_VARIABLES, "1"))
    env.update(wanted)
    return env


def import_path(wanted: dict[str, str], foreign: bool, moved: bool) -> list[str]:
    """sys.path as it is now, for a worker.

    '' becomes the current directory (it would be the worker's); with `moved` (the worker runs elsewhere) so do other
    relative entries. Another interpreter gets no entries of this one's installation. A PYTHONPATH among the user's
    wishes takes the place of ours.
    """
    current = here()
    path = [entry or current for entry in sys.path if isinstance(entry, str)]
    if moved:
        path = [os.path.join(current, entry) for entry in path]
    if "PYTHONPATH" in wanted:
        replaced = set(os.environ.get("PYTHONPATH", "").split(os.pathsep))
        ours = [entry for entry in wanted["PYTHONPATH"].split(os.pathsep) if entry]
        path = ours + [entry for entry in path if entry not in replaced and entry not in ours]
    if foreign:
        installed = installation()
        path = [entry for entry in path if not any((entry + os.sep).startswith(part + os.sep) for part in installed)]
    return path


def installation() -> set[str]:
    """Directories (and the zip) of this interpreter's own library and of its installed packages."""
    import sysconfig  # few need it, and it takes its time

    names = ("stdlib", "platstdlib", "purelib", "platlib")
    found = {sysconfig.get_path(name) for name in names}
    archive = f"python{sys.version_info[0]}{sys.version_info[1]}.zip"
    return found | {os.path.join(os.path.dirname(path), archive) for path in found}
