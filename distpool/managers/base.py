"""What every cluster manager is: the interface (layer 8).

    addprocs --launch(params)--> manager --WorkerConfig...--> addprocs --connect(pid, config)--> streams
             --manage(pid, config, "register" | "interrupt" | "deregister" | "finalize")--> manager
             --kill(pid, config)--> manager

The methods run on the master; `connect` also on workers, when they connect to each other.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable

from distpool.hints import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from distpool.managers.record import WorkerConfig

__all__ = ["ClusterManager", "parse_header"]

_HEADER = re.compile(r"distpool_worker:(\d{1,5})#(\S.*?)\s*$")


class ClusterManager:
    """Base class of managers: subclass it and give `launch`; the rest has a default.

    Example::

        class HandMade(ClusterManager):
            def launch(self, params):
                process = subprocess.Popen(["python", "-m", "distpool", "worker"], stdout=subprocess.PIPE, ...)
                yield WorkerConfig(io=process.stdout, process=process)

        addprocs(HandMade())
    """

    any_keyword: ClassVar[bool] = False
    """Whether executors hand on keywords that `default_addprocs_params` does not list (a scheduler's own options, say)
    instead of refusing them. `addprocs` always does, for managers that are not built in."""

    def check(self, params: dict[str, Any]) -> None:
        """Called before anything is launched, with the keywords over their defaults, in the thread of the caller, who
        gets what it raises (ValueError, TypeError). The default accepts everything."""

    def launch(self, params: dict[str, Any]) -> Iterable[WorkerConfig]:
        """Start the workers and give one `WorkerConfig` for each.

        `params` holds the keywords of `addprocs` over `default_addprocs_params()`, and `cookie`. May be a generator:
        it is consumed, on a thread of its own, while earlier workers are being connected. An exception ends the
        launch; workers that were given before stay.
        """
        raise NotImplementedError(f"{type(self).__name__} has no launch method")

    def connect(self, pid: int, config: WorkerConfig) -> Any:
        """Streams to the worker: `(reader, writer)`, or a connected socket, which serves as both.

        The default, `None`, leaves it to distpool: it reads the header line from `config.io` where host and port are
        not known, and dials them.
        """
        return None

    def manage(self, pid: int, config: WorkerConfig, op: str) -> None:
        """Told of the worker's life. `op` is "register" (it has joined), "interrupt" (`interrupt()` was called),
        "deregister" (it was removed or has crashed) or "finalize" (the record goes). The default does nothing."""

    def kill(self, pid: int, config: WorkerConfig) -> None:
        """Make the worker exit; called by `rmprocs` and at the program's end. The default ends `config.process`."""
        if config.process is not None:
            config.process.kill()

    def unreachable(self, config: WorkerConfig, error: BaseException) -> BaseException:
        """What is said when distpool cannot connect to a worker whose address is known; the default adds nothing."""
        return error

    def sized(self, n: int) -> ClusterManager | None:
        """A manager that starts `n` workers where this one does: how executors replace workers that died, and `scale`.

        The default, `None`: this manager starts what it starts. Then a lost worker is not replaced; when the last one
        is gone and calls are left, the whole launch is repeated.

        Example: `return type(self)(n, self.queue)`
        """
        return None

    def parts(self) -> Iterable[tuple[ClusterManager, int | None]]:
        """This manager as one manager for each host, with the number of workers that each starts (None: not known).

        Executors launch them side by side; a worker that died is replaced on its host, by the host's `sized`, and on
        another one if that host does not answer. The default: one part, this manager itself.
        """
        return [(self, None)]

    def close(self) -> None:
        """Called on each of the `parts` when the executor that used them has ended, on a library thread. The default
        does nothing."""

    @classmethod
    def from_url(cls, rest: str) -> ClusterManager:
        """The manager for `hosts="scheme://rest"`. The default takes nothing, or a number of workers.

        ValueError: that is not what this manager takes. Example: `LocalManager.from_url("8")`
        """
        if not rest:
            return cls()
        if not rest.isascii() or not rest.isdigit() or not int(rest):
            raise ValueError(f"{cls.__name__} takes a number of workers behind '://', not {rest!r}")
        return cls(int(rest))  # type: ignore[call-arg]

    def default_addprocs_params(self) -> dict[str, Any]:
        """The keywords that `addprocs` takes for this manager, with their defaults.

        `exename` is the path of this interpreter; None where Python does not know it (embedded).
        """
        return {
            "topology": "all_to_all",
            "lazy": True,
            "dir": None,
            "exename": sys.executable or None,
            "exeflags": (),
            "env": None,
            "enable_threaded_blas": False,
            "timeout": None,
            "memory_limit": None,
            "affinity": None,
            "gpus": None,
        }


def parse_header(line: str) -> tuple[str, int] | None:
    """`(host, port)` of a worker's header line `distpool_worker:PORT#ADDR`, `None` for any other line.

    The address may be an IPv6 one, with or without brackets, or `unix:/path` with port 0.

    Example: `parse_header("distpool_worker:9009#10.0.0.7")` is `("10.0.0.7", 9009)`.
    """
    match = _HEADER.match(line.strip())
    if match is None:
        return None
    port, host = int(match[1]), match[2]
    if host.startswith("unix:") != (port == 0) or port > 65535:
        return None
    return host.removeprefix("[").removesuffix("]"), port
