"""`__main__` of a process as `everywhere` uses it, in a `__main__` that the test puts there."""

from __future__ import annotations

import ast
import linecache
import sys
import traceback
import types
from collections.abc import Iterator
from typing import Any

import pytest

import distpool
from distpool import mainmodule
from distpool.mainmodule import check, clear_names, define, import_first, imports_of, namespace, run, run_times, travels
from distpool.node import node as nodes
from distpool.wire import byvalue, codec


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The names of an empty `__main__`."""
    module = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", module)
    monkeypatch.setattr(nodes.current(), "brought", {})
    yield vars(module)
    for name in [name for name in linecache.cache if str(name).startswith("<test")]:
        del linecache.cache[name]


def go(source: str, module: str = "__main__", **bindings: Any) -> Any:
    return run(source, "<test 1>", module, bindings)


# -- source text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("1 + 1", 2),
        ("x = 3\nx * 2", 6),
        ("x = 3", None),
        ("def f(): return 1", None),
        ("", None),
        ("# nothing", None),
        ("1; 2; 3", 3),
        ("for i in range(3): i", None),
        ("(lambda: 5)()", 5),
        ("None", None),
    ],
)
def test_the_value_is_that_of_the_last_expression(main: dict[str, Any], source: str, value: Any) -> None:
    assert go(source) == value


def test_annotations_are_what_they_are_in_a_program_unless_it_says_otherwise(main: dict[str, Any]) -> None:
    assert go("def f(x: int): pass\nf.__annotations__") == {"x": int}
    go("class C:\n    x: int")
    assert main["C"].__annotations__ == {"x": int}
    assert go("from __future__ import annotations\ndef f(x: int): pass\nf.__annotations__") == {"x": "int"}


def test_statements_run_once_and_leave_their_names(main: dict[str, Any]) -> None:
    assert go("seen = []\nseen.append(1)\nseen") == [1]
    assert main["seen"] == [1] and go("seen + [given]", given=2) == [1, 2] and main["given"] == 2


def test_an_error_shows_the_source(main: dict[str, Any]) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        go("before = 1\n1 // 0  # here")
    assert "1 // 0  # here" in "".join(traceback.format_exception(caught.value))
    assert main["before"] == 1
    with pytest.raises(SyntaxError):
        go("x = 1\nno python")
    assert "x" not in main  # nothing of it ran


def test_public_names_where_there_are_none(main: dict[str, Any]) -> None:
    main["pmap"] = "the program's own"
    assert go("myid, pmap") == (distpool.myid, "the program's own")
    assert "remotecall" not in main  # not all of them at once
    go("nprocs = 5")
    assert main["nprocs"] == 5  # it only writes that one
    with pytest.raises(NameError):
        go("_something")


def test_other_modules_have_only_their_own_names(main: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    other = types.ModuleType("some_other")
    monkeypatch.setitem(sys.modules, "some_other", other)
    go("x = 1", module="some_other")
    assert vars(other)["x"] == 1 and "x" not in main
    with pytest.raises(NameError):
        go("myid", module="some_other")


def test_a_module_is_imported_if_need_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "this", raising=False)
    monkeypatch.setattr("builtins.print", lambda *arguments: None)
    assert "s" in namespace("this")
    with pytest.raises(ModuleNotFoundError):
        namespace("no_such_module_here")


def test_each_of_several_runs_has_its_outcome(main: dict[str, Any]) -> None:
    main["count"] = 0
    source = "count += 1\nif count == 2: raise KeyError(count)\nif count == 3: raise SystemExit"
    good, bad, left, again = run_times(source, "<test 2>", "__main__", {}, 4, 5)
    assert good is again is None and main["count"] == 4
    assert bad is not None and left is not None


WRONG = ["return 1", "break", "continue", "await x", "yield 1", "nonlocal z", "x = 1\nglobal x", "[await y for y in z]"]


@pytest.mark.parametrize("source", [*WRONG, "if 1:\n    return", "async with a: pass", "x =", "x = 1\nx ="])
def test_what_only_a_compiler_finds_is_found_before_it_runs(main: dict[str, Any], source: str) -> None:
    for text in (source, f"before = 1\n{source}", f"{source}\nbefore = 1"):
        with pytest.raises(SyntaxError):
            check(text, "<test 4>")
        with pytest.raises(SyntaxError):
            go(text)
    assert "before" not in main


# -- imports of the caller -------------------------------------------------------------------------------------------


def test_imports_outside_of_functions_are_found() -> None:
    source = """
from __future__ import annotations
import a
if x:
    import b
    try:
        from c import d
    except ImportError:
        import e
match x:
    case 1:
        import f
with y:
    import g
def function():
    import no
class Class:
    import no
async def function():
    import no
