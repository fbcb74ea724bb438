"""wire/functions and wire/fingerprint: functions are never stale, and cheap while they do not change.

Each case of freshness runs twice: as it is, and with cloudpickle counted, so that it is known which cases the short
way (no cloudpickle) really took.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import math
import operator
import random
import sys
import threading
import time
import types
import xml

import numpy as np
import pytest

from distpool import config
from distpool.errors import SerializationError
from distpool.wire import codec, fingerprint
from distpool.wire.functions import EncodedFunction, FunctionEncoder, decode_function

LARGE = config.OUT_OF_BAND


def importable(x):
    return x + 1


@functools.cache
def cached(x):
    return x


class Importable:
    """A class that other processes find by name."""

    @classmethod
    def make(cls):
        return cls()

    def method(self):
        return "method"

    def __call__(self):
        return vars(self).get("value")


@pytest.fixture
def encoder():
    return FunctionEncoder()


@pytest.fixture
def dumps(monkeypatch):
    """How often cloudpickle was asked: `dumps()` since the last `dumps()`."""
    count = itertools.count()
    original = codec.dump_by_value

    def counted(*args):
        next(count)
        return original(*args)

    monkeypatch.setattr(codec, "dump_by_value", counted)
    last = [0]

    def since():
        now = next(count)
        before, last[0] = last[0], now + 1
        return now - before

    return since


def script(source):
    """The globals of a program: what it defines belongs to `__main__`."""
    namespace = {"__name__": "__main__", "__file__": "script.py", "__builtins__": __builtins__}
    exec(compile(source, "script.py", "exec"), namespace)
    return types.SimpleNamespace(**namespace), namespace


def run(encoded, *args):
    return decode_function(encoded.data, encoded.buffers)(*args)


# --- by reference ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [importable, len, math.sqrt, json.dumps, str.upper, int, Importable, Importable.method, dict, np.sum, cached],
)
def test_importable_functions_go_by_reference_and_keep_their_number(encoder, function):
    encoded = encoder.encode(function)
    assert encoder.encode(function) is encoded
    assert encoded.buffers == [] and not encoded.by_value and encoded.reusable
    assert decode_function(encoded.data) is function


def test_numbers_are_unique_in_the_process(encoder):
    numbers = [FunctionEncoder().encode(len).number for _ in range(3)]
    numbers += [encoder.encode(function).number for function in (len, abs, lambda: 1)]
    assert len(set(numbers)) == len(numbers)


def test_names_are_for_people(encoder):
    main, _ = script("def f(): pass")
    names = [
        encoder.encode(function).name
        for function in (math.sqrt, len, main.f, functools.partial(len), Importable(), str.upper)
    ]
    assert names == ["math.sqrt", "len", "f", "partial(len)", "Importable", "str.upper"]
    assert "f" in repr(encoder.encode(main.f))


def test_the_scheduler_has_its_slot(encoder):
    encoded = encoder.encode(len)
    assert encoded.mean == -1.0
    encoded.mean = 0.5
    assert encoder.encode(len).mean == 0.5
    assert not hasattr(encoded, "__dict__")


def test_a_function_that_hides_behind_the_name_of_another_goes_by_value(encoder):
    def other(x):
        return x + 100

    other.__qualname__ = "importable"
    encoded = encoder.encode(other)
    assert encoded.by_value and run(encoded, 1) == 101


def test_a_module_whose_attributes_raise_does_no_harm(encoder):
    class Odd(types.ModuleType):
        def __getattr__(self, name):
            raise OSError("no")

    sys.modules["odd_module"] = Odd("odd_module")
    try:
        main, _ = script("def f(): return 1")
        main.f.__module__ = "odd_module"
        assert not fingerprint.is_importable(main.f)
    finally:
        del sys.modules["odd_module"]


# --- freshness ------------------------------------------------------------------------------------------------------


def test_unchanged_functions_ask_cloudpickle_once(encoder, dumps):
    source = """
import math, json
from operator import add
K, NAME, PAIR = 5, "name", (1, ("a", None))
def helper(x, *, extra: int = 2) -> int:
    "Doc."
    return add(x, K) + extra
def f(x=3):
    return helper(x) + math.floor(1.5), NAME, PAIR, json.dumps, len(NAME)
g = lambda: f(1)
def outer(n):
    def inner(): return n, g
    return inner
