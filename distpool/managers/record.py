"""What a manager knows of one worker (layer 8).

A dataclass, but made into one when `dataclasses` first looks: that module takes 4 ms to load, and a program's first
executor would wait for it (`managers.zygotes`).
"""

from __future__ import annotations

from collections.abc import Iterable

from distpool.fields import Fields
from distpool.hints import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dataclasses import dataclass
else:

    class _Later:
        """Stands where `dataclasses` puts what it knows of a class, and always begins to look for it."""

        def __init__(self, made):
            self.made = made

        def __get__(self, instance, owner):
            import dataclasses

            dataclasses.dataclass(self.made)  # it leaves the methods that are there, and takes this thing's place
            return self.made.__dataclass_fields__

    def dataclass(made):
        """With the methods of `Fields`, but not from it: names that a subclass annotates are none of its fields."""
        made.FIELDS = tuple(made.__annotations__)
        made.__init__, made.__eq__, made.__repr__ = Fields.__init__, Fields.__eq__, Fields.__repr__
        made.__hash__ = None
        made.__dataclass_fields__ = _Later(made)
        return made


@dataclass
class WorkerConfig:
    """What a manager knows of one worker; every field is `None` until somebody sets it.

    Used to reach it:
        io              binary stream from which its header line is read; further output is forwarded
        host, port      where it listens (str, int)
        process         what was started: `subprocess.Popen`, or a handle with `kill(signum)`
        ospid           its process id on its host; when it joins, what it says itself, unless the manager knows it
        connect_at      what the master's `connect` left for `connect` between workers
    Used by managers that log in to hosts:
        count           workers to start on that host (int, or "auto")
        exename, exeflags   the interpreter and its options there
        tunnel, multiplex, forward, bind_addr, sshflags, max_parallel   as the keywords of `addprocs`
    For anybody:
        userdata        whatever a manager of your own wants to keep
        environ         dict for temporary information; `environ["tls"]`: true if its listener accepts encrypted links
                        only, as a worker does that was handed `params["identity"]().settings()`
        ident, connect_idents   name in a custom topology, and the names it connects to
        enable_threaded_blas    as the keyword

    Example: `WorkerConfig(host="10.0.0.7", port=9009)`
    """

    io: Any = None
    host: str | None = None
    port: int | None = None
    count: Any = None
    exename: Any = None
    exeflags: Any = None
    userdata: Any = None
    tunnel: bool | None = None
    multiplex: bool | None = None
    forward: str | None = None
    bind_addr: str | None = None
    sshflags: Any = None
    max_parallel: int | None = None
    connect_at: Any = None
    process: Any = None
    ospid: int | None = None
    environ: dict[Any, Any] | None = None
    ident: Any = None
    connect_idents: Iterable[Any] | None = None
    enable_threaded_blas: bool | None = None


__all__ = ["WorkerConfig"]
