"""Functions <-> bytes, once per function and not once per call (layer 1).

    FunctionEncoder.encode(fn):
        importable?              by reference, cached by identity
        snapshot still fits?     the same as last time, cloudpickle is not asked (module `fingerprint`)
        otherwise                serialised now; equal bytes give the EncodedFunction that went out before

Runs in the threads that submit; several at once. No lock: each step is one operation on a dict, and two threads that
serialise the same function at the same time agree through `dict.setdefault`.
"""

from __future__ import annotations

import copyreg
import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, MethodDescriptorType, ModuleType

from distpool.errors import SerializationError
from distpool.hints import Any
from distpool.wire import codec
from distpool.wire.fingerprint import MAIN_MODULES, Snapshot, is_importable, take

__all__ = ["EncodedFunction", "FunctionEncoder", "decode_function"]

#: Functions that travel by value: so many, with so many bytes, are remembered for comparison (twice, see `_remember`).
MAX_FUNCTIONS = 256
MAX_BYTES = 64 << 20
MAX_KNOWN = 4096

#: `keep(view)`: a copy of the bytes, and the shared memory that it lies in (None: in none).
Keep = Callable[[memoryview], tuple[Any, Any]]

#: Numbers are unique in this process, whatever number of encoders (tests run several nodes in one process).
_numbers = itertools.count(1)


class EncodedFunction:
    """A serialised function. Equal numbers mean equal bytes, so a worker that has the number needs no bytes."""

    __slots__ = (
        *("__weakref__", "buffers", "by_value", "data", "leases", "mean", "name", "number", "origin", "references"),
        *("reusable", "size"),
    )

    def __init__(self, data: bytes, kept: list[tuple[Any, Any]], name: str, by_value: bool, reusable: bool) -> None:
        self.number = next(_numbers)
        self.data = data
        #: Copies: the caller's arrays may change after the call.
        self.buffers = [copy for copy, _ in kept]
        #: For each of them: shared memory that holds it (what `keep` gave), or None.
        self.leases = [lease for _, lease in kept]
        #: For messages and statistics, e.g. `math.sqrt`, `partial(f)`.
        self.name = name
        self.by_value = by_value
        #: Whether a worker may keep the decoded function for further calls: no call can change what it captured.
        #: If not, every call has to decode the (kept) bytes anew, or the second call finds the first one's traces.
        self.reusable = reusable
        #: Library objects inside it (`codec.register_reducer`). If there are any, every encoding is a new one.
        self.references: tuple[Any, ...] = ()
        self.size = len(data) + sum(map(len, self.buffers))
        #: Measured seconds per call, kept by the scheduler; -1.0: not known yet.
        self.mean = -1.0
        #: What this is a copy of, for one map (`FunctionEncoder.encode_for_map`): workers forget it when that is over.
        self.origin: EncodedFunction | None = None

    @property
    def timing(self) -> EncodedFunction:
        """Whose `mean` is kept."""
        return self.origin or self

    def renewed(self) -> EncodedFunction:
        """The same bytes under another number."""
        made = EncodedFunction(self.data, [], self.name, self.by_value, self.reusable)
        made.buffers, made.leases, made.size, made.origin = self.buffers, self.leases, self.size, self
        return made

    def __repr__(self) -> str:
        return f"<EncodedFunction {self.number} {self.name}, {self.size} bytes>"


class _Code:
    """What is known about functions with one code object."""

    __slots__ = ("code", "last", "misses", "skip")

    def __init__(self, code: CodeType) -> None:
        self.code = code  # keeps its id taken
        # A pair, set in one step: closures of one code in several threads would mix theirs.
        self.last: tuple[Snapshot, EncodedFunction] | None = None
        self.misses = 0
        self.skip = 0