h = outer(4)
"""
    main, _ = script(source)
    for function in (main.f, main.g, main.h, main.helper):
        first = encoder.encode(function)
        assert dumps() == 1 and first.by_value and first.reusable
        assert all(encoder.encode(function) is first for _ in range(5))
        assert dumps() == 0, function
    assert run(encoder.encode(main.f)) == main.f()


def test_rebound_globals(encoder):
    main, names = script("v = 1\nf = lambda: v")
    for value in (1, 2, "x", None, True, 1.0, [1], 3, (1, 2), len, int):
        names["v"] = value
        assert run(encoder.encode(main.f)) == value
        assert type(run(encoder.encode(main.f))) is type(value)


def test_toggling_a_global_and_back(encoder):
    main, names = script("v = 'a'\nf = lambda: v")
    for value in ("a", "b", "a", "b", "a"):
        names["v"] = value
        assert run(encoder.encode(main.f)) == value
    names["v"] = "a"
    same = encoder.encode(main.f)
    names["v"] = "b"
    encoder.encode(main.f)
    names["v"] = "a"
    assert encoder.encode(main.f) is same


def test_equal_values_of_other_types_are_other_values(encoder):
    main, names = script("v = 1\nf = lambda: v")
    for value in (1, True, 1.0, 1 + 0j):
        names["v"] = value
        assert type(run(encoder.encode(main.f))) is type(value)


@pytest.mark.parametrize("change", ["v.append(1)", "v[0] = 9", "v.clear()", "v.extend(v)"])
def test_lists_that_change_in_place(encoder, change):
    main, names = script("v = [0] * 3\nf = lambda: v\ng = lambda: f()")
    for _ in range(4):
        assert run(encoder.encode(main.g)) == run(encoder.encode(main.f)) == names["v"]
        exec(change, names) if names["v"] else None


def test_what_can_change_is_not_reusable_and_equal_bytes_are(encoder):
    main, _ = script("v = [0]\nf = lambda: v.append(1) or len(v)")
    one, other = encoder.encode(main.f), encoder.encode(main.f)
    assert one is other and not one.reusable
    assert [run(one) for _ in range(3)] == [2, 2, 2]


@pytest.mark.parametrize(
    "source",
    [
        "n = 0\ndef f():\n    global n\n    n += 1\n    return n",
        "def make():\n    n = 0\n    def f():\n        nonlocal n\n        n += 1\n    return f\nf = make()",
        "def f():\n    f.n = 1\n    return f.n",
        "def f():\n    globals()['n'] = 1",
        "def f():\n    exec('x = 1', globals())",
        "def h(): pass\ndef f():\n    setattr(h, 'n', 1)",
        "def h(): pass\ndef f():\n    h.__dict__['n'] = 1",
        "def h(): pass\ndef f():\n    def inner():\n        h.n = 1\n    inner()",
        "n = 0\ndef h():\n    global n\n    n += 1\ndef f(): return h()",
        "def make():\n    def f():\n        f.n = 1\n    return f\nf = make()",
        "def g():\n    f.n = 1\nf = g",
        "def g(): return f.__code__\ndef f():\n    g().n = f.n = 1",
        "def f():\n    f.__annotations__['n'] = 1",
        "def f(*, n=1):\n    f.__kwdefaults__['n'] += 1",
        "import sys\ndef f():\n    sys._getframe().f_globals['n'] = 1",
    ],
)
def test_functions_that_leave_traces_are_not_reusable(encoder, source):
    main, _ = script(source)
    first = encoder.encode(main.f)
    assert not first.reusable
    assert encoder.encode(main.f) is first


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    n = 0\n    def g():\n        nonlocal n\n        n += 1\n        return n\n    return g()",
        "def f(o):\n    o.attribute = 1\n    return o",
        "import math\ndef f(): return [math.sqrt(x) for x in range(3)]",
    ],
)
def test_functions_that_leave_none_are_reusable(encoder, source):
    main, _ = script(source)
    assert encoder.encode(main.f).reusable


def test_closures(encoder):
    main, _ = script(
        """
def make():
    n = 1
    def get(): return n
    def put(value):
        nonlocal n
        n = value
    return get, put
