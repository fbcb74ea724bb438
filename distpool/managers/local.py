"""Workers on this machine (layer 8): works out what the caller's surroundings are and lets the launcher start them.

    addprocs(n) --params (with `launcher`, `cookie`, `extra`)--> LocalManager.launch --LaunchSpec--> Launcher

Runs on the launch thread of `addprocs`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from distpool import config
from distpool.errors import LaunchWorkerError
from distpool.hints import Any
from distpool.managers.base import ClusterManager
from distpool.managers.command import command, environment, import_path, pairs
from distpool.managers.process import HOST, LaunchSpec
from distpool.managers.record import WorkerConfig
from distpool.managers.resources import wishes
from distpool.managers.surroundings import here, routable_address
from distpool.wire import versions


class LocalManager(ClusterManager):
    """`n` workers on this machine; with `restrict` (default) they listen on private sockets or loopback only. The
    keyword `restrict` of `addprocs` counts more than this one.

    Example: `addprocs(LocalManager(4))`, which is what `addprocs(4)` does.
    """

    def __init__(self, n: int, restrict: bool = True) -> None:
        n = config.as_int(n)
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"the number of workers must be an int, not {type(n).__name__}")
        if n < 0:
            raise ValueError(f"the number of workers must not be negative: {n}")
        self.n = n
        self.restrict = config.as_flag("restrict", restrict)

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

        LaunchWorkerError: `dir` is no directory, or some could not be started; those that were given before stay.
        Of `params`: `launcher` (the node's `Launcher`), `cookie`, `extra` (handed to the workers), and the keywords.
        """
        if not self.n:
            return
        spec = self.spec(params)
        if params.get("dir") is not None and not (os.path.isdir(spec.cwd) and os.access(spec.cwd, os.X_OK)):
            raise LaunchWorkerError(HOST, "", f"dir={spec.cwd!r} is no directory here, or may not be entered")
        for process in params["launcher"].launch(spec, _load_what_they_need):
            kind, host, *port = process.address
            yield WorkerConfig(
                process=process,
                ospid=process.ospid,
                host=f"unix:{host}" if kind == "unix" else host,
                port=port[0] if port else 0,
                enable_threaded_blas=params.get("enable_threaded_blas", False),
            )

    def spec(self, params: Mapping[str, Any]) -> LaunchSpec:
        """The order for the launcher. ValueError, TypeError: bad `env`, `exename`, `exeflags` or `restrict`."""
        limit = wishes(params).memory
        argv, foreign = command(params.get("exename"), params.get("exeflags") or ())
        wanted = pairs(params.get("env"))
        directory = params.get("dir")
        cwd = os.path.abspath(os.path.expanduser(os.fspath(directory))) if directory is not None else here()
        restrict = config.as_flag("restrict", params.get("restrict", self.restrict))
        threaded = config.as_flag("enable_threaded_blas", params.get("enable_threaded_blas", False))
        return LaunchSpec(
            count=self.n,
            argv=argv,
            env=environment(wanted, threaded),
            cwd=cwd,
            sys_path=import_path(wanted, foreign, moved=directory is not None),
            cookie=params["cookie"],
            transport=config.local_transport() if restrict else "tcp",
            method=config.launch_method(),
            timeout=config.launch_timeout(params.get("timeout")),
            extra={**(params.get("extra") or {}), **({"memory_limit": limit} if limit is not None else {})},
            bind="127.0.0.1" if restrict else routable_address(),
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
        return {**super().default_addprocs_params(), "restrict": self.restrict, "ship": ()}


def _load_what_they_need() -> None:
    """While a zygote forks workers: what is needed when they come, and takes a while to find (see `Member`)."""
    import multiprocessing.process  # noqa: F401

    versions.own()