class FunctionEncoder:
    """One per node. Functions which change (captured values, globals) are never stale; unchanged ones are cheap.

    `keep(view)` copies a large buffer: `(the copy, the shared memory that holds it or None)`.

    Example: `FunctionEncoder().encode(math.sqrt).data`
    """

    def __init__(self, keep: Keep = lambda view: (bytes(view), None)) -> None:
        self._keep = keep
        # id -> (the function, which keeps its id taken; its encoding)
        self._known: dict[int, tuple[Any, EncodedFunction]] = {}
        self._codes: dict[int, _Code] = {}
        self._young: dict[bytes, list[EncodedFunction]] = {}
        self._old: dict[bytes, list[EncodedFunction]] = {}
        self._young_bytes = 0

    def encode(self, fn: Any, peer: Any = None) -> EncodedFunction:
        """The serialised form of `fn` as it is now; raises SerializationError, TypeError if it is no callable."""
        known = self._known.get(id(fn))
        if known is not None and not codec.by_value_modules():
            return known[1]
        if type(fn) is FunctionType:
            entry = self._codes.get(id(fn.__code__))
            if entry is not None:
                last = entry.last
                if last is not None and last[0].fits(fn):
                    return last[1]
        return self._encode(fn, peer)

    def encode_for_map(self, fn: Any) -> EncodedFunction:
        """As `encode`, for all calls of one map. What such a call changes in the function is seen by those behind it on
        the same worker, as within a chunk of the standard library's pools, and by none of another map: equal bytes are
        not enough to be the same function there."""
        encoded = self.encode(fn)
        return encoded if encoded.reusable or encoded.references else encoded.renewed()

    def clear(self) -> None:
        """Forget all functions, and let go of what they capture."""
        self._known = {}
        self._codes = {}
        self._young, self._old, self._young_bytes = {}, {}, 0

    def _encode(self, fn: Any, peer: Any) -> EncodedFunction:
        if not callable(fn):
            raise TypeError(f"the function must be callable, not {type(fn).__name__}")
        _look_for_imports()
        if _by_reference(fn) and not codec.by_value_modules():
            encoded = self._remember(codec.encode(fn, peer)[0], [], fn, by_value=False, reusable=True)
            if len(self._known) >= MAX_KNOWN:
                self._known = {}
            self._known[id(fn)] = fn, encoded
            return encoded
        if type(fn) is not FunctionType:
            return self._encode_by_value(fn, peer, reusable=_is_frozen(fn))
        return self._encode_function(fn, peer)

    def _encode_function(self, fn: FunctionType, peer: Any) -> EncodedFunction:
        entry = self._codes.get(id(fn.__code__))
        if entry is None:
            if len(self._codes) >= MAX_KNOWN:
                self._codes = {}
            entry = self._codes[id(fn.__code__)] = _Code(fn.__code__)
        if entry.skip > 0:
            entry.skip -= 1
            return self._encode_by_value(fn, peer, reusable=False)
        # Taken before the function is serialised and asked again afterwards, so that it describes what was serialised.
        snapshot = take(fn)
        encoded = self._encode_by_value(fn, peer, reusable=snapshot is not None and snapshot.pure)
        if encoded.references:  # must not be kept: what they refer to would never be freed at its owner
            entry.last = None
            return encoded
        last = (snapshot, encoded) if snapshot is not None and snapshot.fits(fn) else None
        entry.misses += 1
        # A lambda of a loop captures another value each time: do not look closely at each one.
        entry.skip = min(1 << entry.misses, 64) if entry.misses > 3 or last is None else 0
        entry.last = last
        return encoded

    def _encode_by_value(self, fn: Any, peer: Any, reusable: bool) -> EncodedFunction:
        references: list[Any] = []
        buffers: list[memoryview] = []
        try:
            if type(fn) is FunctionType:  # the C pickler would only write its name down
                data = codec.dump_by_value(fn, peer, references, buffers)
            else:
                data = codec.dump(fn, peer, references, buffers)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise unsendable(fn, error) from error
        if references:
            encoded = EncodedFunction(data, list(map(self._keep, buffers)), function_name(fn), True, False)
            encoded.references = tuple(references)
            return encoded
        return self._remember(data, buffers, fn, by_value=True, reusable=reusable)

    def adopt(self, data: bytes, buffers: codec.Buffers, name: str, reusable: bool) -> EncodedFunction:
        """The function that another process serialised; the same bytes give the same one. Decodes nothing."""
        encoded = self._remember(data, [memoryview(part) for part in buffers], None, by_value=True, reusable=reusable)
        encoded.name = name
        return encoded

    def _remember(
        self, data: bytes, buffers: list[memoryview], fn: Any, *, by_value: bool, reusable: bool
    ) -> EncodedFunction:
        """The EncodedFunction of these bytes, a former one if there is one.

        Two generations instead of a list by last use: that would need a lock on the path of every call. When the young
        one is full it becomes the old one, and what is used again moves over.
        """
        variants = self._young.get(data)
        if variants is None:
            variants = self._young.setdefault(data, self._old.pop(data, []))
            self._young_bytes += sum(encoded.size for encoded in variants)
        for encoded in variants:
            if _same_buffers(encoded.buffers, buffers):
                encoded.reusable |= reusable
                return encoded
        encoded = EncodedFunction(data, list(map(self._keep, buffers)), function_name(fn), by_value, reusable)
        if len(variants) >= 4:
            del variants[0]
        variants.append(encoded)
        # A lost update of this counter (no lock) only moves the moment at which the generations change.
        self._young_bytes += encoded.size
        if len(self._young) > MAX_FUNCTIONS or self._young_bytes > MAX_BYTES:
            self._old, self._young, self._young_bytes = self._young, {}, 0
        return encoded


def unsendable(fn: Any, error: BaseException) -> SerializationError:
    """What to raise for a function that cannot be serialised, of which the pickler said `error`."""
    what, culprit, cause = _find_variable(fn, error)
    return codec.serialization_error(culprit, cause, what)


