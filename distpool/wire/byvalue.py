"""The pickler for what other processes cannot import: cloudpickle, corrected in eleven ways (layer 1).

Imported on first need only (`codec.dump_by_value`, and the other side's unpickler by name): cloudpickle is dear.
Runs where `codec` runs.

1. A class comes home. cloudpickle numbers classes that travel by value (those of `__main__` above all), so that an
   instance which returns is an instance of the caller's own class. But it also writes the returning *definition* over
   that class: its methods become copies with frozen globals, its counters jump back. Here a definition only ever
   changes classes that came from elsewhere.
2. A name that the sender does not have is looked up in `__main__` of the process that runs the function, as in Julia:
   `everywhere("def foo(): ...", [2])`, then `remotecall_fetch(lambda: foo(), 2)`. Names that the sender has travel.
3. The main module of a child of `multiprocessing` (`__mp_main__`) is as unknown elsewhere as `__main__`. What cannot be
   imported under `functools.lru_cache`, which would go by name, travels with an empty cache.
4. What an initializer does to globals lasts, as in the process pools of the standard library: each message has globals
   of its own, so `def init(): global model; model = load()` would reach no other function (`decode_initializer`).
5. `functools.cached_property` has a lock (up to Python 3.11) and `functools.singledispatch` a table of weak references,
   which cannot be sent: both are made anew on the other side.
6. A class keeps its `__slots__` and its `__qualname__`. cloudpickle's copy has a `__dict__` in place of the ones, so
   that instances of it do not load where the class has none: at home; and of the other, which its repr shows, the end.
7. Code keeps the name of its file (cloudpickle from 3.1.3 on leaves it out): a remote traceback shows the user's lines.
8. An `Enum` keeps its aliases and what its `__init__` or `__new__` gave to its members. cloudpickle makes the members
   again, of their values alone and before the class has those methods.
9. A class of `__main__` is found by its name in workers, so that its instances can be pickled there by other means.
10. `NewType`, `ParamSpec`, `TypeVarTuple` and `type X = ...`, which would go by name, are made anew on the other side.
11. A class that `everywhere` has defined on both sides is the receiver's own, found by its name (`share_class`).
"""

from __future__ import annotations

import builtins
import enum
import functools
import pickle
import sys
import types
import typing
import weakref
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from typing import Any

import cloudpickle
from cloudpickle import cloudpickle as internals

__all__ = ["ByValuePickler", "decode_initializer", "is_numbered", "running_texts", "share_class"]

#: Classes which this process did not define but built from a message. Process-wide like cloudpickle's own numbering.
_foreign: weakref.WeakSet[type] = weakref.WeakSet()

#: Whether some of them are of modules that are not loaded: the C pickler would import those.
strangers = False

#: For each source text of `everywhere` that is running here: shares the classes that it has defined so far.
running_texts: list[Callable[[], None]] = []
_SHARED = "distpool:"

_classes_by_id: Any = getattr(internals, "_DYNAMIC_CLASS_TRACKER_BY_ID", {})
_ids_by_class: Any = getattr(internals, "_DYNAMIC_CLASS_TRACKER_BY_CLASS", {})


_Cached = functools._lru_cache_wrapper
#: What every function of `singledispatch` runs.
_DISPATCHED = functools.singledispatch(print).__code__  # type: ignore[attr-defined]

#: What initializers left here: name of a module (of their globals) -> name -> value; attributes that they gave to
#: functions, by the name of the module and that of the function; classes that they changed.
_left: dict[str, dict[str, Any]] = {}
_left_attributes: dict[tuple[str | None, str], dict[str, Any]] = {}
_left_classes: list[type] = []

#: A global of such a kind that an initializer did not assign is as the caller has it: it cannot have changed, or (code)
#: the caller's is what has to run.
_FIXED = frozenset(
    (int, float, complex, bool, str, bytes, type(None), tuple, frozenset, range, _Cached)
    + (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)
)  # fmt: skip