get, put = make()
"""
    )
    for value in (1, 2, 1, [1], "x"):
        main.put(value)
        assert run(encoder.encode(main.get)) == value


def test_an_empty_closure_cell(encoder):
    main, _ = script("def make():\n    f = lambda: n\n    if 0: n = 1\n    return f\nf = make()")
    for _ in range(2):
        with pytest.raises(NameError):
            run(encoder.encode(main.f))


def test_defaults_and_names_and_annotations_and_doc(encoder):
    main, _ = script("def f(x=1, *, k=2): return x, k\ng = lambda: f()")
    assert run(encoder.encode(main.g)) == (1, 2)
    main.f.__defaults__ = (5,)
    assert run(encoder.encode(main.g)) == (5, 2)
    main.f.__kwdefaults__["k"] = 6
    assert run(encoder.encode(main.g)) == (5, 6)
    main.f.__kwdefaults__ = {"k": 7}
    assert run(encoder.encode(main.g)) == run(encoder.encode(main.f)) == (5, 7)
    for name, value in (("__doc__", "new"), ("__name__", "h"), ("__qualname__", "q"), ("__module__", "m")):
        encoder.encode(main.f)
        setattr(main.f, name, value)
        assert getattr(decode_function(encoder.encode(main.f).data), name) == value
    main.f.__annotations__["x"] = int
    assert decode_function(encoder.encode(main.f).data).__annotations__ == {"x": int}
    main.f.__annotations__["x"] = str
    assert decode_function(encoder.encode(main.f).data).__annotations__ == {"x": str}


def test_mutable_defaults(encoder):
    main, _ = script("def f(x=[]): return x")
    encoder.encode(main.f)
    main.f.__defaults__[0].append(3)
    assert run(encoder.encode(main.f)) == [3]


def test_function_attributes(encoder):
    main, _ = script("def f(): return vars(f)\ndef g(): return f()")
    assert run(encoder.encode(main.g)) == {}
    main.f.limit = 5
    assert run(encoder.encode(main.g)) == run(encoder.encode(main.f)) == {"limit": 5}
    main.f.limit = 6
    assert run(encoder.encode(main.g)) == {"limit": 6}
    del main.f.limit
    assert run(encoder.encode(main.g)) == {}


def test_a_new_code_object(encoder):
    main, _ = script("def f(): return 1\ndef g(): return f()\ndef other(): return 2")
    assert run(encoder.encode(main.g)) == 1
    main.f.__code__ = main.other.__code__
    assert run(encoder.encode(main.g)) == run(encoder.encode(main.f)) == 2


def test_nested_helpers(encoder):
    main, names = script("c = 1\na = lambda: c\nb = lambda: a()\nd = lambda: b()")
    assert run(encoder.encode(main.d)) == 1
    names["c"] = 2
    assert run(encoder.encode(main.d)) == 2
    names["a"] = lambda: 3
    assert run(encoder.encode(main.d)) == 3
    names["b"] = importable
    with pytest.raises(TypeError):
        run(encoder.encode(main.d))


def test_recursion(encoder, dumps):
    main, _ = script("def f(n): return 1 if n < 2 else n * g(n - 1)\ndef g(n): return f(n)")
    assert run(encoder.encode(main.f), 5) == 120
    dumps()
    encoder.encode(main.f)
    assert dumps() == 0


def test_deleted_and_appearing_globals(encoder):
    main, names = script("v = 1\nf = lambda: v")
    assert run(encoder.encode(main.f)) == 1
    del names["v"]
    with pytest.raises(NameError):
        run(encoder.encode(main.f))
    names["v"] = 2
    assert run(encoder.encode(main.f)) == 2
    main, names = script("f = lambda: len('abc')")
    assert run(encoder.encode(main.f)) == 3
    names["len"] = abs
    with pytest.raises(TypeError):
        run(encoder.encode(main.f))


def test_classes_of_main_change(encoder):
    main, names = script("class A:\n    x = 1\nf = lambda: A.x\ng = lambda: (A().x, f())")
    for value in (1, 2, 1):
        names["A"].x = value
        # Another process: here the class would simply be found.
        data = encoder.encode(main.g).data
        assert data == codec.dump_by_value(main.g, None, None, None)


def test_stateful_objects_in_closures(encoder):
    generator = random.Random(5)
    function = lambda: generator.random()
    for _ in range(3):
        state = generator.getstate()
        got = run(encoder.encode(function))
        assert got == generator.random() != random.Random(1).random()
        assert generator.getstate() != state


def test_a_module_attribute_that_is_bound_anew(encoder, monkeypatch):
    module = sys.modules[__name__]
    main, names = script("f = lambda: helper(1)")
    names["helper"] = importable
    assert run(encoder.encode(main.f)) == 2
    monkeypatch.setattr(module, "importable", abs)
    # The old function has lost its name, so it travels by value now.
    encoded = encoder.encode(main.f)
    assert run(encoded) == 2 and b"importable" in encoded.data


def test_modules_are_by_reference_and_imports_are_noticed(encoder):
    sys.modules.pop("xml.sax.saxutils", None)
    vars(xml).pop("sax", None)
    for name in [name for name in sys.modules if name.startswith("xml.sax")]:
        del sys.modules[name]
    main, names = script("f = lambda: xml.sax.saxutils.escape('<')")
    names["xml"] = xml
    assert b"xml.sax.saxutils" not in encoder.encode(main.f).data
    importlib.import_module("xml.sax.saxutils")
    assert b"xml.sax.saxutils" in encoder.encode(main.f).data
    assert run(encoder.encode(main.f)) == "&lt;"


def test_a_module_that_is_registered_by_value_later(encoder):
    import cloudpickle

    main, names = script("f = lambda: helper(1)")
    names["helper"] = importable
    short = len(encoder.encode(main.f).data)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        assert len(encoder.encode(main.f).data) > short + 100
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert len(encoder.encode(main.f).data) == short


def test_an_importable_function_whose_module_is_registered_by_value_later(encoder):
    import cloudpickle

    first = encoder.encode(importable)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        assert len(encoder.encode(importable).data) > len(first.data) + 100
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert encoder.encode(importable) is first


def test_random_changes_never_make_the_short_way_stale(encoder):
    """Any sequence of changes: what comes back acts as what cloudpickle would have sent."""
    source = "a, b = 1, 'x'\ndef h(y=2, *, k=3): return a, y, k\ndef f(z=4): return h(), b, z\nclass A: x = 1\n"
    main, names = script(source)
    choose = random.Random(20240501)
    values = [1, True, 1.0, "x", None, (1, "a"), [1], {"k": 1}, main.A, importable, abs, math, len]
    changes = [
        lambda: names.__setitem__("a", choose.choice(values)),
        lambda: names.__setitem__("b", choose.choice(values)),
        lambda: names.__setitem__("h", choose.choice([main.h, main.h, lambda: names["a"]])),
        lambda: setattr(main.f, "__defaults__", (choose.choice(values),)),
        lambda: setattr(main.h, "__kwdefaults__", {"k": choose.choice(values)}),
        lambda: main.h.__dict__.__setitem__("note", choose.choice(values)),
        lambda: main.h.__dict__.clear(),
        lambda: values[6].append(1),
        lambda: None,
    ]
    for _ in range(400):
        choose.choice(changes)()
        for function in (main.f, main.h):
            fresh = codec.decode(codec.dump_by_value(function, None, None, None))
            sent = decode_function(encoder.encode(function).data)
            assert repr(fresh()) == repr(sent())
            assert fresh.__dict__ == sent.__dict__


# --- one code object, many functions --------------------------------------------------------------------------------


def test_lambdas_of_one_line_share_the_work(encoder, dumps):
    main, _ = script("def make(n): return lambda: n\nmake_constant = lambda: (lambda: 5)")
    first = encoder.encode(main.make_constant())
    dumps()
    assert encoder.encode(main.make_constant()) is first
    assert dumps() == 0


def test_lambdas_of_a_loop_each_carry_their_own_value(encoder):
    main, _ = script("def make(n): return lambda: n")
    functions = [main.make(n) for n in range(200)]
    encoded = [encoder.encode(function) for function in functions]
    assert [run(one) for one in encoded] == list(range(200))
    assert [run(encoder.encode(function)) for function in functions[::-1]] == list(range(200))[::-1]
    assert len({one.number for one in encoded}) == 200


def test_the_short_way_comes_back_when_the_changes_stop(encoder, dumps):
    main, names = script("v = 0\nf = lambda: v")
    for value in range(50):
        names["v"] = value
        encoder.encode(main.f)
    for _ in range(100):
        encoder.encode(main.f)
    dumps()
    assert run(encoder.encode(main.f)) == 49
    assert dumps() == 0


def test_same_code_with_other_globals(encoder):
    code = compile("f = lambda: v", "script.py", "exec")
    for value in (1, 2):
        names = {"__name__": "__main__", "v": value}
        exec(code, names)
        assert run(encoder.encode(names["f"])) == value


# --- other callables ------------------------------------------------------------------------------------------------


def test_partials_bound_methods_and_callable_objects(encoder):
    instance = Importable()
    generator = random.Random(3)
    for function in (
        functools.partial(pow, 2),
        functools.partial(lambda x, y: x - y, y=1),
        instance,
        instance.method,
        Importable.make,
        [3, 4].__len__,
        np.sqrt,
        operator.itemgetter(0),
        generator.random,
    ):
        encoded = encoder.encode(function)
        assert encoder.encode(function) is encoded
        assert callable(decode_function(encoded.data))
    assert run(encoder.encode(functools.partial(pow, 2)), 3) == 8
    assert encoder.encode(functools.partial(pow, 2)) is encoder.encode(functools.partial(pow, 2))


def test_their_state_is_what_it_is_now(encoder):
    instance = Importable()
    for value in (1, 2, [3], 1):
        instance.value = value
        assert run(encoder.encode(instance)) == value
    bound = functools.partial(max, [1])
    bound.args[0].append(5)
    assert run(encoder.encode(bound)) == 5
    assert not encoder.encode(bound).reusable
    assert encoder.encode(functools.partial(pow, 2)).reusable
    assert not encoder.encode(instance).reusable
    assert encoder.encode(Importable.make).reusable


def test_cached_functions_of_main_travel_with_an_empty_cache(encoder):
    main, _ = script(
        """
