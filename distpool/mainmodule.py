"""`__main__` of this process as `everywhere` uses it: source text runs, functions are defined there (layer 6).

    run(source, ...)    bindings -> public names that the source uses -> statements -> value of the last expression
    define(name, value) a function that travelled by value gets `__main__` as its globals; a class gets a shared number

Called by remote calls (main thread of a worker if it is idle) and by the caller's own thread.
"""

from __future__ import annotations

import ast
import importlib
import linecache
import sys
import types
from collections.abc import Iterable
from typing import Any

from distpool.node import node as nodes
from distpool.refs.lent import parcel
from distpool.wire.byvalue import share_class
from distpool.wire.failures import encode_exception
from distpool.wire.messages import ERROR


def namespace(module: str = "__main__") -> dict[str, Any]:
    """The names of a module of this process, which is imported if need be."""
    found = sys.modules.get(module)
    return vars(found if found is not None else importlib.import_module(module))


def run(source: str, filename: str, module: str, bindings: dict[str, Any]) -> Any:
    """Run source text in that module; the value of its last expression, None if it ends in another statement."""
    names = namespace(module)
    names.update(bindings)
    tree = ast.parse(source, filename)
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    if module == "__main__":
        provide_public_names(tree, names)
    last = tree.body[-1] if tree.body else None
    if not isinstance(last, ast.Expr):
        exec(compile(tree, filename, "exec", dont_inherit=True), names)  # not this module's `from __future__`
        return None
    tree.body.pop()
    exec(compile(tree, filename, "exec", dont_inherit=True), names)
    return eval(compile(ast.Expression(last.value), filename, "eval", dont_inherit=True), names)


def run_times(source: str, filename: str, module: str, bindings: dict[str, Any], times: int, asker: int) -> list[Any]:
    """Run it so many times, one after the other; for each run None, or its error as a parcel for `asker`."""
    node = nodes.current()
    outcomes: list[Any] = []
    for _ in range(times):
        try:
            run(source, filename, module, bindings)
        except BaseException as error:
            if node.drops(error):
                raise
            seen: list[Any] = []
            data = encode_exception(error, asker, seen=seen)
            node.references().lend(seen, asker)
            outcomes.append(parcel(ERROR, data, [], node.pid))
        else:
            outcomes.append(None)
    return outcomes


def provide_public_names(tree: ast.AST, names: dict[str, Any]) -> None:
    """distpool's names that the source reads, where `__main__` has none of its own: Julia's `Main` has them too.

    Not all of them at once: they would hide what the program defines later, and cost their imports.
    """
    read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    package = sys.modules["distpool"]  # its public names are above this layer
    for name in read.intersection(package.__all__):
        if not name.startswith("_") and name not in names:
            names[name] = getattr(package, name)


def imports_of(tree: ast.Module) -> list[tuple[ast.stmt, bool]]:
    """Import statements outside of functions and classes; True: in a block, so that it may be meant to fail."""
    found: list[tuple[ast.stmt, bool]] = []

    def look(statements: Iterable[ast.AST], nested: bool) -> None:
        for statement in statements:
            if isinstance(statement, ast.ImportFrom) and statement.module == "__future__":
                continue
            if isinstance(statement, ast.Import | ast.ImportFrom):
                found.append((statement, nested))
            elif not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.expr):
                look(ast.iter_child_nodes(statement), True)

    look(tree.body, False)
    return found


def import_first(source: str, filename: str) -> None:
    """Run the import statements of `source` in `__main__` of this process (the caller)."""
    names = namespace()
    for statement, nested in imports_of(ast.parse(source, filename)):
        code = compile(ast.Module([statement], []), filename, "exec", dont_inherit=True)
        try:
            exec(code, names)
        except Exception:
            if not nested:
                raise


def define(name: str, value: Any) -> None:
    """Make `value` the `name` of `__main__` here."""
    names = namespace()
    if isinstance(value, types.FunctionType) and travels(value):
        value = _at_home(value, names)
    elif isinstance(value, type) and travels(value):
        share_class(value, f"everywhere:{name}")
    names[name] = value


def travels(value: Any) -> bool:
    """Whether this function or class cannot be imported, so that it goes from process to process by value."""
    if "<locals>" in value.__qualname__ or value.__module__ in ("__main__", "__mp_main__"):
        return True
    found: Any = sys.modules.get(value.__module__)
    for part in value.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is not value


def _at_home(function: types.FunctionType, names: dict[str, Any]) -> types.FunctionType:
    """The function with `__main__` as its globals, as if it had been defined there.

    What it uses and `__main__` lacks comes along; what an earlier definition has brought is brought up to date.
    """
    brought = nodes.current().brought
    for key, value in function.__globals__.items():
        if not key.startswith("__") and (key not in names or (key in brought and brought[key] is names[key])):
            names[key] = brought[key] = value
    home = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    home.__kwdefaults__ = function.__kwdefaults__
    home.__dict__.update(function.__dict__)
    home.__doc__ = function.__doc__
    home.__annotations__ = function.__annotations__
    home.__qualname__ = function.__qualname__
    home.__module__ = "__main__"
    return home


def clear_names(names: list[str], module: str) -> None:
    """Set those of these names that the module has to None."""
    found = namespace(module)
    for name in names:
        if name in found:
            found[name] = None


__all__ = ["clear_names", "define", "import_first", "imports_of", "namespace", "run", "run_times", "travels"]
