"""Loops in which Ctrl-C may strike. Where Python 3.12 and 3.13 jump back in a `while` with a condition, they look at
signals outside of the `try` or `with` that it stands in (python/cpython#130279): no handler and no `finally` runs, a
lock stays held. `while True` with a `break` has no such place, nor has a loop in a function of its own.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "distpool"
#: What users' threads run while signals are not deferred. (Leaders, library threads and workers have no such moments.)
MODULES = [
    *(
        "adding",
        "calls",
        "elements",
        "executor",
        "flag",
        "kept",
        "lazymap",
        "loops",
        "mapping",
        "mapresults",
        "mapruns",
    ),
    *("nested", "ordered", "pool", "pool_callbacks", "pool_input", "pool_results", "pool_runs", "pooling", "poolmap"),
    *("pools", "recalls", "recovery", "replies", "scheduling", "spawning", "submitter", "submitting", "verbs"),
    *("refs.ahead", "refs.channel", "refs.channelcore", "refs.channels", "refs.gc", "refs.owner", "refs.refs"),
    *("refs.remote", "refs.waiters", "transport.link"),
]
#: (module, function): signals are deferred there.
DEFERRED = {("scheduling", "pump"), ("transport.link", "_pump"), ("transport.link", "_on_readable")}


def loops(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Function and line of each `while` with a condition inside of a `try` or `with`."""

    def visit(node: ast.AST, function: str, guarded: bool) -> Iterator[tuple[str, int]]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            function, guarded = getattr(node, "name", "lambda"), False
        if isinstance(node, ast.While) and guarded and not isinstance(node.test, ast.Constant):
            yield function, node.lineno
        inside = node.body if isinstance(node, ast.Try | ast.With) else ()
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function, guarded or child in inside)

    yield from visit(tree, "module", False)


@pytest.mark.parametrize("module", MODULES)
def test_no_loop_leaves_its_try_by_a_signal(module: str) -> None:
    tree = ast.parse(PACKAGE.joinpath(*module.split(".")).with_suffix(".py").read_text())
    found = [(function, line) for function, line in loops(tree) if (module, function) not in DEFERRED]
    assert not found, "`while True` with a `break`, or a function of its own"


def test_the_check_finds_them() -> None:
    source = """
def f():
    with lock:
        while condition():
            pass
    try:
        while True:
            pass
        for x in y:
            while x:
                pass
    finally:
        while condition():
            pass
    def g():
        while condition():
            pass
"""
    assert list(loops(ast.parse(source))) == [("f", 4), ("f", 10)]