class ByValuePickler(cloudpickle.Pickler):  # type: ignore[misc]
    """One message; `reducers` and `peer` as in `codec.register_reducer`, `special`: `codec.Special`."""

    def __init__(
        self,
        file: BytesIO,
        callback: Callable[[Any], Any] | None,
        reducers: dict[type, Callable[[Any, Any], tuple[Any, ...]]],
        peer: Any,
        seen: list[Any] | None,
        special: Any,
    ) -> None:
        super().__init__(file, protocol=5, buffer_callback=callback)
        self._special = special
        self._reducers = reducers
        self._peer = peer
        self._seen = seen

    def reducer_override(self, obj: Any) -> Any:
        """Called by the C pickler for every object that is not a plain builtin value."""
        kind = type(obj)
        reduce_fn = self._reducers.get(kind)
        if reduce_fn is not None:
            reduced = reduce_fn(obj, self._peer)
            if self._seen is not None:
                self._seen.append(getattr(reduced, "token", obj))  # see `codec.Reduced`
            return reduced
        if kind is types.FunctionType:
            if obj.__module__ == "__mp_main__":
                reduced = self._dynamic_function_reduce(obj)
            else:
                reduced = super().reducer_override(obj)
            if obj.__code__ is _DISPATCHED and reduced is not NotImplemented:
                return build_dispatched, (), dict(vars(obj)["registry"]), None, None, set_dispatched
            return _by_value_function(obj, reduced)
        if kind is types.CodeType:
            return _by_value_code(obj, internals._code_reduce(obj))
        if kind is _Cached and (obj.__module__ == "__mp_main__" or internals._lookup_module_and_qualname(obj) is None):
            return build_cached, (obj.__wrapped__, obj.cache_parameters())
        if kind is functools.cached_property:
            return build_cached_property, (obj.func, obj.attrname)
        if kind in self._special:
            return self._special[kind](obj)
        if kind is functools.singledispatchmethod:
            return build_dispatched_method, (obj.func, obj.dispatcher)
        if kind in _HINTS:
            return _by_value_hint(obj)
        if issubclass(kind, type):
            if running_texts and obj.__module__ in ("__main__", "__mp_main__"):
                _share_what_runs()  # before it gets a number of this process's own
            reduced = super().reducer_override(obj)
            if reduced is NotImplemented and obj.__module__ == "__mp_main__":
                reduced = internals._dynamic_class_reduce(obj)
            return _by_value_class(obj, reduced)
        return NotImplemented


#: What annotations name, and what it is made of: attributes that are arguments, and such that are options.
_HINTS: dict[Any, tuple[tuple[str, ...], tuple[str, ...]]] = {
    typing.NewType: (("__name__", "__supertype__"), ()),
    typing.ParamSpec: (("__name__",), ("__bound__", "__covariant__", "__contravariant__")),
    typing.TypeVarTuple: (("__name__",), ()),
}
if hasattr(typing, "TypeAliasType"):  # from Python 3.12 on
    _HINTS[typing.TypeAliasType] = ("__name__", "__value__"), ("__type_params__",)


def _by_value_hint(hint: Any) -> Any:
    if hint.__module__ != "__mp_main__" and internals._lookup_module_and_qualname(hint, hint.__name__) is not None:
        return NotImplemented
    arguments, options = _HINTS[type(hint)]
    given = {name.strip("_"): getattr(hint, name) for name in options}
    return build_hint, (type(hint), [getattr(hint, name) for name in arguments], given, hint.__module__)


def build_hint(kind: Any, arguments: list[Any], options: dict[str, Any], module: str) -> Any:
    """Receiving side: a new one."""
    made = kind(*arguments, **options)
    with suppress(AttributeError):  # an alias says by itself where it is from
        made.__module__ = module
    return made


def _by_value_function(function: types.FunctionType, reduced: Any) -> Any:
    """cloudpickle's way of rebuilding a function, with our builder and setter in front."""
    if type(reduced) is not tuple or len(reduced) != 6:
        return reduced
    _, args, state, _, _, set_state = reduced
    names = internals._extract_code_globals(function.__code__)
    unknown = any(name not in function.__globals__ and not hasattr(builtins, name) for name in names)
    return build_function, (unknown, *args), (set_state, state), None, None, set_function_state


def _by_value_code(code: types.CodeType, reduced: Any) -> Any:
    """cloudpickle's way of rebuilding code, and the name of its file where that does not give it."""
    build, args = reduced
    if any(type(arg) is str and arg == code.co_filename for arg in args):  # `in` would compare it with bytes (-bb)
        return reduced
    return build_code, (build, args, code.co_filename)


