"""User objects <-> bytes and buffers (layer 1, no I/O, no threads, no state of its own but the table of reducers).

    encode(obj, peer)   ->  (pickle bytes, [large buffers, not copied])      the caller stages or sends them
    decode(data, buffers) ->  obj                                            raises what the user's code raises

Runs in the thread that makes the call (encode) or that runs the task or wants the value (decode); never on the I/O
thread, because both run user code. Everything is pickle protocol 5. The C pickler goes first; cloudpickle (module
`byvalue`, imported on first need because it costs as much as the rest of distpool) only takes over where the C pickler
gives up or where it wrote down a name of `__main__`, which means something else in every other process.

Rejected: one pickler for all messages of a peer (its memo would alias arguments of different calls and keep them
alive); cloudpickle always (3-10 times dearer, and most values never need it).
"""

from __future__ import annotations

import copyreg
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from io import BytesIO
from types import ModuleType

from distpool.config import OUT_OF_BAND
from distpool.errors import SerializationError, as_both, cause_of, name_of, names_of, text_of
from distpool.hints import Any

__all__ = [
    "Buffers", "decode", "decode_args", "encode", "encode_args", "encode_chunk", "register_reducer",
    "unregister_reducer",
]  # fmt: skip

Buffers = Sequence[Any]
"""Objects with the buffer protocol, each contiguous bytes."""

Reducer = Callable[[Any, Any], tuple[Any, ...]]
"""`reduce_fn(obj, peer)`: what `obj.__reduce__()` would give, for a message that goes to `peer`."""

PROTOCOL = 5

#: Exact types that pickle can never get wrong: no user code, no name, no reference.
SCALARS = frozenset((int, float, complex, str, bytes, bool, type(None)))

#: Occurs in both `__main__` and `__mp_main__` (the main module of a child of `multiprocessing`).
_MAIN = b"_main__"

#: Occurs in whatever has references in it: it names the modules that make them.
REFERENCES = b"distpool.refs."

#: What the C pickler raises for objects it has no way for. Anything else comes from the user's own `__reduce__` and
#: would only be raised again, after its side effects ran twice; so would MemoryError and RecursionError.
_TRY_BY_VALUE = (pickle.PicklingError, TypeError, AttributeError, NotImplementedError)


class Reduced(tuple[Any, ...]):
    """What a reducer gives, with what `seen` gets in place of the object."""

    token: Any

    @classmethod
    def of(cls, reduced: tuple[Any, ...], token: Any) -> Reduced:
        """`reduced`, and what it was made of."""
        made = cls(reduced)
        made.token = token
        return made


#: Whether classes of another `__main__` are known by their names here: in workers (see `byvalue.build_class`).
classes_in_main = False

#: type -> reducer. Filled when modules above this one are imported; only read afterwards.
_reducers: dict[type, Reducer] = {}

_dumps = pickle.dumps
_loads = pickle.loads


def register_reducer(type_: type, reduce_fn: Reducer) -> None:
    """Let objects of exactly `type_` be reduced by `reduce_fn(obj, peer)` in messages of distpool.

    Elsewhere (`pickle.dumps` by the user) their own `__reduce__` counts. `reduce_fn` may be called twice for one
    message, and for a message that fails later on, so it must have no effect: act on `encode(seen=...)` afterwards.
    What the object is like then may differ from what was written: `Reduced` tells `seen` what that was.

    Example: `register_reducer(Future, lambda ref, peer: (rebuild, (ref.rrid, peer)))`
    """
    _reducers[type_] = reduce_fn


def unregister_reducer(type_: type) -> None:
    """Undo `register_reducer`; types that are not registered are ignored."""
    _reducers.pop(type_, None)


