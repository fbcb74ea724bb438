"""Has a function that travels by value changed since it was last serialised? (layer 1)

cloudpickle takes 36 us for a lambda, 100 for a function with helpers, and each `submit` needs a fresh answer: a global
may have been bound anew since. This module answers by identity in 1-2 us: `take` notes down every object that
cloudpickle would look at (code, defaults, closure, the globals that the code names, those of its helpers), and
`Snapshot.fits` asks whether they are all still the same objects. That proves something only if none of them can change
in place, so `take` declines (None) when anything captured is not immutable: lists, instances, classes of `__main__`,
functions with attributes. Those are serialised each time.

Runs in the thread that submits. Snapshots are immutable once made.

Rejected: a key computed from the captured objects, looked up in a dict (needs each value's type checked each time:
twice as dear); versions of the globals dict (CPython internal, gone in 3.14).
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Iterator
from operator import attrgetter, is_, itemgetter
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType

from distpool.hints import Any
from distpool.wire.codec import by_value_modules

__all__ = ["MAIN_MODULES", "Snapshot", "is_importable", "take"]

#: Names in these modules mean something else in every process.
MAIN_MODULES = frozenset(("__main__", "__mp_main__"))

#: Exact types whose objects never change. Long strings are compared as part of the pickle instead of being kept alive.
_ATOMS = frozenset((int, float, complex, bool, type(None), type(Ellipsis), type(NotImplemented)))
_TEXTS = frozenset((str, bytes))
_MAX_TEXT = 1 << 16

#: A function with more helpers than this is serialised each time: checking would take as long.
_MAX_FUNCTIONS = 32
_MAX_VALUES = 256

_MISSING = object()

_attributes = attrgetter("__code__", "__defaults__", "__name__", "__qualname__", "__module__", "__doc__")

#: What cloudpickle copies from the globals besides the names in the code.
_BASE_GLOBALS = ("__package__", "__name__", "__path__", "__file__")

#: A decoded function may be used for several calls only if a call cannot leave traces in it (see `Snapshot.pure`).
_LEAVES_TRACES = frozenset(
    ("setattr", "delattr", "globals", "exec", "eval", "vars", "f_globals")
    + ("__dict__", "__globals__", "__annotations__", "__kwdefaults__")
)  # fmt: skip
_GLOBAL_STORES = frozenset(("STORE_GLOBAL", "DELETE_GLOBAL"))
_CELL_STORES = frozenset(("STORE_DEREF", "DELETE_DEREF"))
_ATTRIBUTE_STORES = frozenset(("STORE_ATTR", "DELETE_ATTR"))


def is_importable(obj: Any) -> bool:
    """Whether another process finds this function or class by its module and name."""
    module_name = getattr(obj, "__module__", None)
    name = getattr(obj, "__qualname__", None)
    if not isinstance(module_name, str) or not isinstance(name, str) or module_name in MAIN_MODULES:
        return False
    found: Any = sys.modules.get(module_name)
    try:
        for part in name.split("."):
            found = getattr(found, part)
    except Exception:  # a module with a __getattr__ of its own may raise anything
        return False
    return found is obj


class _Decline(Exception):
    """Something captured can change in place."""


class _Function:
    """One function as it was: what `same` compares a function with."""

    __slots__ = ("absent", "annotations", "attributes", "cells", "get_globals", "keyword_defaults", "values")

    def __init__(self, function: FunctionType, names: tuple[str, ...]) -> None:
        if function.__dict__:
            raise _Decline
        self.attributes = _attributes(function)
        self.cells = _cells(function)
        self.keyword_defaults = _items(function.__kwdefaults__)
        self.annotations = _items(function.__annotations__)
        namespace = function.__globals__
        present = tuple(name for name in names if name in namespace)
        # One name would make itemgetter return a bare value; `__name__` twice keeps it a tuple.
        getter = present if len(present) > 1 else (*present, *present) if present else ()
        self.get_globals: Callable[[Any], tuple[Any, ...]] = itemgetter(*getter) if getter else _nothing
        self.values = self.get_globals(namespace)
        self.absent = tuple(name for name in names if name not in namespace)

    def same(self, function: Any) -> bool:
        """Whether `function` is what was seen, object by object."""
        if not all(map(is_, _attributes(function), self.attributes)) or function.__dict__:
            return False
        if self.cells or function.__closure__:
            if not _same_items(_cells(function), self.cells):
                return False
        if self.keyword_defaults or function.__kwdefaults__:
            if not _same_items(_items(function.__kwdefaults__), self.keyword_defaults):
                return False
        if self.annotations or function.__annotations__:
            if not _same_items(_items(function.__annotations__), self.annotations):
                return False
        namespace = function.__globals__
        if not all(map(is_, self.get_globals(namespace), self.values)):
            return False
        # dict.keys() first: it then walks the short side.
        return bool(namespace.keys().isdisjoint(self.absent))

    def captured(self) -> Iterator[Any]:
        """Every object that would be in the pickle."""
        _, defaults, *names = self.attributes
        yield from names
        yield from defaults or ()
        yield from self.cells
        yield from self.keyword_defaults
        yield from self.annotations
        yield from self.values


class Snapshot:
    """A function and all that it captures at one moment. `pure`: calling it cannot change what it captured."""

    __slots__ = ("_by_value", "_helpers", "_importables", "_modules", "_root", "pure")

    def __init__(self, function: FunctionType) -> None:
        self._helpers: list[tuple[FunctionType, _Function]] = []
        self._importables: list[tuple[Any, str, Any]] = []
        # Modules go by name, and cloudpickle adds the imported submodules that the code mentions: both depend on what
        # is imported, so any import in between means a fresh look.
        self._modules = len(sys.modules)
        codes = [function.__code__]
        self._root = _Function(function, _global_names(function.__code__))
        # The registry itself (there since `_global_names` imported cloudpickle), empty now: once a module is in it,
        # importable helpers may travel by value.
        self._by_value = by_value_modules()
        pending = [self._root]
        known = {id(function)}
        count = 0
        itself = False  # captured, by whatever name: in a global or in a cell of its own
        while pending:
            for value in pending.pop().captured():
                count += 1
                helper = self._admit(value)
                itself |= helper is function
                if helper is not None and id(helper) not in known:
                    known.add(id(helper))
                    codes.append(helper.__code__)
                    noted = _Function(helper, _global_names(helper.__code__))
                    self._helpers.append((helper, noted))
                    pending.append(noted)
                if count > _MAX_VALUES or len(known) > _MAX_FUNCTIONS:
                    raise _Decline
        self.pure = _leaves_no_traces(codes, several=itself or len(codes) > 1)

    def fits(self, function: FunctionType) -> bool:
        """Whether serialising `function` now would give what it gave when the snapshot was taken."""
        try:
            if self._by_value or len(sys.modules) != self._modules or not self._root.same(function):
                return False
            for namespace, name, value in self._importables:
                if namespace.get(name, _MISSING) is not value:
                    return False
            return all(noted.same(helper) for helper, noted in self._helpers) if self._helpers else True
        except Exception:  # a global that is gone (KeyError), an annotation that cannot be evaluated any more
            return False

    def _admit(self, value: Any) -> FunctionType | None:
        """Accept one captured object, or raise _Decline; a function that travels by value too is returned."""
        kind = type(value)
        if kind in _ATOMS or (kind in _TEXTS and len(value) <= _MAX_TEXT):
            return None
        if kind is tuple or kind is frozenset:
            for item in value:
                # A function inside a tuple is rare enough to decline.
                if self._admit(item) is not None:
                    raise _Decline
        elif kind is ModuleType:
            self._expect(sys.modules, value.__name__, value)
        elif kind is FunctionType:
            if not is_importable(value):
                return value  # type: ignore[no-any-return]
            self._expect_importable(value)
        elif isinstance(value, type) or kind is BuiltinFunctionType:
            if getattr(builtins, value.__name__, None) is not value:
                if not is_importable(value):
                    raise _Decline
                self._expect_importable(value)
        else:
            raise _Decline
        return None

    def _expect_importable(self, value: Any) -> None:
        module = sys.modules[value.__module__]
        self._expect(sys.modules, value.__module__, module)
        self._expect(vars(module), value.__qualname__, value)

    def _expect(self, namespace: Any, name: str, value: Any) -> None:
        if namespace.get(name, _MISSING) is not value:
            raise _Decline
        self._importables.append((namespace, name, value))


def take(function: Any) -> Snapshot | None:
    """The snapshot of `function` as it is now, or None if something that it captures can change in place."""
    if type(function) is not FunctionType or by_value_modules():
        return None
    try:
        return Snapshot(function)
    except Exception:  # _Decline; and cells or annotations that are not there yet
        return None


def _nothing(namespace: Any) -> tuple[Any, ...]:
    return ()


def _cells(function: Any) -> tuple[Any, ...]:
    closure = function.__closure__
    if closure is None:
        return ()
    try:
        return tuple([cell.cell_contents for cell in closure])
    except ValueError:  # a cell without a value yet: never the same as anything
        return (object(),) * (len(closure) + 1)


def _items(mapping: dict[str, Any] | None) -> tuple[Any, ...]:
    if not mapping:
        return ()
    return (*mapping, *mapping.values())


def _same_items(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return len(one) == len(other) and all(map(is_, one, other))


def _global_names(code: CodeType) -> tuple[str, ...]:
    """Names that cloudpickle looks up in the globals for this code."""
    from cloudpickle import cloudpickle

    return tuple(dict.fromkeys((*_BASE_GLOBALS, *cloudpickle._extract_code_globals(code))))


def _leaves_no_traces(codes: list[CodeType], several: bool) -> bool:
    """Whether no call of these can change its own globals, closure or attributes (declines when in doubt). `several`:
    they have functions whose attributes they could set."""
    import dis

    free = {name for code in codes for name in code.co_freevars}
    pending = list(codes)
    while pending:
        code = pending.pop()
        if not _LEAVES_TRACES.isdisjoint(code.co_names):
            return False
        for instruction in dis.get_instructions(code):
            name = instruction.opname
            if name in _GLOBAL_STORES or (name in _CELL_STORES and instruction.argval in free):
                return False
            if several and name in _ATTRIBUTE_STORES:
                return False
        pending.extend(const for const in code.co_consts if isinstance(const, CodeType))
    return True
