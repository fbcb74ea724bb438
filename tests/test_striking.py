"""distpool/node/striking.py: KeyboardInterrupt in another thread, but not in the import system."""

from __future__ import annotations

import importlib
import signal
import threading
import types
from typing import Any

from struck import Running

from distpool.node.striking import handles, imports, raise_in


def test_user_code_is_struck() -> None:
    runs = threading.Event()

    def spin() -> None:
        runs.set()
        while True:
            pass

    running = Running(spin)
    assert runs.wait(10)
    assert raise_in(running.ident)
    assert isinstance(running(), KeyboardInterrupt)
    assert raise_in(running.ident), "nobody is there any more"


def test_a_thread_that_starts_another_one_is_not_struck() -> None:
    waits, go = threading.Event(), threading.Event()

    class Slow(threading.Thread):
        def _bootstrap(self) -> None:
            waits.set()
            go.wait(20)
            super()._bootstrap()  # type: ignore[misc]

    running = Running(lambda: Slow().start())
    assert waits.wait(10)
    assert not raise_in(running.ident)
    go.set()
    assert running() is None


def test_which_frames_are_of_the_import_system() -> None:
    def frame(name: str) -> Any:
        return types.SimpleNamespace(f_code=compile("pass", name, "exec"))

    assert imports(frame("<frozen importlib._bootstrap>")) and imports(frame("<frozen importlib._bootstrap_external>"))
    assert imports(frame(importlib._bootstrap.ModuleSpec.__init__.__code__.co_filename))  # type: ignore[attr-defined]
    assert not imports(frame(__file__)) and not imports(frame(importlib.__file__)) and not imports(None)


def test_whose_handler_a_signal_has() -> None:
    class Owner:
        def hear(self, signum: int, frame: Any) -> None:
            pass

    one, other = Owner(), Owner()
    before = signal.signal(signal.SIGINT, one.hear)
    try:
        assert handles(one, signal.SIGINT) and not handles(other, signal.SIGINT)
        signal.signal(signal.SIGINT, lambda signum, frame: None)
        assert not handles(one, signal.SIGINT) and not handles(one, 0)
    finally:
        signal.signal(signal.SIGINT, before)