def encode(obj: Any, peer: Any = None, seen: list[Any] | None = None, what: str = "") -> tuple[bytes, list[memoryview]]:
    """The pickle of `obj` for a message to `peer`, and its large buffers as flat views of the object's own memory.

    `seen` gets every object that a registered reducer took, or its token (a message that carries references must say
    so). `what` names the object in the error's text, e.g. "the result of f on worker 3". Raises SerializationError,
    whose `__cause__` is the original error; nothing else except KeyboardInterrupt.

    Example: `data, buffers = encode({"a": array})`
    """
    buffers: list[memoryview] = []
    try:
        if type(obj) in SCALARS:
            return _dumps(obj, PROTOCOL), buffers
        return dump(obj, peer, seen, buffers), buffers
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also SystemExit of a user's __reduce__: it must not end this process
        raise serialization_error(obj, error, what) from error


def encode_args(
    args: tuple[Any, ...], kwargs: dict[str, Any], peer: Any = None, seen: list[Any] | None = None
) -> tuple[bytes, list[memoryview]]:
    """`encode` for the arguments of one call; `decode_args` gives them back. The error names the argument.

    Example: `decode_args(*encode_args((1, 2), {"key": 3})) == ((1, 2), {"key": 3})`
    """
    buffers: list[memoryview] = []
    try:
        if not kwargs:
            for value in args:  # as a loop: half the time of SCALARS.issuperset(map(type, args))
                if type(value) not in SCALARS:
                    return dump(args, peer, seen, buffers), buffers
            return _dumps(args, PROTOCOL), buffers
        # A list, so that decode_args can tell it from arguments alone without a pair round every call.
        return dump([args, kwargs], peer, seen, buffers), buffers
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        what, culprit, cause = _find_argument(args, kwargs, error)
        raise _argument_error(culprit, cause, what) from cause


def encode_chunk(chunk: list[Any], single: bool, seen: list[Any] | None = None) -> tuple[bytes, list[memoryview]]:
    """`encode` for the elements of a chunk: arguments alone (`single`), or tuples of them. The error names one.

    Example: `decode(*encode_chunk([(1, 2), (3, 4)], single=False)) == [(1, 2), (3, 4)]`
    """
    try:
        return encode(chunk, None, seen)
    except SerializationError as error:
        cause: BaseException = error.__cause__ or error
        for number, element in enumerate(chunk, 1):
            args = (element,) if single else element
            what, culprit, again = _find_argument(args, {}, cause)
            if culprit is not args:
                what = f"{what} of element {number} of a chunk of {len(chunk)}"
                raise _argument_error(culprit, again, what) from again
        raise


def decode(data: Any, buffers: Buffers = ()) -> Any:
    """The object that `encode` was given. Arrays keep `buffers` alive and are writable if those are.

    Raises whatever loading it raises (ImportError, AttributeError, errors of the user's `__setstate__`, ...): the
    caller knows whose call it was and maps it.
    """
    return _loads(data, buffers=buffers)


def decode_initializer(data: bytes, buffers: Buffers = ()) -> tuple[Any, Any, Callable[[], None]]:
    """An initializer, its arguments, and what to call when it has returned (see `byvalue.decode_initializer`)."""
    if b"distpool.wire.byvalue" not in data:  # by reference: the globals of its module last by themselves
        return (*_loads(data, buffers=buffers), lambda: None)
    from distpool.wire import byvalue

    return byvalue.decode_initializer(data, buffers, _reducers)