def build_code(build: Callable[..., types.CodeType], args: tuple[Any, ...], filename: str) -> types.CodeType:
    """Receiving side: code as it was at home. Code inside it comes through here by itself."""
    return build(*args).replace(co_filename=filename)


class _NamesOfMain(dict[str, Any]):
    """Builtins of a function which may use names of the `__main__` that it will run in. The interpreter looks a global
    name up in the function's globals, then here; slower than plain builtins, so only for functions that need it."""

    def __missing__(self, name: str) -> Any:
        return vars(sys.modules["__main__"])[name]


def build_function(
    unknown: bool, code: types.CodeType, namespace: dict[str, Any], name: Any, defaults: Any, closure: Any
) -> types.FunctionType:
    """Receiving side: the function; if it has unknown names, they are those of `__main__` here at the time of the call.

    Functions of one message share their globals, and a function takes its builtins from there when it is made: also
    those that it defines when it runs. Hence such builtins stay once a function of the message has asked for them.
    """
    found = namespace.get("__builtins__")
    shared = found if type(found) is _NamesOfMain else None
    if unknown and shared is None:
        shared = _NamesOfMain(vars(builtins))
    namespace["__builtins__"] = shared if unknown else vars(builtins)
    function = types.FunctionType(code, namespace, name, defaults, closure)
    if shared is not None:
        namespace["__builtins__"] = shared
    return function


def set_function_state(function: types.FunctionType, packed: tuple[Callable[[Any, Any], Any], Any]) -> None:
    """Receiving side: fill the function in; cloudpickle also resets the builtins, which `build_function` has set.

    Globals that belong to this process since an initializer ran are this process's.
    """
    set_state, state = packed
    namespace = function.__globals__
    kept = namespace["__builtins__"]
    set_state(function, state)
    namespace["__builtins__"] = kept
    left = _left.get(namespace.get("__name__", "")) if _left else None
    if left:
        namespace.update((name, left[name]) for name in left.keys() & namespace.keys())
    if _left_attributes:
        function.__dict__.update(_left_attributes.get((function.__module__, function.__qualname__), {}))


def build_cached(function: Callable[..., Any], parameters: dict[str, Any]) -> Callable[..., Any]:
    """Receiving side: a function under `functools.lru_cache`, its cache empty."""
    cached: Callable[..., Any] = functools.lru_cache(**parameters)(function)
    return cached


def build_dispatched() -> Callable[..., Any]:
    """Receiving side: a function of `functools.singledispatch`, without implementations yet: they may refer to it."""
    return functools.singledispatch(print)


def set_dispatched(function: Any, registry: dict[type, Callable[..., Any]]) -> None:
    """Receiving side: its implementations; that for `object` is what was decorated."""
    for kind, implementation in registry.items():
        function.register(kind, implementation)
    functools.update_wrapper(function, registry[object])


def build_dispatched_method(function: Callable[..., Any], dispatcher: Any) -> Any:
    """Receiving side: a method of `functools.singledispatchmethod`."""
    made = functools.singledispatchmethod(function)
    made.dispatcher = dispatcher
    return made


def build_cached_property(function: Callable[[Any], Any], name: str | None) -> functools.cached_property[Any]:
    """Receiving side: the property, as if its class had been made here."""
    made: functools.cached_property[Any] = functools.cached_property(function)
    if name is not None:
        made.__set_name__(type, name)
    return made


def _by_value_class(cls: type, reduced: Any) -> Any:
    """cloudpickle's way of rebuilding a class, with our builder and setter in front."""
    if type(reduced) is not tuple or len(reduced) != 6:
        return reduced
    build, args, state, _, _, set_state = reduced
    slots = vars(cls).get("__slots__")
    if build is internals._make_skeleton_class and cls.__qualname__ != cls.__name__:
        metaclass, name, bases, names, *rest = args
        args = metaclass, name, bases, {**names, "__qualname__": cls.__qualname__}, *rest
    # A named tuple has empty ones by itself, and its metaclass wants no others.
    if slots is not None and build is internals._make_skeleton_class and not (issubclass(cls, tuple) and not slots):
        metaclass, name, bases, names, *rest = args
        args = metaclass, name, bases, {**names, "__slots__": slots}, *rest
        own = types.MemberDescriptorType  # private names, which cloudpickle overlooks
        state = {key: value for key, value in state[0].items() if type(value) is not own}, *state[1:]
    if build is internals._make_skeleton_enum:
        build, args, state, set_state = _by_value_enum(cls, args, state, set_state) or (build, args, state, set_state)
    return build_class, (build, args), (set_state, state), None, None, set_class_state


