"""distpool/node/striking.py: KeyboardInterrupt in another thread, but not in the import system."""

from __future__ import annotations

import importlib
import signal
import threading
import types
from collections.abc import Callable
from typing import Any

from distpool.node.striking import handles, imports, raise_in


def on_thread(function: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Start it; the list has what came of it, an exception included."""
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(function())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread, found


def test_user_code_is_struck() -> None:
    runs = threading.Event()

    def spin() -> None:
        runs.set()
        while True:
            pass

    thread, found = on_thread(spin)
    assert runs.wait(10) and thread.ident is not None
    assert raise_in(thread.ident)
    thread.join(10)
    assert [type(each) for each in found] == [KeyboardInterrupt]
    assert raise_in(thread.ident), "nobody is there any more"


def test_a_thread_that_starts_another_one_is_not_struck() -> None:
    waits, go = threading.Event(), threading.Event()

    class Slow(threading.Thread):
        def _bootstrap(self) -> None:
            waits.set()
            go.wait(20)
            super()._bootstrap()  # type: ignore[misc]

    thread, found = on_thread(lambda: Slow().start())
    assert waits.wait(10) and thread.ident is not None
    assert not raise_in(thread.ident)
    go.set()
    thread.join(10)
    assert found == [None]


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
