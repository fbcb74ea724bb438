"""Loggers that cost nothing until something is logged (layer 0).

`logging` takes 5 ms to load: a worker that has nothing to log need not have it, and every worker starts sooner. The
names are those of the standard library's loggers, below "distpool".

The NullHandler that makes us quiet is there from the moment on at which both `logging` and something of ours that could
log are loaded: with `import distpool` if the program had `logging` before, else with the first `Log` that is made after
it (most of our modules load `concurrent.futures`, which needs it), or with the first record. (A hook on the import of
`logging` itself would be the only way to be earlier; nobody expects a library to change how other modules are
imported.)
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # not from `typing`: see `hints`
if TYPE_CHECKING:
    from typing import Any


class Log:
    """The logger `distpool.NAME`: its methods (`debug`, `warning`, `exception`, ...), looked up at each use.

    Example: `log = Log("ioloop")`, `log.warning("%s", error)`
    """

    def __init__(self, name: str) -> None:
        self._name = f"distpool.{name}"
        quiet_if_loaded()

    def __getattr__(self, method: str) -> Any:
        try:
            import logging
        except (ImportError, OSError):  # no descriptor or no memory left: what was to be logged is worse than no log
            return _nothing
        be_quiet()
        return getattr(logging.getLogger(self._name), method)


def be_quiet() -> None:
    """A library does not print unless the program says where to. For loggers below ours that others write to, too."""
    import logging

    top = logging.getLogger("distpool")
    if not top.handlers:
        top.addHandler(logging.NullHandler())


def quiet_if_loaded() -> None:
    """As `be_quiet` if the program, or what we had to load, has loaded `logging`; else a later one sees to it."""
    if "logging" in sys.modules:
        try:
            be_quiet()
        except (ImportError, OSError):  # see `Log`
            pass


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In place of a logger's method."""


__all__ = ["Log", "be_quiet", "quiet_if_loaded"]