def decode_args(data: Any, buffers: Buffers = ()) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`(args, kwargs)` of `encode_args`; raises like `decode`."""
    loaded = _loads(data, buffers=buffers)
    if type(loaded) is tuple:
        return loaded, {}
    args, kwargs = loaded
    return args, kwargs


def dump(
    obj: Any, peer: Any, seen: list[Any] | None, buffers: list[memoryview] | None, special: Special | None = None
) -> bytes:
    """The pickle of `obj`, by the cheapest pickler that does it right; with `buffers=None` all in band. `special`:
    default `special_types()`.

    Raises what the pickler or the user's code raises.
    """
    special = special_types() if special is None else special
    if not (_strangers() or by_value_modules()):
        start = len(seen) if seen is not None else 0
        try:
            data = _dump_by_reference(obj, peer, seen, buffers, special)
        except _TRY_BY_VALUE as error:
            # Deep recursion may surface as a PicklingError of our own reducers; there is no second try for it.
            if isinstance(cause_of(error), RecursionError):
                raise
        else:
            if _MAIN not in data:
                return data
        if seen is not None:
            del seen[start:]
        if buffers is not None:
            buffers.clear()
    return dump_by_value(obj, peer, seen, buffers, special)


def dump_by_value(
    obj: Any, peer: Any, seen: list[Any] | None, buffers: list[memoryview] | None, special: Special | None = None
) -> bytes:
    """The pickle of `obj` by cloudpickle: what other processes cannot import travels by value. `special`: that of a
    first try."""
    from distpool.wire.byvalue import ByValuePickler

    file = BytesIO()
    special = special_types() if special is None else special
    kind = _socket_type()
    if kind is not None:  # here and not in `special_types`: a microsecond for each message
        special.setdefault(kind, Descriptors(_reduce_socket).reduce)
    ByValuePickler(file, _callback(buffers), _reducers, peer, seen, special).dump(obj)
    return file.getvalue()


class Descriptors:
    """Ends of a `multiprocessing.Pipe`, or sockets, in one message. They are sent as those of multiprocessing are: its
    resource sharer passes the descriptor on, between processes of one machine. Plain pickle writes down the number of a
    pipe's; the receiver would read, write and close whatever of its own has that number, such as the link to its
    master. (A socket it refuses.)

    Each is lent once, if a second pickler follows the first one as well: a descriptor that nobody fetches stays open,
    and who waits for the end of the pipe waits for ever.
    """

    def __init__(self, reduce_fn: Callable[[Any], Any]) -> None:
        self._reduce_fn = reduce_fn
        self._made: dict[int, tuple[Any, tuple[Any, ...]]] = {}  # by id; the first of the pair keeps that taken

    def reduce(self, obj: Any) -> tuple[Any, ...]:
        """For a pickler's table of reducers."""
        made = self._made.get(id(obj))
        if made is None:
            made = self._made[id(obj)] = obj, (receive_descriptor, self._reduce_fn(obj))
        return made[1]


Special = dict[type, Callable[[Any], tuple[Any, ...]]]


def special_types(descriptors: bool = True) -> Special:
    """What is reduced in our way in a new message: types of modules that are loaded here, else nobody can have one.
    Without `descriptors`, ends of pipes and sockets are left out of a pickle that nobody will receive."""
    special: Special = {}
    module: Any = sys.modules.get("multiprocessing.connection")
    reduce_fn = getattr(module, "reduce_connection", None)  # None also while the module is being loaded
    if reduce_fn is not None:
        special[module.Connection] = Descriptors(reduce_fn).reduce if descriptors else _left_out
    if not descriptors and (kind := _socket_type()) is not None:
        special[kind] = _left_out
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        array = getattr(numpy, "ndarray", None)
        if array is not None and array not in copyreg.dispatch_table:
            special[array] = reduce_array
    return special


def reduce_array(array: Any) -> Any:
    """A numpy array, which arrives as a copy that may be written to, as from a process pool of the standard library.

    numpy's own way says that the memory is read-only, if it is so here, and the unpickler makes the copy read-only as
    well. So the pickler gets the same memory as plain bytes that may be written to, which nobody does: they are staged
    or sent. (Tried: `ctypes`, which makes a type for each size, 20 us; pickling once more when the callback has seen
    such a buffer, which runs the user's `__reduce__` twice.) Subclasses, objects and what is not contiguous are copied
    into the pickle by numpy, and are not the business of this.
    """
    reduced = array.__reduce_ex__(PROTOCOL)
    if not array.flags.writeable and type(reduced[1][0]) is pickle.PickleBuffer:
        build, (buffer, *rest) = reduced
        return build, (pickle.PickleBuffer(sys.modules["numpy"].asarray(_Memory(array, buffer))), *rest)
    return reduced


