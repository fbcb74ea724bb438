"""`__main__` of this process as `everywhere` uses it: source text runs, functions are defined there (layer 6).

    check(source)       -> Code, or SyntaxError: all that is wrong with it as such is found before it runs anywhere
    run(source, ...)    bindings -> public names that the source uses -> statements -> value of the last expression;
                        classes that it has defined are known by their names from then on (`_Definitions`)
    define(name, value) a function that travelled by value gets `__main__` as its globals; a class is known by its name

Called by remote calls (main thread of a worker if it is idle) and by the caller's own thread.

A class is known by its name from its first message on: it has no number of this process's own yet when it is found in
`__main__` under its own name and was not there before the text ran. Functions are not: one of `__main__` runs the
sender's code with the sender's globals, whether it was defined by text or as an object.
"""

from __future__ import annotations

import ast
import importlib
import linecache
import sys
import types
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, NamedTuple

from distpool.node import node as nodes
from distpool.node.served import RAISED, RETURNED, text_name
from distpool.refs.lent import parcel
from distpool.wire.byvalue import is_numbered, running_texts, share_class
from distpool.wire.failures import encode_exception
from distpool.wire.messages import ERROR


def namespace(module: str | types.ModuleType = "__main__") -> dict[str, Any]:
    """The names of a module of this process, which is imported if need be."""
    if isinstance(module, types.ModuleType):
        return vars(module)
    found = sys.modules.get(module)
    return vars(found if found is not None else importlib.import_module(module))


class Code(NamedTuple):
    """Source text that can run. `imports`: as `imports_of` has them; `reads`: names that it may look up."""

    imports: list[tuple[types.CodeType, bool]]
    statements: types.CodeType
    last: types.CodeType | None
    reads: frozenset[str]


def check(source: str, filename: str) -> Code:
    """Compile source text, once in the process that asks: warnings of the compiler would come each time. SyntaxError
    also for what only a compiler finds (`return` outside of a function)."""

    def made(tree: Any, mode: str) -> types.CodeType:
        code: types.CodeType = compile(tree, filename, mode, dont_inherit=True)  # not our `from __future__`
        return code

    tree = ast.parse(source, filename)
    reads = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    imports = [(made(ast.Module([statement], []), "exec"), nested) for statement, nested in imports_of(tree)]
    last = tree.body[-1] if tree.body else None
    if isinstance(last, ast.Expr):
        tree.body.pop()
        value = made(ast.Expression(last.value), "eval")
    else:
        value = None
    return Code(imports, made(tree, "exec"), value, frozenset(reads))


def run(
    source: str, filename: str, module: str | types.ModuleType, bindings: dict[str, Any], code: Code | None = None
) -> Any:
    """Run source text in that module; the value of its last expression, None if it ends in another statement. `code`:
    what `check` made of it, if it was here."""
    names = namespace(module)
    names.update(bindings)
    if code is None:
        code = check(source, filename)
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    if names is not namespace():
        return _run(code, names)
    provide_public_names(code.reads, names)
    with _Definitions(names):
        return _run(code, names)


def _run(code: Code, names: dict[str, Any]) -> Any:
    exec(code.statements, names)
    return None if code.last is None else eval(code.last, names)


class _Definitions:
    """While it lasts, classes that are new in `__main__` are shared under their names: by whoever sends or receives
    one, at the latest when it ends."""

    def __init__(self, names: dict[str, Any]) -> None:
        self._names = names
        self._before = _classes_in(names)  # not all of the names: what the text lets go of shall be gone

    def __enter__(self) -> None:
        running_texts.append(self._share)

    def __exit__(self, *error: object) -> None:
        try:
            self._share()
        finally:
            running_texts.remove(self._share)

    def _share(self) -> None:
        for name, cls in _classes_in(self._names).items():
            if self._before.get(name) is not cls:
                with suppress(Exception):  # a metaclass of the user's may raise anything when it is asked
                    # One with a number has come by other ways: bindings, values; it is known by that.
                    if cls.__name__ == name and not is_numbered(cls) and travels(cls):
                        share_class(cls, f"everywhere:{name}")


def _classes_in(names: dict[str, Any]) -> dict[str, type]:
    return {name: value for name, value in names.copy().items() if issubclass(type(value), type)}


def run_times(source: str, filename: str, module: str, bindings: dict[str, Any], times: int, asker: int) -> list[Any]:
    """Run it so many times, one after the other; for each run None, or its error as a parcel for `asker`."""
    node = nodes.current()
    outcomes: list[Any] = []
    code: Code | None = None
    for _ in range(times):
        call = node.served.begin(text_name(filename))
        try:
            if code is None:
                code = check(source, filename)
            run(source, filename, module, bindings, code)
        except BaseException as error:
            node.served.end(call, RAISED)
            if node.drops(error):
                raise
            seen: list[Any] = []
            data = encode_exception(error, asker, seen=seen)
            node.references().lend(seen, asker)
            outcomes.append(parcel(ERROR, data, [], node.pid))
        else:
            node.served.end(call, RETURNED)
            outcomes.append(None)
    return outcomes


def provide_public_names(read: frozenset[str], names: dict[str, Any]) -> None:
    """distpool's names that the source reads, where `__main__` has none of its own: Julia's `Main` has them too.

    Not all of them at once: they would hide what the program defines later, and cost their imports.
    """
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


def import_first(code: Code) -> None:
    """Run the import statements of checked source text in `__main__` of this process (the caller)."""
    names = namespace()
    for statement, nested in code.imports:
        try:
            exec(statement, names)
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


def clear_names(names: list[str], module: str | types.ModuleType) -> None:
    """Set those of these names that the module has to None."""
    found = namespace(module)
    for name in names:
        if name in found:
            found[name] = None


__all__ = [
    "Code", "check", "clear_names", "define", "import_first", "imports_of", "namespace", "run", "run_times", "travels",
]  # fmt: skip