import functools
calls = []
@functools.lru_cache(maxsize=50, typed=True)
def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)
"""
    )
    main.fib(10)
    back = decode_function(encoder.encode(main.fib).data)
    assert back.cache_info().currsize == 0 and back.cache_parameters() == {"maxsize": 50, "typed": True}
    assert back(30) == 832040
    assert run(encoder.encode(lambda: main.fib(3))) == 2


def test_cached_functions_inside_of_others_travel_as_well(encoder):
    @functools.lru_cache(maxsize=7)
    def local(x):
        return x + 1

    class Local:
        method = functools.lru_cache(lambda self, x: x * 2)

    assert run(encoder.encode(local), 1) == 2
    parameters, doubled = run(encoder.encode(lambda: (local.cache_parameters(), Local().method(4))))
    assert parameters == {"maxsize": 7, "typed": False} and doubled == 8


def test_callables_without_equality_or_hash(encoder):
    class Awkward:
        __hash__ = None

        def __eq__(self, other):
            raise AssertionError("compared")

        def __call__(self):
            return "called"

    assert run(encoder.encode(Awkward())) == "called"


# --- large captured data --------------------------------------------------------------------------------------------


def test_captured_arrays_are_copied_and_compared(encoder):
    array = np.zeros(LARGE + 3, np.uint8)
    function = lambda: array
    first = encoder.encode(function)
    assert [len(buffer) for buffer in first.buffers] == [array.nbytes] and len(first.data) < 5000
    assert encoder.encode(function) is first
    array[-1] = 1
    second = encoder.encode(function)
    assert second is not first and run(second)[-1] == 1
    assert first.buffers[0][-1] == 0
    array[-1] = 0
    array[0] = 7
    assert run(encoder.encode(function))[0] == 7
    array[0] = 0
    assert encoder.encode(function) is first


def test_whoever_keeps_large_buffers_may_put_them_into_shared_memory():
    kept = []

    def keep(view):
        kept.append((memoryview(bytes(view)), object()))
        return kept[-1]

    encoder = FunctionEncoder(keep)
    array = np.zeros(LARGE, np.uint8)
    function = lambda: array
    first = encoder.encode(function)
    assert len(kept) == 1 and first.buffers[0] is kept[0][0] and first.leases == [kept[0][1]]
    assert first.size == LARGE + len(first.data) and run(first).sum() == 0
    assert encoder.encode(function) is first and len(kept) == 1, "compared with the copy, not copied again"


def test_memory_is_bounded(encoder):
    main, _ = script("def make(n): return lambda: n")
    for number in range(2000):
        encoder.encode(main.make(number))
    assert len(encoder._young) + len(encoder._old) <= 2 * 257
    large = ["x" * (1 << 20) + str(number) for number in range(200)]
    for text in large:
        encoder.encode(main.make(text))
    kept = [*encoder._young, *encoder._old]
    assert sum(map(len, kept)) < 200 << 20
    encoder.clear()
    assert not encoder._young and not encoder._old


def test_what_is_used_stays_when_others_come_and_go(encoder):
    main, _ = script("kept = [1]\nf = lambda: kept\ndef make(n): return lambda: [n]")
    first = encoder.encode(main.f)
    for number in range(3000):
        encoder.encode(main.make([number]))
        if number % 100 == 0:
            assert encoder.encode(main.f) is first


# --- errors, references, threads ------------------------------------------------------------------------------------


def test_functions_that_cannot_travel(encoder):
    lock = threading.Lock()
    function = lambda: lock
    for _ in range(2):
        with pytest.raises(SerializationError, match=r"captured variable 'lock' of the function .*<lambda>") as caught:
            encoder.encode(function)
        assert isinstance(caught.value.__cause__, TypeError)
    with pytest.raises(SerializationError):
        encoder.encode(lock.acquire)
    assert run(encoder.encode(lambda: 1)) == 1


A_LOCK = threading.Lock()


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("def f(): return lock", "the global variable 'lock' of the function f, an object of type _thread.lock"),
        ("def g(): return lock\ndef f(): return g()", "the global variable 'lock' of the function g"),
        ("def f(): return [lock for _ in range(2)]", "the global variable 'lock' of the function f"),
        ("def f(a, b=lock): pass", "the default of 'b' of the function f"),
        ("def f(*, c=lock): pass", "the default of 'c' of the function f"),
        ("def f(): pass\nf.kept = lock", "the attribute 'kept' of the function f"),
        ("def h(a):\n  def f(): return a\n  return f\nf = h(lock)", "the captured variable 'a' of the function h"),
        ("f = lock.acquire", "the function, "),
    ],
)
def test_the_error_names_what_cannot_travel(encoder, source, text):
    """A program's lock in a global variable is what most programs meet: to be told of the function does not help."""
    names = {"lock": A_LOCK, "__name__": "__main__"}
    exec(source, names)
    with pytest.raises(SerializationError) as caught:
        encoder.encode(names["f"])
    assert str(caught.value).startswith(text), caught.value
    assert "cannot pickle '_thread.lock' object" in str(caught.value)