class _Memory:
    """That of a contiguous array, for numpy: flat, and as if it could be written to. Lives as long as what is made of
    it, and keeps the array's buffer."""

    def __init__(self, array: Any, buffer: pickle.PickleBuffer) -> None:
        self._buffer = buffer
        data = array.__array_interface__["data"][0], False
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (array.nbytes,), "data": data}


def _left_out(obj: Any) -> tuple[Any, ...]:
    return int, ()


def _socket_type() -> Any:
    """None where nobody can have one: the module is not loaded, or is just being loaded."""
    return getattr(sys.modules.get("socket"), "socket", None)


def _reduce_socket(sock: Any) -> tuple[Any, ...]:
    """As multiprocessing does it, and with its time-out: whether reads and writes block belongs to the descriptor,
    which both sides share, and what to do then to the object."""
    import multiprocessing.resource_sharer

    sharer: Any = multiprocessing.resource_sharer
    lent = sharer.DupSocket(sock) if sys.platform == "win32" else sharer.DupFd(sock.fileno())
    return _build_socket, (type(sock), lent, (sock.family, sock.type, sock.proto), sock.gettimeout())


def _build_socket(kind: Any, lent: Any, what: tuple[Any, ...], timeout: float | None) -> Any:
    made = lent.detach()
    if type(made) is int:
        made = kind(*what, made)
    made.settimeout(timeout)
    return made


