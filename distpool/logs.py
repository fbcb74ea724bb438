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
import threading
from collections.abc import Callable

TYPE_CHECKING = False  # not from `typing`: see `hints`
if TYPE_CHECKING:
    import logging
    from typing import Any


class Log:
    """The logger `distpool.NAME`: its methods (`debug`, `warning`, `exception`, ...), looked up at each use.

    The handlers are the user's code: what they raise is shown on stderr as `logging` itself shows the errors of its own
    handlers, and goes no further.

    Example: `log = Log("ioloop")`, `log.warning("%s", error)`
    """

    #: Takes a function that runs handlers and calls it where that may take long, if the calling thread is not one for
    #: that; False: the thread may do it itself. Put here by `node.node`.
    elsewhere: Callable[[Callable[[], object]], bool] = staticmethod(lambda write: False)

    def __init__(self, name: str) -> None:
        self._name = f"distpool.{name}"
        quiet_if_loaded()

    def __getattr__(self, method: str) -> Any:
        return lambda *args, **options: _write(self._name, method, args, options)


def _write(name: str, method: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Nothing that goes wrong here, in handlers above all, gets out of here."""
    try:
        import logging
    except Exception:  # no descriptor or no memory left (MemoryError): what was to be logged is worse than no log
        return

    def write() -> None:
        try:
            logger.log(level, *args, stacklevel=4, **options)
        except BaseException as error:
            if not isinstance(error, Exception) and threading.current_thread() is threading.main_thread():
                raise  # Ctrl-C
            _show()

    try:
        be_quiet()
        logger = logging.getLogger(name)
        level = logging.ERROR if method == "exception" else getattr(logging, method.upper())
        if not (logger.isEnabledFor(level) and _is_heard(logger)):
            return
        if method == "exception" or options.get("exc_info") is True:
            options["exc_info"] = sys.exc_info()  # now: another thread has none
        if not Log.elsewhere(write):
            write()
    except Exception:
        _show()


def _is_heard(logger: logging.Logger) -> bool:
    """Whether anybody is to be told: not if there is nothing but the handler that makes us quiet."""
    import logging

    at: logging.Logger | None = logger
    while at is not None:
        if at.filters or any(type(handler) is not logging.NullHandler for handler in at.handlers):
            return True
        at = at.parent if at.propagate else None
    return False


def _show() -> None:
    """A handler of the user's has raised."""
    try:
        import logging
        import traceback

        if logging.raiseExceptions and sys.stderr is not None:
            print("--- Logging error ---", file=sys.stderr)
            traceback.print_exc()
    except Exception:
        pass  # stderr is the user's as well: nothing is left to tell it to


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
        except Exception:  # see `_write`
            pass


__all__ = ["Log", "be_quiet", "quiet_if_loaded"]