def test_what_is_no_function_is_refused_on_arrival():
    with pytest.raises(SerializationError, match="int"):
        decode_function(codec.encode(1)[0])


class Reference:
    pass


def test_captured_references_are_reported_and_never_shared(encoder):
    codec.register_reducer(Reference, lambda reference, peer: (operator.concat, ("peer ", str(peer))))
    try:
        reference = Reference()
        function = lambda: reference
        for callable_ in (function, functools.partial(Importable, reference)):
            first, second = encoder.encode(callable_, 2), encoder.encode(callable_, 3)
            assert first.references == (reference,) and first.number != second.number
            assert not first.reusable
        assert run(encoder.encode(function, 2)) == "peer 2"
        assert run(encoder.encode(function, 3)) == "peer 3"
    finally:
        codec.unregister_reducer(Reference)


def test_many_threads_at_once(encoder):
    main, names = script("v = 1\ndef h(): return v\ndef f(): return h()")
    failures = []

    def work(number):
        mine, own = script("def make(n): return lambda: n")
        for turn in range(300):
            if run(encoder.encode(mine.make((number, turn % 5)))) != (number, turn % 5):
                failures.append(number)
            if run(encoder.encode(main.f)) not in (1, 2):
                failures.append("shared")
            names["v"] = 1 + turn % 2

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    assert failures == []
    names["v"] = 2
    assert run(encoder.encode(main.f)) == 2