def receive_descriptor(build: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Receiving side: the connection or socket. ValueError: somebody else has taken it, or its sender is gone, or on
    another machine."""
    try:
        return build(*args)
    except (EOFError, OSError) as error:
        raise ValueError(
            "a multiprocessing Connection or a socket can be received once, while its sender lives, and on its machine"
        ) from error


#: Modules that travel by value until their import has ended.
_unfinished: list[ModuleType] = []


def is_unfinished(module: Any) -> bool:
    """Whether the import of `module` is under way, or it is none that can be imported (`runpy.run_path`)."""
    spec = getattr(module, "__spec__", None)
    if spec is None:
        return sys.modules.get(module.__name__) is module
    return bool(getattr(spec, "_initializing", False))


def by_value_until_imported(module: ModuleType) -> None:
    """`module` makes calls while it is imported. A process that imported it to run them would make the same calls,
    whose workers would make them again: so what it defines travels by value until it is there."""
    import cloudpickle

    if module.__name__ not in cloudpickle.list_registry_pickle_by_value():
        cloudpickle.register_pickle_by_value(module)
        _unfinished.append(module)


#: cloudpickle's own set of them, once that is loaded.
_registry: Any = None


def by_value_modules() -> Any:
    """Modules that the user gave to `cloudpickle.register_pickle_by_value`, or that are being imported: the C pickler
    does not know of them."""
    global _registry
    if _unfinished:
        _look_again()
    if _registry is None:
        cloudpickle = sys.modules.get("cloudpickle.cloudpickle")
        if cloudpickle is not None:
            _registry = getattr(cloudpickle, "_PICKLE_BY_VALUE_MODULES", None)
    return _registry


def _look_again() -> None:
    for module in _unfinished[:]:
        if not is_unfinished(module):
            with suppress(ValueError):  # another thread was quicker
                _unfinished.remove(module)
                sys.modules["cloudpickle"].unregister_pickle_by_value(module)


def _strangers() -> Any:
    byvalue = sys.modules.get("distpool.wire.byvalue")
    return byvalue is not None and getattr(byvalue, "strangers", False)


def _dump_by_reference(
    obj: Any, peer: Any, seen: list[Any] | None, buffers: list[memoryview] | None, special: Special
) -> bytes:
    file = BytesIO()
    pickler = pickle.Pickler(file, PROTOCOL, buffer_callback=_callback(buffers))
    # A dict, although a mapping of our own could be kept for all messages: the pickler asks it for every object.
    table: dict[type, Any] = dict(copyreg.dispatch_table)
    for type_, reduce_fn in _reducers.items():
        table[type_] = partial(reduce_for_peer, reduce_fn, peer, seen)
    table.update(special)
    pickler.dispatch_table = table
    pickler.dump(obj)
    return file.getvalue()


def reduce_for_peer(reduce_fn: Reducer, peer: Any, seen: list[Any] | None, obj: Any) -> tuple[Any, ...]:
    """Reduce a library object and note it down."""
    reduced = reduce_fn(obj, peer)
    if seen is not None:
        seen.append(getattr(reduced, "token", obj))
    return reduced


def _callback(buffers: list[memoryview] | None) -> Callable[[pickle.PickleBuffer], Any] | None:
    if buffers is None:
        return None

    def keep_in_band(buffer: pickle.PickleBuffer) -> bool:
        try:
            view = buffer.raw()
        except BufferError:
            return True  # not contiguous: the pickler says so in its own words
        if view.nbytes < OUT_OF_BAND:
            return True
        buffers.append(view)
        return False

    return keep_in_band


def _find_argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], error: BaseException
) -> tuple[str, Any, BaseException]:
    """Which argument failed: (its name, itself, its own error). Costs a second pickling, of a call that failed."""
    if not issubclass(type(error), MemoryError):
        for what, value in _named(args, kwargs):
            try:
                dump(value, None, None, None)
            except KeyboardInterrupt:
                raise
            except BaseException as again:  # also SystemExit of a user's __reduce__, as the first time
                return what, value, again
    return "the arguments", args, error


def _named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for position, value in enumerate(args, 1):
        yield f"argument {position}", value
    for name, value in kwargs.items():
        yield f"argument {name!r}", value


def _argument_error(obj: Any, cause: BaseException, what: str) -> BaseException:
    """As `serialization_error`; who passed the argument may also catch what the standard library would raise."""
    error = serialization_error(obj, cause, what)
    error.__cause__ = cause
    return as_both(error)


def about(error: BaseException, obj: Any, what: str) -> BaseException:
    """`error`, which `encode` raised for `obj`, as one that says what `obj` is."""
    cause = error.__cause__
    if type(error) is not SerializationError or cause is None:
        return error
    named = serialization_error(obj, cause, what)
    named.__cause__ = cause
    return named


def serialization_error(obj: Any, error: BaseException, what: str = "") -> SerializationError:
    """The SerializationError for `error`, which came up while `obj` was being serialised."""
    if issubclass(type(error), SerializationError):
        text = str(error)
    else:
        text = f"{name_of(error)}: {text_of(error)}"
    subject = f"{what}, {describe(obj)}," if what else describe(obj)
    return SerializationError(f"{subject} cannot be serialised: {text}")


def describe(obj: Any) -> str:
    """A short name of any object for messages: its type, and a repr that runs no code of the user's."""
    kind = type(obj)
    module, name = names_of(kind)
    if module not in ("builtins", "__main__", "__mp_main__", ""):
        name = f"{module}.{name}"
    if issubclass(kind, (tuple, list, dict, set, frozenset)):
        return f"a {name} of {len(obj)}" if kind.__len__ in _BUILTIN_LENGTHS else f"a {name}"
    if kind is int:
        return f"an {name}"  # its digits may be millions
    if any(kind is scalar for scalar in SCALARS):  # and not `in`: a type may have no hash
        shown = repr(obj[:60]) if isinstance(obj, (str, bytes)) else f"{obj!r:.60}"
        return f"{name} {shown}"
    qualname = getattr(obj, "__qualname__", None) if callable(obj) and module == "builtins" else None
    return f"{name} {qualname}" if isinstance(qualname, str) else f"an object of type {name}"


_BUILTIN_LENGTHS = frozenset((tuple.__len__, list.__len__, dict.__len__, set.__len__, frozenset.__len__))