#: Attributes that every member of an enumeration is given.
_MEMBER = frozenset(("_value_", "_name_", "__objclass__", "_sort_order_"))
#: Builtins that members may be at the same time, made again by what their `__getnewargs__` says.
_PLAIN: tuple[Any, ...] = (int, str, float, bytes, tuple, complex)


def _by_value_enum(cls: Any, args: tuple[Any, ...], state: tuple[Any, Any], set_state: Any) -> tuple[Any, ...] | None:
    """Builder, its arguments, state, setter; None if cloudpickle's way loses nothing, or there is no other."""
    members: dict[str, Any] = dict(cls.__members__)
    bases, name, qualname, _, module, *rest = args
    kinds = [kind for kind in cls.__mro__[:-1] if not kind.__flags__ & _HEAP_TYPE]
    plain: Any = kinds[-1] if kinds else object
    if (
        (plain is not object and plain not in _PLAIN)
        or any(vars(kind).get("__slots__") for kind in cls.__mro__)
        or (
            list(members) == [member.name for member in cls]
            and all(vars(member).keys() <= _MEMBER for member in members.values())
            and "__new_member__" not in vars(cls)
            and type(cls) is type(bases[-1])
        )
    ):
        return None
    made = []
    for key, member in members.items():
        made.append((key, member._value_, plain.__getnewargs__(member) if plain is not object else ()))
    attributes = {
        key: {name: value for name, value in vars(member).items() if name not in _MEMBER}
        for key, member in members.items()
    }
    boundary = getattr(cls, "_boundary_", None)
    rest_of_state = {key: value for key, value in state[0].items() if key not in members}, *state[1:]
    built = type(cls), plain, bases, name, qualname, made, boundary, module, *rest
    return build_enum, built, (set_state, attributes, rest_of_state), set_enum_state


_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE


def build_enum(
    metaclass: Any,
    plain: Any,
    bases: tuple[type, ...],
    name: str,
    qualname: str,
    members: list[tuple[str, Any, tuple[Any, ...]]],
    boundary: Any,
    module: str,
    number: str,
    extra: Any,
) -> type:
    """Receiving side: an enumeration whose members are as they were at home, but for their attributes."""
    waiting = iter(members)

    def make(cls: Any, *args: Any) -> Any:
        _, value, data = next(waiting)
        member = plain.__new__(cls, *data)
        member._value_ = value
        return member

    names = metaclass.__prepare__(name, bases)
    names["__new__"], names["__init__"] = make, lambda self, *args: None
    for key, value, _ in members:
        names[key] = enum.member(value)
    made = metaclass.__new__(metaclass, name, bases, names, **({} if boundary is None else {"boundary": boundary}))
    for temporary in ("__init__", "__new_member__"):
        if temporary in vars(made):
            type.__delattr__(made, temporary)
    made.__module__, made.__qualname__ = module, qualname
    tracked: type = internals._lookup_class_or_track(number, made)
    return tracked


def set_enum_state(cls: Any, packed: tuple[Callable[[type, Any], Any], dict[str, dict[str, Any]], Any]) -> None:
    """Receiving side: methods, and attributes of the members."""
    set_state, attributes, state = packed
    set_state(cls, state)
    for key, values in attributes.items():
        vars(cls.__members__[key]).update(values)


def build_class(build: Callable[..., type], args: tuple[Any, ...]) -> type:
    """Receiving side: the class of that number if this process has it, else a new one, which is marked as foreign."""
    global strangers
    number = next((part for part in args[-2:] if isinstance(part, str)), "")
    if running_texts and number.startswith(_SHARED):
        _share_what_runs()
    known = _classes_by_id.get(number)
    if known is not None:
        found: type = known
        return found
    made = build(*args)
    _foreign.add(made)
    if made.__module__ not in sys.modules:
        strangers = True
    if made.__module__ == "__main__" and getattr(sys.modules.get("distpool.wire.codec"), "classes_in_main", False):
        _name_in_main(made)
    return made


