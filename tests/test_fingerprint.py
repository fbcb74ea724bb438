"""Snapshots of functions that travel by value: what fits still, what is declined. Whole encodings: `test_functions`."""

from __future__ import annotations

import collections
import os.path
import sys
import types
from collections.abc import Callable
from typing import Any

import cloudpickle
import pytest

from distpool.wire.fingerprint import Snapshot, is_importable, take


def main_function(source: str, name: str = "f", **names: Any) -> tuple[Any, dict[str, Any]]:
    """The function that `source` defines in a `__main__` of its own, and that one's globals."""
    namespace: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__, **names}
    exec(source, namespace)
    return namespace[name], namespace


def snapshot(function: Any) -> Snapshot:
    found = take(function)
    assert found is not None
    return found


# -- what another process finds by name ----------------------------------------------------------------------------


class Outer:
    class Inner:
        def method(self) -> None: ...


@pytest.mark.parametrize(
    "obj", [os.path.join, collections.OrderedDict, len, Outer, Outer.Inner, Outer.Inner.method, main_function]
)
def test_importable(obj: Any) -> None:
    assert is_importable(obj)


def local() -> Callable[[], None]:
    def inner() -> None: ...

    return inner


class Odd(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("not today")


def test_not_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    in_main, _ = main_function("def f(): pass")
    monkeypatch.setitem(sys.modules, "odd_module", Odd("odd_module"))
    lost = types.FunctionType(local.__code__, {}, "lost")
    lost.__module__ = "odd_module"
    hidden = types.FunctionType(local.__code__, {}, "join")
    hidden.__module__, hidden.__qualname__ = "os.path", "join"
    gone = types.FunctionType(local.__code__, {}, "f")
    gone.__module__ = "no_such_module"
    for obj in (in_main, local(), lambda: None, lost, hidden, gone, 5, None, object()):
        assert not is_importable(obj)
    in_main.__module__ = "__mp_main__"
    assert not is_importable(in_main)


# -- what is declined ----------------------------------------------------------------------------------------------


class Main:
    """An instance: it may change in place."""


@pytest.mark.parametrize(
    "value",
    [[], {}, set(), bytearray(), Main(), (1, []), (lambda: 1,), "x" * (1 << 17), object(), 2j, b"y"],
)
def test_only_what_can_never_change_is_noted(value: Any) -> None:
    function, _ = main_function("def f(): return captured", captured=value)
    immutable = type(value) in (complex, bytes)
    assert (take(function) is not None) is immutable


def test_other_callables_and_odd_functions_are_declined() -> None:
    function, _ = main_function("def f(): pass")
    assert take(function) is not None
    function.attribute = 1
    for other in (function, len, Main, Main(), types.MethodType(function, 1), None):
        assert take(other) is None
    empty = (lambda: (lambda: later) if True else (later := 1))()
    assert take(empty) is None, "a cell without a value yet"


def test_too_much_to_look_at_is_declined() -> None:
    names = {f"helper_{number}": main_function(f"def f(): return {number}")[0] for number in range(40)}
    function, _ = main_function(f"def f(): return ({', '.join(names)})", **names)
    assert take(function) is None
    few = dict(list(names.items())[:5])
    function, _ = main_function(f"def f(): return ({', '.join(few)})", **few)
    assert take(function) is not None


def test_nothing_is_noted_while_modules_travel_by_value() -> None:
    function, _ = main_function("def f(): return 1")
    before = snapshot(function)
    assert before.fits(function)
    module = types.ModuleType("by_value_module")
    sys.modules["by_value_module"] = module
    try:
        cloudpickle.register_pickle_by_value(module)
        try:
            assert take(function) is None and not before.fits(function)
        finally:
            cloudpickle.unregister_pickle_by_value(module)
    finally:
        del sys.modules["by_value_module"]
    assert before.fits(function)


# -- what fits still -----------------------------------------------------------------------------------------------


def change_global(function: Any, namespace: dict[str, Any]) -> None:
    namespace["number"] = 2.0


def delete_global(function: Any, namespace: dict[str, Any]) -> None:
    del namespace["number"]


def define_missing(function: Any, namespace: dict[str, Any]) -> None:
    namespace["missing"] = 1


def change_helper(function: Any, namespace: dict[str, Any]) -> None:
    namespace["helper"].__code__ = (lambda: 5).__code__


def change_default(function: Any, namespace: dict[str, Any]) -> None:
    function.__defaults__ = (2,)


def change_keyword(function: Any, namespace: dict[str, Any]) -> None:
    function.__kwdefaults__["key"] = 9


def change_annotation(function: Any, namespace: dict[str, Any]) -> None:
    function.__annotations__["a"] = str


def change_name(function: Any, namespace: dict[str, Any]) -> None:
    function.__qualname__ = "other"


def add_attribute(function: Any, namespace: dict[str, Any]) -> None:
    function.attribute = 1


def import_something(function: Any, namespace: dict[str, Any]) -> None:
    sys.modules["a_module_just_imported"] = types.ModuleType("a_module_just_imported")


SOURCE = """
def helper(): return 4
def f(a: int = 1, *, key=3):
    return number + helper() + missing + path.join('')
"""


@pytest.mark.parametrize(
    "change",
    [
        *(change_global, delete_global, define_missing, change_helper, change_default, change_keyword),
        *(change_annotation, change_name, add_attribute, import_something),
    ],
)
def test_every_change_is_seen(change: Any) -> None:
    function, namespace = main_function(SOURCE, number=1.5, path=os.path)
    before = snapshot(function)
    assert before.fits(function) and before.fits(function)
    try:
        change(function, namespace)
        assert not before.fits(function)
    finally:
        sys.modules.pop("a_module_just_imported", None)


def test_cells_are_compared_by_identity() -> None:
    def outer(value: Any) -> Any:
        def inner() -> Any:
            return value

        def rebind(new: Any) -> None:
            nonlocal value
            value = new

        return inner, rebind

    value = 10**20
    function, rebind = outer(value)
    before = snapshot(function)
    rebind(10**20 + 1)
    assert not before.fits(function)
    rebind(value)
    assert before.fits(function)


def test_a_module_attribute_that_means_something_else_now(monkeypatch: pytest.MonkeyPatch) -> None:
    function, _ = main_function("def f(): return join('a')", join=os.path.join)
    before = snapshot(function)
    monkeypatch.setattr(os.path, "join", lambda *parts: "")
    assert not before.fits(function)


# -- what may be used for several calls ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source, pure",
    [
        ("def f(x): return x + 1", True),
        ("def f(x):\n    y = [x]\n    y.append(1)\n    return y", True),
        ("def f(x):\n    global number\n    number = x", False),
        ("def f(x):\n    global number\n    del number", False),
        ("def f(x): return globals()", False),
        ("def f(x): exec(x)", False),
        ("def f(x): setattr(f, 'a', x)", False),
        ("def f(x): f.calls = x", False),
        ("def f(x): x.attribute = 1", True),
        ("def f(x): return f.__dict__", False),
        ("def f(x):\n    def g():\n        global number\n        number = 1\n    return g()", False),
    ],
)
def test_whether_a_call_can_leave_traces(source: str, pure: bool) -> None:
    function, _ = main_function(source)
    assert snapshot(function).pure is pure


def test_rebinding_what_was_captured_leaves_traces() -> None:
    number = 1

    def count() -> int:
        nonlocal number
        number += 1
        return number

    def inner_only() -> int:
        own = 1

        def inner() -> int:
            nonlocal own
            own += 1
            return own

        return inner()

    assert snapshot(count).pure is False