def _find_variable(fn: Any, error: BaseException, depth: int = 5) -> tuple[str, Any, BaseException]:
    """Which variable of the function failed: (its name, its value, its own error). Costs a second pickling, of a call
    that failed."""
    if type(fn) is FunctionType and not issubclass(type(error), RecursionError | MemoryError):
        for kind, name, value in _variables(fn):
            try:
                codec.dump(value, None, None, None)
            except KeyboardInterrupt:
                raise
            except BaseException as its_own:
                if depth and type(value) is FunctionType and value is not fn:
                    return _find_variable(value, its_own, depth - 1)
                return f"the {kind} {name!r} of the function {fn.__qualname__}", value, its_own
    return "the function", fn, error


def _variables(fn: FunctionType) -> Iterator[tuple[str, str, Any]]:
    """What travels with a function: (kind, name, value)."""
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        try:
            yield "captured variable", name, cell.cell_contents
        except ValueError:
            pass  # not assigned yet
    codes = [fn.__code__]
    for code in codes:
        for name in code.co_names:
            if name in fn.__globals__:
                yield "global variable", name, fn.__globals__[name]
        codes.extend(constant for constant in code.co_consts if type(constant) is CodeType)
    values, count = fn.__defaults__ or (), fn.__code__.co_argcount
    defaults = zip(fn.__code__.co_varnames[count - len(values) : count], values, strict=True)
    for name, value in (*defaults, *(fn.__kwdefaults__ or {}).items()):
        yield "default of", name, value
    for name, value in fn.__dict__.items():
        yield "attribute", name, value


def decode_function(data: Any, buffers: codec.Buffers = ()) -> Callable[..., Any]:
    """The function; raises what loading it raises, and SerializationError if it is not callable."""
    function = codec.decode(data, buffers)
    if not callable(function):
        raise SerializationError(f"{codec.describe(function)} arrived in place of a function")
    return function  # type: ignore[no-any-return]


def function_name(fn: Any) -> str:
    """A short name for messages: `math.sqrt`, `f` (of `__main__`), `partial(f)`, or the type of a callable object."""
    if type(fn) is partial:
        return f"partial({function_name(fn.func)})"
    name = getattr(fn, "__qualname__", None)
    if not isinstance(name, str):
        return type(fn).__qualname__
    module = getattr(fn, "__module__", None)
    return f"{module}.{name}" if isinstance(module, str) and module not in _PLAIN_MODULES else name


_PLAIN_MODULES = MAIN_MODULES | {"builtins"}


def _by_reference(fn: Any) -> bool:
    """Whether the pickle of `fn` is but a name, so that its identity decides."""
    kind = type(fn)
    if kind is BuiltinFunctionType:
        return (fn.__self__ is None or type(fn.__self__) is ModuleType) and is_importable(fn)
    if kind is MethodDescriptorType:  # str.upper
        return is_importable(fn.__objclass__)
    if not is_importable(fn):
        return False
    if kind is FunctionType or isinstance(fn, type):
        return True
    try:  # wrappers that pickle as their name: functools.lru_cache, numpy.sum
        reduce_fn = copyreg.dispatch_table.get(kind)
        return type(reduce_fn(fn) if reduce_fn else fn.__reduce_ex__(codec.PROTOCOL)) is str
    except Exception:  # the user's code; serialising it will say what is wrong
        return False


def _look_for_imports() -> None:
    """Let the modules whose import has come here travel by value: other processes cannot import them yet."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "<module>":
            name = frame.f_globals.get("__name__", "")
            module = sys.modules.get(name)
            if module is not None and name not in MAIN_MODULES and codec.is_unfinished(module):
                codec.by_value_until_imported(module)
        frame = frame.f_back


def _is_frozen(fn: Any) -> bool:
    """Whether a callable that is not a function captures nothing that a call of it could change."""
    if type(fn) is partial:
        values = (*fn.args, *fn.keywords.values())
        if not _by_reference(fn.func) or fn.__dict__:
            return False
        try:
            return codec.SCALARS.issuperset(map(type, values))
        except TypeError:  # a type without a hash; serialising it will say what is wrong
            return False
    owner = getattr(fn, "__self__", None)
    return isinstance(owner, type) and is_importable(owner)


def _same_buffers(ours: list[Any], theirs: list[memoryview]) -> bool:
    return len(ours) == len(theirs) and all(map(_same_bytes, ours, theirs))


def _same_bytes(ours: Any, view: memoryview) -> bool:
    """Compared in place, eight bytes at a time: as single bytes it takes eight times as long."""
    if len(ours) != view.nbytes:
        return False
    whole = len(ours) // 8 * 8
    kept = memoryview(ours)
    return kept[whole:] == view[whole:] and kept[:whole].cast("Q") == view[:whole].cast("Q")