def _name_in_main(cls: type) -> None:
    """On a worker: who pickles an instance there by other means (a Manager's queue, shelve) writes down where its class
    is to be found; at home that is so. What is there already stays, unless it is an older definition of this kind."""
    names = vars(sys.modules["__main__"])
    found = names.get(cls.__name__)
    if cls.__qualname__ == cls.__name__ and (found is None or (isinstance(found, type) and found in _foreign)):
        names[cls.__name__] = cls


def set_class_state(cls: type, packed: tuple[Callable[[type, Any], Any], Any]) -> None:
    """Receiving side: fill the class in, or bring it up to date; never a class of this process's own."""
    set_state, state = packed
    if cls in _foreign:
        # What is replaced ends when the class is whole again: with an old `__del__` go the globals of its message, and
        # in them perhaps an instance of this class, whose end then looks for `__del__` (3.11 crashes).
        was = list(vars(cls).values())
        set_state(cls, state)
        del was


class _Noting(pickle.Unpickler):
    """Of one message: what `build_function` and `build_class` make for it, and the globals of those functions. Not for
    what other threads decode meanwhile: an initializer may take long to load."""

    def __init__(self, data: Any, buffers: Any) -> None:
        super().__init__(BytesIO(data), buffers=buffers)
        self.made: list[Any] = []

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        return self._function if found is build_function else self._class if found is build_class else found

    def _function(
        self, unknown: bool, code: types.CodeType, namespace: dict[str, Any], *rest: Any
    ) -> types.FunctionType:
        if not any(made is namespace for made in self.made):
            self.made.append(namespace)
        function = build_function(unknown, code, namespace, *rest)
        self.made.append(function)
        return function

    def _class(self, build: Callable[..., type], args: tuple[Any, ...]) -> type:
        made = build_class(build, args)
        if made in _foreign:
            self.made.append(made)
        return made


def decode_initializer(data: Any, buffers: Any, references: Any) -> tuple[Any, Any, Callable[[], None]]:
    """Receiving side: an initializer, its arguments, and what to call when it has returned. Before any other call.

    The globals that it has then assigned, and those that it used and may have changed, are what functions of the same
    module find that come later. `references`: types of values that are the same everywhere.
    """
    unpickler = _Noting(data, buffers)
    function, arguments = unpickler.load()
    before = [(made, _names_of(made)) for made in unpickler.made]
    return function, arguments, lambda: _leave(before, references)


def _names_of(made: Any) -> dict[str, Any]:
    """Of a function or class: its attributes. Else it is a namespace."""
    return dict(made if type(made) is dict else vars(made))


def _leave(before: list[tuple[Any, dict[str, Any]]], references: Any) -> None:
    for made, was in before:
        now = _names_of(made)
        assigned = {name for name, value in now.items() if was.get(name, was) is not value}
        if isinstance(made, type):
            if assigned:  # the definition that comes with the next message must not set it back
                _left_classes.append(made)
                _foreign.discard(made)
            continue
        if isinstance(made, types.FunctionType):  # `def init(q): f.q = q`, and f finds it there
            if assigned:
                _left_attributes[made.__module__, made.__qualname__] = {name: now[name] for name in assigned}
            continue
        left = {
            name: value
            for name, value in now.items()
            if not name.startswith("__") and (name in assigned or _may_have_changed(value, references))
        }
        module = now.get("__name__", "")
        _left.setdefault(module, {}).update(left)
        if module in ("__main__", "__mp_main__"):  # where names are looked up that the sender does not have
            vars(sys.modules["__main__"]).update(left)


def _may_have_changed(value: Any, references: Any) -> bool:
    kind = type(value)
    return not (kind in _FIXED or issubclass(kind, type) or kind in references)


def share_class(cls: type, key: str) -> None:
    """Declare that every process has its own definition of this class under `key` (what `everywhere` defined), and of
    the classes that were defined in it.

    An instance that arrives is then one of the receiver's class; a process without it builds it from the message.
    """
    number = f"{_SHARED}{key}"
    _ids_by_class[cls] = number
    _classes_by_id[number] = cls
    _foreign.discard(cls)
    for name, inner in list(vars(cls).items()):
        if issubclass(type(inner), type) and inner.__qualname__ == f"{cls.__qualname__}.{name}":
            share_class(inner, f"{key}.{name}")


def is_numbered(cls: type) -> bool:
    """Whether other processes may know this class already: it is shared, has been sent, or has come from elsewhere."""
    return cls in _ids_by_class


def _share_what_runs() -> None:
    for share in running_texts[:]:
        share()