def test_closures_of_one_code_are_not_mixed(encoder):
    main, _ = script("def make(n): return lambda: n")
    one, two = main.make(1), main.make(2)
    before = sys.gettrace()

    def tracer(frame, event, argument):
        if frame.f_code is not FunctionEncoder._encode_function.__code__ or frame.f_locals["fn"] is not one:
            return None
        if event == "line":  # as a thread does that comes between two lines
            encoder.encode(two)
        return tracer

    sys.settrace(tracer)
    try:
        encoder.encode(one)
    finally:
        sys.settrace(before)
    assert run(encoder.encode(one)) == 1
    assert run(encoder.encode(two)) == 2


def test_hits_take_microseconds(encoder):
    # Generous (0.1 and 2 us measured): this catches the long way on the short path, not a slow machine.
    main, _ = script("K = 3\ndef h(x): return x + K\ndef f(x): return h(x)")
    for function, limit in ((math.sqrt, 0.1), (main.f, 0.3)):
        encoder.encode(function)
        start = time.thread_time()
        for _ in range(10_000):
            encoder.encode(function)
        assert time.thread_time() - start < limit


def test_an_encoded_function_is_not_tied_to_an_encoder():
    encoded = EncodedFunction(b"data", [(b"buffer", None)], "f", True, False)
    assert encoded.size == 10 and encoded.references == ()