"""
    found = [(statement.lineno, nested) for statement, nested in imports_of(ast.parse(source))]
    assert found == [(3, False), (5, True), (7, True), (9, True), (12, True), (14, True)]


def test_imports_happen_here_and_those_in_blocks_may_fail(main: dict[str, Any]) -> None:
    import_first(
        check("try:\n    import no_such_module_here\nexcept ImportError:\n    import json as j\nx = 1", "<test 3>")
    )
    assert main["j"] is sys.modules["json"] and "x" not in main
    with pytest.raises(ModuleNotFoundError):
        import_first(check("import no_such_module_here", "<test 3>"))


# -- definitions -----------------------------------------------------------------------------------------------------


def by_value(source: str, name: str = "f", **names: Any) -> Any:
    """What `source` defines in a `__main__` of another process."""
    there: dict[str, Any] = {"__name__": "__main__", **names}
    exec(source, there)
    return there[name]


def test_a_function_is_at_home_in_main(main: dict[str, Any]) -> None:
    function = by_value("def f(a, b=2, *, c=3) -> int:\n    'doc'\n    return a + b + c + d", d=4)
    function.mark = "x"
    define("g", function)
    made = main["g"]
    assert made(1) == 10 and made.__globals__ is main and main["d"] == 4
    assert (made.__name__, made.__qualname__, made.__module__) == ("f", "f", "__main__")
    assert (made.__doc__, made.mark, made.__annotations__, made.__kwdefaults__) == (
        "doc", "x", {"return": "int"}, {"c": 3},
    )  # fmt: skip
    main["d"] = 40
    assert made(1) == 46  # as if it had been defined there


def test_names_of_the_program_are_not_replaced(main: dict[str, Any]) -> None:
    main["d"] = 100
    define("f", by_value("def f(): return d", d=4))
    assert main["f"]() == 100 and main["d"] == 100


def test_what_an_earlier_definition_has_brought_is_brought_up_to_date(main: dict[str, Any]) -> None:
    define("f", by_value("def f(): return d", d=4))
    define("f", by_value("def f(): return d", d=5))
    assert main["f"]() == 5
    main["d"] = 6  # the program's own from now on
    define("f", by_value("def f(): return d", d=7))
    assert main["f"]() == 6


def test_closures_keep_what_they_hold(main: dict[str, Any]) -> None:
    define("f", by_value("def make(x):\n    def f(): return x\n    return f\nf = make(3)"))
    assert main["f"]() == 3 and main["f"].__qualname__ == "make.<locals>.f"


def test_what_can_be_imported_stays_what_it_is(main: dict[str, Any]) -> None:
    define("dump", ast.dump)
    define("number", 3)
    assert main["dump"] is ast.dump and main["number"] == 3


def test_a_class_gets_a_number_that_all_share(main: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    shared: list[tuple[type, str]] = []
    monkeypatch.setattr(mainmodule, "share_class", lambda cls, name: shared.append((cls, name)))
    made = by_value("class C: pass", "C")
    define("D", made)
    define("E", dict)
    assert main["D"] is made and main["E"] is dict and shared == [(made, "everywhere:D")]


def test_classes_of_a_text_are_shared_under_their_names(main: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    shared: list[tuple[type, str]] = []
    monkeypatch.setattr(mainmodule, "share_class", lambda cls, name: shared.append((cls, name)))
    main["Before"] = by_value("class Before: pass", "Before")
    go("class A: pass\nB = A\nfrom ast import NodeVisitor\nC = Before = Before\nNew = Bound", Bound=main["Before"])
    assert shared == [(main["A"], "everywhere:A")]
    with pytest.raises(KeyError):
        go("class D: pass\nraise KeyError")
    assert shared.pop() == (main["D"], "everywhere:D") and not byvalue.running_texts
    other = types.ModuleType("some_other")
    monkeypatch.setitem(sys.modules, "some_other", other)
    go("class E: pass", module="some_other")
    assert [name for _, name in shared] == ["everywhere:A"]


def test_classes_are_shared_by_whoever_sends_them_first(main: dict[str, Any]) -> None:
    names = go(
        "class A:\n    class B: pass\nfirst = dumps(A)\nclass A: pass\n(first, dumps(A), loads(first))",
        dumps=lambda cls: codec.encode(cls)[0],
        loads=codec.decode,
    )
    assert b"distpool:everywhere:A" in names[0] and b"distpool:everywhere:A.B" in names[0]
    assert b"distpool:everywhere:A" in names[1] and names[2] is main["A"]


def test_what_travels_by_value() -> None:
    def local() -> None: ...

    assert travels(local) and travels(by_value("class C: pass", "C")) and travels(lambda: 0)
    assert not travels(ast.dump) and not travels(travels) and not travels(dict) and not travels(ast.NodeVisitor.visit)
    renamed = types.FunctionType(local.__code__, globals(), "run")
    renamed.__module__, renamed.__qualname__ = "distpool.mainmodule", "run"
    assert travels(renamed)  # what stands there is another one
    renamed.__module__ = None  # type: ignore[assignment]
    assert travels(renamed)


def test_clearing_names(main: dict[str, Any]) -> None:
    main.update(a=1, b=2)
    clear_names(["a", "c"], "__main__")
    assert main["a"] is None and main["b"] == 2 and "c" not in main
