"""Threads and frames for the tests of what strikes calls."""

from __future__ import annotations

import signal
import sys
import threading
import types
from collections.abc import Callable
from typing import Any


class Running:
    """A call on a thread of its own; called, it waits for the end and gives what came of it, an exception included."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._found: list[Any] = []
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        self.ident = self._thread.ident or 0

    def _work(self) -> None:
        try:
            self._found.append(self._function())
        except BaseException as error:
            self._found.append(error)

    def __call__(self) -> Any:
        self._thread.join(20)
        assert not self._thread.is_alive()
        return self._found[0]


def signal_in_the_import_system(on_signal: Callable[[int, Any], object]) -> None:
    """As if SIGINT came while the caller is in importlib."""
    code = compile("pass", "<frozen importlib._bootstrap>", "exec")
    on_signal(signal.SIGINT, types.SimpleNamespace(f_code=code, f_back=sys._getframe(1)))
