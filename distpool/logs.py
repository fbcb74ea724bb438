"""Loggers that cost nothing until something is logged (layer 0).

`logging` takes 5 ms to load: a worker that has nothing to log need not have it, and every worker starts sooner. The
names are those of the standard library's loggers, below "distpool".
"""

from __future__ import annotations

TYPE_CHECKING = False  # not from `typing`: see `hints`
if TYPE_CHECKING:
    from typing import Any


class Log:
    """The logger `distpool.NAME`: its methods (`debug`, `warning`, `exception`, ...), looked up at each use.

    Example: `log = Log("ioloop")`, `log.warning("%s", error)`
    """

    def __init__(self, name: str) -> None:
        self._name = f"distpool.{name}"

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


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In place of a logger's method."""


__all__ = ["Log", "be_quiet"]
