"""wire/byvalue: what belongs to `__main__`, between two real processes whose `__main__` differ.

Each test is the text of a program, run as a script. It finds `call(function, *args)`, which runs the function in a
second process (fed by pipes) and returns the result or raises; `other` is the same with a third process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from distpool.wire import codec

ROOT = Path(codec.__file__).parents[2]

PEER = """
import pickle, sys
from distpool.wire import codec, failures, functions
SECRET = "of the peer"
def defined_there(x): return x, SECRET
def main():
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    decoded = None
    while True:
        try:
            function, arguments = pickle.load(source)
        except EOFError:
            return
        try:
            args, kwargs = codec.decode_args(*arguments)
            data, buffers = codec.encode(functions.decode_function(*function)(*args, **kwargs))
            reply = True, data, [bytes(buffer) for buffer in buffers]
        except BaseException as error:
            reply = False, failures.encode_exception(error, skip_frames=1), []
        pickle.dump(reply, sink)
        sink.flush()
main()
"""

PRELUDE = """
import pickle, subprocess, sys
from distpool.wire import codec, failures, functions
encoder = functions.FunctionEncoder()
def start(source):
    peer = subprocess.Popen([sys.executable, source], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    def call(function, *args, **kwargs):
        encoded = encoder.encode(function)
        data, buffers = codec.encode_args(args, kwargs)
        pickle.dump(((encoded.data, encoded.buffers), (data, [bytes(b) for b in buffers])), peer.stdin)
        peer.stdin.flush()
        ok, data, buffers = pickle.load(peer.stdout)
        if ok:
            return codec.decode(data, [bytearray(b) for b in buffers])
        raise failures.decode_exception(data, 2)
    def stop():
        peer.stdin.close()
        peer.stdout.close()
        assert peer.wait(20) == 0
    return call, stop
"""


@pytest.fixture
def program(tmp_path):
    def run(source, two=False):
        peer, script = tmp_path / "peer.py", tmp_path / "script.py"
        peer.write_text(PEER)
        lines = [PRELUDE, f"call, stop = start({str(peer)!r})"]
        if two:
            lines.append(f"other, stop_other = start({str(peer)!r})")
        lines += [textwrap.dedent(source), "stop()"] + (["stop_other()"] if two else []) + ["print('passed')"]
        script.write_text("\n".join(lines))
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(script)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50, check=False)
        assert (done.returncode, done.stdout) == (0, "passed\n"), done.stdout + done.stderr

    return run


def test_instances_come_back_as_instances_of_the_own_class(program):
    program(
        """
        import collections, dataclasses, enum, abc, typing
        @dataclasses.dataclass
        class Point:
            x: int
            y: int = 0
            def length(self): return (self.x ** 2 + self.y ** 2) ** 0.5
        class Color(enum.Enum):
            RED = 1
            BLUE = 2
            def other(self): return Color.BLUE if self is Color.RED else Color.RED
        class Flags(enum.IntFlag):
            A = 1
            B = 2
        class Outer:
            class Nested:
                def __init__(self, value): self.value = value
        Pair = collections.namedtuple("Pair", "left right")
        class Typed(typing.NamedTuple):
            name: str
        class Base(abc.ABC):
            @abc.abstractmethod
            def go(self): ...
        class Derived(Base):
            __slots__ = ("value",)
            def go(self): return __class__.__name__
        class Generic(typing.Generic[typing.TypeVar("T")]):
            pass

        def move(point): return dataclasses.replace(point, x=point.x + 1)
        back = call(move, Point(2, 4))
        assert type(back) is Point and back == Point(3, 4) and back.length() == 5
        assert call(lambda: Color.RED) is Color.RED
        assert call(lambda c: c.other(), Color.RED) is Color.BLUE
        assert call(Color.other, Color.BLUE) is Color.RED
        assert call(lambda f: f | Flags.B, Flags.A) == Flags.A | Flags.B
        assert type(call(lambda n: Outer.Nested(n.value + 1), Outer.Nested(1))) is Outer.Nested
        back = call(lambda pair: Pair(pair.right, pair.left), Pair(1, 2))
        assert type(back) is Pair and back == (2, 1)
        assert type(call(lambda: Typed("x"))) is Typed
        assert isinstance(call(Derived), Base) and type(call(Derived)) is Derived
        assert call(lambda d: d.go(), Derived()) == "Derived"
        assert type(call(Generic[int])) is Generic
        assert call(lambda: [Point, Color, Pair]) == [Point, Color, Pair]
        def factory():
            class Local:
                pass
            return Local
        Local = factory()
        assert type(call(lambda l: l, Local())) is Local
        """
    )


def test_exceptions_of_main_are_the_callers_own(program):
    program(
        """
        class Mine(Exception):
            def __init__(self, text):
                super().__init__(text)
        class Strange(Exception):
            def __init__(self, a, b):
                super().__init__(a)
        def fail(error=Mine("foobar")):
            raise error
        from distpool.errors import RemoteException
        from concurrent.futures.process import _RemoteTraceback
        for function, args in ((fail, ()), (fail, (Mine("foobar"),)), (lambda: fail(), ())):
            try:
                call(function, *args)
            except Mine as error:
                assert error.args == ("foobar",) and type(error.__cause__) is _RemoteTraceback
                assert "in fail" in error.__cause__.tb and "script.py" in error.__cause__.tb
                assert "raise error" in error.__cause__.tb
            else:
                raise AssertionError
        def strange():
            raise Strange(1, 2)
        try:
            call(strange)
        except RemoteException as error:
            assert error.pid == 2 and "Strange could not be rebuilt here: TypeError" in str(error)
        else:
            raise AssertionError
        assert call(lambda: "still in step") == "still in step"
        """
    )


def test_a_returning_instance_leaves_the_own_class_alone(program):
    program(
        """
        limit = 1
        class Counter:
            made = 0
            def __init__(self): type(self).made += 1
            def limit(self): return limit
        method = Counter.limit
        def make():
            return Counter()
        for turn in range(3):
            Counter.made = 10 * turn
            back = call(make)
            assert type(back) is Counter and Counter.made == 10 * turn
        assert Counter.limit is method
        limit = 2
        assert back.limit() == 2
        """
    )


def test_changes_of_the_own_class_reach_the_others(program):
    program(
        """
        class A:
            x = 1
            def get(self): return self.x
        a = A()
        for value in (1, 2, 1, [3]):
            A.x = value
            assert call(lambda: a.get()) == value
            assert call(lambda b: b.get(), a) == value
            assert call(A.get, a) == value
            assert call(a.get) == value
        A.get = lambda self: "new"
        assert call(a.get) == "new"
        class A:
            x = "another class"
        assert call(lambda: A.x) == "another class"
        assert type(call(lambda: A())) is A and type(call(lambda: a)) is type(a) is not A
        """
    )


def test_a_class_that_came_from_one_process_goes_on_to_another(program):
    program(
        """
        def define():
            class Theirs:
                def __init__(self, x): self.x = x
                def __eq__(self, other): return type(other) is type(self) and other.x == self.x
            return Theirs
        Theirs = call(define)
        thing = Theirs(3)
        assert other(lambda t: t, thing) == thing
        assert call(lambda t: t, thing) == thing
        class Mine:
            pass
        mine = Mine()
        assert type(other(lambda m: m, call(lambda m: m, mine))) is Mine
        """,
        two=True,
    )


def test_functions_run_the_senders_code_and_do_not_touch_names_there(program):
    program(
        """
        SECRET = "of the sender"
        def defined_there(x): return "mine", x
        assert call(defined_there, 1) == ("mine", 1)
        assert call(lambda: defined_there(2)) == ("mine", 2)
        assert call(lambda: SECRET) == "of the sender"
        def read_there():
            import __main__
            return __main__.SECRET, __main__.defined_there(3)
        assert call(read_there) == ("of the peer", (3, "of the peer"))
        """
    )


def test_names_that_only_the_other_process_has_are_found_there(program):
    program(
        """
        def use(x):
            return [len(defined_there(y)) for y in x], defined_there(x)
        assert call(use, [1]) == ([2], ([1], "of the peer"))
        assert call(lambda: (lambda: defined_there(4))()) == (4, "of the peer")
        def change():
            import __main__
            __main__.SECRET = "changed"
        call(change)
        assert call(lambda: SECRET) == "changed"
        def helper(): return SECRET
        assert call(lambda: helper()) == "changed"
        SECRET = "mine"
        assert call(lambda: helper()) == "mine"
        del SECRET
        assert call(lambda: helper()) == "changed"
        for _ in range(2):
            try:
                call(lambda: nowhere)
            except NameError as error:
                assert "nowhere" in str(error)
            else:
                raise AssertionError
        """
    )


INITIALIZE = """
import functools
def initialize(data):
    function, arguments, ran = codec.decode_initializer(data)
    function(*arguments)
    ran()
def begin(function, *arguments):
    call(initialize, codec.encode((function, arguments))[0])
"""


def test_globals_that_an_initializer_assigned_last(program):
    program(
        INITIALIZE
        + """
model = None
limit = 3
def load(value):
    global limit
    limit = value
def init(value):
    global model, unknown_here
    model, unknown_here = [value], value + 1
    load(value + 2)
def use(): return model[0], unknown_here, limit
begin(functools.partial(init, 5))
assert call(use) == call(lambda: use()) == (5, 6, 7)
def renew():
    import __main__
    return __main__.model, model
assert call(renew) == ([5], [5])
assert model is None and limit == 3
begin(lambda: globals().update(limit=9))
assert call(use) == (5, 6, 9)
"""
    )


def test_globals_that_an_initializer_changed_last_and_others_stay_the_callers(program):
    program(
        INITIALIZE
        + """
found = {}
class Settings:
    level = 0
settings = Settings()
size, name, other = 1, "first", ["callers"]
def helper(): return "old"
def init(value):
    found["value"] = value, size, name, helper()
    settings.deep = [value]
    Settings.level = value
init_arguments = ("data",)
def use(): return found, settings.deep, Settings.level, size, name, other, helper()
begin(init, *init_arguments)
size, name, other[0] = 2, "second", "still the callers"
def helper(): return "new"
expected = {"value": ("data", 1, "first", "old")}, ["data"], "data", 2, "second", ["still the callers"], "new"
for _ in range(2):
    assert call(use) == expected
assert found == {} and Settings.level == 0
"""
    )


def test_what_another_thread_decodes_meanwhile_is_not_the_initializers(program):
    program(
        INITIALIZE
        + """
import threading
class Meanwhile:
    def __init__(self, data): self.data = data
    def __setstate__(self, state):
        thread = threading.Thread(target=functions.decode_function, args=(state["data"],))
        thread.start()
        thread.join()
found = ["first"]
def use(): return found
begin(lambda argument: None, Meanwhile(encoder.encode(use).data))
found[0] = "second"
assert call(use) == ["second"]
"""
    )


def test_a_class_that_was_there_before_the_initializer_changed_it(program):
    program(
        INITIALIZE
        + """
class Settings:
    level = 0
def init(value): Settings.level = value
def use(): return Settings.level
assert call(use) == 0
begin(init, 3)
assert call(use) == 3
"""
    )


def test_attributes_that_an_initializer_gave_to_a_function_last(program):
    """The old way to hand a queue or a lock to the tasks of a pool."""
    program(
        INITIALIZE
        + """
def f(x): return x, f.state, getattr(f, "other", None)
def init(state): f.state = state
begin(init, 5)
assert call(f, 1) == (1, 5, None)
f.other = 2
assert call(f, 2) == (2, 5, 2) and call(lambda: f(3)) == (3, 5, 2)
assert not hasattr(f, "state")
"""
    )


def test_an_initializer_of_an_importable_module(program):
    program(
        INITIALIZE
        + """
limit = 1
begin(len, "abc")
assert call(lambda: limit) == 1
limit = 2
assert call(lambda: limit) == 2
"""
    )


def test_everything_of_a_message_is_consistent(program):
    program(
        """
        class Node:
            def __init__(self): self.me = self
        shared = [1]
        first, second = call(lambda a, b: (a, b), shared, shared)
        assert first is second
        node = call(lambda n: n, Node())
        assert node.me is node and type(node) is Node
        v3 = ["x"]; v4 = v3
        assert call(lambda: (v3, v4, v3 is v4)) == (["x"], ["x"], True)
        assert call(lambda k: (k is int, k.__name__), int) == (True, "int")
        import functools, math
        @functools.lru_cache
        def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)
        assert call(fib, 20) == 6765 and call(functools.partial(fib, 10)) == 55
        f1 = lambda x: x + 1
        f2 = lambda x: f1(x)
        assert call(f2, 1) == call(lambda: f2(1)) == 2
        """
    )


def test_classes_with_slots(program):
    program(
        """
        import dataclasses, typing
        T = typing.TypeVar("T")
        class Plain:
            __slots__ = ("a", "__weakref__")
        class Derived(Plain):
            __slots__ = "b"
        class Same(Derived):
            __slots__ = ()
        class Open(Plain): pass
        class Private:
            __slots__ = ("__a", "__dict__")
            def put(self, a): self.__a = self.c = a; return self
            def get(self): return self.__a, self.c
        class Explained:
            __slots__ = {"a": "A value."}
        class Generic(typing.Generic[T]):
            __slots__ = ("a",)
        @dataclasses.dataclass(slots=True)
        class Data:
            a: int = 1
        @dataclasses.dataclass(slots=True, frozen=True, weakref_slot=True)
        class Frozen:
            a: int = 1
        class Pair(typing.NamedTuple):
            a: int = 7
        class Whole(int):
            __slots__ = ()
        def same(x): return x
        def build(cls): return cls()
        for cls in (Plain, Derived, Same, Open, Private, Explained, Generic, Data, Frozen, Pair, Whole):
            for back in call(same, cls()), call(build, cls):
                assert type(back) is cls
            assert call(hasattr, cls(), "__dict__") == hasattr(cls(), "__dict__"), cls
        sent = Same()
        sent.a, sent.b = 1, [2]
        back = call(same, sent)
        assert (back.a, back.b) == (1, [2])
        assert call(lambda: Private().put(3).get()) == call(same, Private().put(3)).get() == (3, 3)
        assert call(same, Data(5)) == Data(5) and call(same, Pair(5)) == Pair(5)
        """
    )


def test_classes_inside_of_others_keep_their_whole_names(program):
    program(
        """
        import dataclasses, enum
        class Outer:
            @dataclasses.dataclass
            class Inner:
                x: int
            class Meta(type): pass
            class Made(metaclass=Meta): __slots__ = "a"
        def make():
            class Local: pass
            return Local
        for cls in (Outer.Inner, Outer.Meta, Outer.Made, Outer, make()):
            assert call(lambda: (cls.__qualname__, cls.__name__)) == (cls.__qualname__, cls.__name__)
        assert call(repr, Outer.Inner(1)) == "Outer.Inner(x=1)"
        """
    )


def test_classes_can_be_pickled_by_others_on_workers(program):
    """As a Manager's queue does, or shelve."""
    program(
        """
        import enum
        def become_worker(): codec.classes_in_main = True
        call(become_worker)
        class Event:
            def __init__(self, value): self.value = value
        class Kind(enum.Enum):
            A = 1
        class Outer:
            class Inner: pass
        def make():
            class Event: pass
            return Event
        def trip(value): return pickle.dumps(value), type(pickle.loads(pickle.dumps(value))) is type(value)
        data, same = call(lambda: trip(Event(3)))
        assert same and type(pickle.loads(data)) is Event and pickle.loads(data).value == 3
        data, same = call(lambda: trip(Kind.A))
        assert same and pickle.loads(data) is Kind.A
        assert call(lambda: trip(Outer.Inner()))[1]
        call(lambda: make())
        assert call(lambda: trip(Event(4)))[1]
        class Event: pass
        assert call(lambda: trip(Event()))[1]
        def taken(): return type(sys.modules["__main__"].main).__name__
        class main: pass
        assert call(lambda: (main(), taken())[1]) == "function"
        """
    )


def test_enumerations(program):
    program(
        """
        import dataclasses, enum
        class Color(enum.Enum):
            RED = 1
            CRIMSON = 1
            BLUE = 2
            @classmethod
            def _missing_(cls, value): return cls.BLUE
        class Planet(enum.Enum):
            EARTH = (6.0, 2.0)
            MARS = (3.0, 1.5)
            def __init__(self, mass, radius):
                self.mass, self.radius = mass, radius
                self.moons = [mass]
                self.first = type(self).EARTH if radius == 1.5 else self
            @property
            def gravity(self): return self.mass / self.radius
        class Coord(bytes, enum.Enum):
            def __new__(cls, value, label):
                member = bytes.__new__(cls, [value])
                member._value_, member.label = value, label
                return member
            X = (0, "x")
            Y = (1, "y")
        class Number(int, enum.Enum):
            def __new__(cls, value): return int.__new__(cls, value * 10)
            ONE = 1
        class Access(enum.Flag, boundary=enum.KEEP):
            READ = 1
            WRITE = 2
            BOTH = 3
        class Meta(enum.EnumMeta):
            def __len__(cls): return 77
        class Made(enum.Enum, metaclass=Meta):
            A = enum.member(len)
            B = enum.member(lambda: 4)
        @dataclasses.dataclass
        class Creature:
            size: str
            legs: int = 4
        class Animal(Creature, enum.Enum):
            DOG = "medium"
            BEE = "small", 6
        class Base(enum.Enum):
            def __init__(self, value): self.double = value * 2
        class Derived(Base):
            ONE = 1
        def look():
            return (
                Color.CRIMSON is Color.RED, Color["CRIMSON"], Color(9), list(Color.__members__), len(Color),
                Planet.MARS.gravity, Planet((3.0, 1.5)) is Planet.MARS, Planet.MARS.moons, Planet.EARTH.value,
                Planet.MARS.first is Planet.EARTH, Planet.EARTH.first is Planet.EARTH, [p.name for p in Planet],
                Coord.Y.label, bytes(Coord.Y), Coord(0).label, Coord.X.value, Number.ONE + 1, Number.ONE.value,
                (Access.READ | Access.WRITE).name, Access.BOTH in (Access.READ | Access.WRITE,), Access(8).value,
                [a.name for a in Access], len(Made), Made.A.value([1]), Made.B.value(), Animal.BEE.legs,
                Animal.DOG.size, Derived.ONE.double,
            )
        here = look()
        assert call(look) == here and other(look) == here
        def check(planet, coord, color):
            return planet is Planet.MARS, coord is Coord.Y, color is Color.RED, look(), planet, coord, color
        expected = True, True, True, here, Planet.MARS, Coord.Y, Color.RED
        assert call(check, Planet.MARS, Coord.Y, Color.RED) == expected
        found = other(call(lambda: check), Planet.MARS, Coord.Y, Color.RED)
        assert found == expected and found[4] is Planet.MARS and found[5] is Coord.Y
        Planet.MARS.moons.append(5)
        Planet.gravity = property(lambda self: "changed")
        assert call(lambda: (Planet.MARS.moons, Planet.MARS.gravity)) == ([3.0, 5], "changed")
        assert "__init__" not in call(lambda: list(vars(Color))), call(lambda: list(vars(Color)))
        """,
        two=True,
    )


def test_what_annotations_name(program):
    program(
        """
        import sys
        from typing import *
        Parameters, Several = ParamSpec("Parameters", bound=Callable), TypeVarTuple("Several")
        Number = NewType("Number", int)
        class Timed(Generic[Parameters]):
            def __init__(self, function: Callable[Parameters, Number]): self.function = function
        def use(*values: Unpack[Several]) -> Number: return Number(len(Timed(values).function))
        assert call(use, 1, 2) == 2
        assert call(lambda: [Parameters.__name__, Several.__name__, Number.__name__, Number.__supertype__]) == [
            "Parameters", "Several", "Number", int
        ]
        if sys.version_info >= (3, 12):
            exec("type Numbers = list[int]")
            exec("def first[T, **P](values: Numbers, f: Callable[P, T] = None) -> T: return values[0]")
            assert call(first, [5]) == 5 and call(lambda: Numbers.__value__) == list[int]
        """
    )


def test_functions_that_dispatch_on_a_type(program):
    program(
        """
        import functools
        class Own: pass
        @functools.singledispatch
        def size(x, *more):
            "How big."
            return "object"
        @size.register
        def _(x: int): return "int"
        @size.register
        def _(x: list): return [size(y) for y in x]
        @size.register(Own)
        def _(x): return "own"
        class Holder:
            @functools.singledispatchmethod
            def size(self, x): return "object"
            @size.register
            def _(self, x: int): return "int"
        assert call(size, [1, Own(), None]) == ["int", "own", "object"]
        assert call(lambda: (size.__name__, size.__doc__, sorted(map(str, size.registry)))) == (
            "size", "How big.", sorted(map(str, size.registry)))
        assert call(lambda: [Holder().size(x) for x in (1, "")]) == ["int", "object"]
        @size.register
        def _(x: str): return "str"
        assert call(size, ["a"]) == ["str"]
        """
    )


def test_classes_with_cached_properties(program):
    program(
        """
        import functools
        class Table:
            def __init__(self, rows): self.rows = rows
            @functools.cached_property
            def total(self):
                "The sum."
                return sum(self.rows)
            alone = functools.cached_property(len)
        def total(table): return table.total, table.__dict__["total"], type(table).total.__doc__, table.total
        assert call(total, Table([1, 2])) == (3, 3, "The sum.", 3)
        back = call(Table, [4])
        assert type(back) is Table and back.total == 4
        """
    )


def test_shared_classes_are_each_processes_own(program):
    program(
        """
        from distpool.wire.byvalue import share_class
        class Shared:
            where = "sender"
        share_class(Shared, "everywhere:Shared")
        def define():
            import __main__
            from distpool.wire.byvalue import share_class
            class Shared:
                where = "receiver"
            __main__.Shared = Shared
            share_class(Shared, "everywhere:Shared")
        call(define)
        made = Shared()
        assert call(lambda s: s.where, made) == "receiver"
        def here():
            import __main__
            return __main__.Shared()
        back = call(here)
        assert type(back) is Shared and back.where == "sender"
        assert other(lambda s: s.where, made) == "sender", "a process without it gets the definition"
        """,
        two=True,
    )


def test_a_class_of_a_module_that_is_absent_there(program, tmp_path):
    directory = tmp_path / "only_here"
    directory.mkdir()
    (directory / "absent_module.py").write_text("class Absent: pass\ndef function(): return 1\n")
    program(
        f"""
        sys.path.insert(0, {str(directory)!r})
        import absent_module
        for function, args in (
            (lambda x: x, (absent_module.Absent(),)),
            (absent_module.function, ()),
            (lambda: absent_module.Absent, ()),
        ):
            try:
                call(function, *args)
            except ModuleNotFoundError as error:
                assert "absent_module" in str(error)
            else:
                raise AssertionError
        assert call(lambda: "test") == "test"
        """
    )


def test_the_main_module_of_a_multiprocessing_child(program):
    program(
        """
        class Thing:
            def __init__(self, x): self.x = x
        class Parent: pass
        def helper(t): return Thing(t.x + 1)
        def function(t): return helper(t)
        import functools
        @functools.cache
        def cached(): return 5
        # What `multiprocessing` (spawn) does to the main module of its children:
        sys.modules["__mp_main__"] = sys.modules["__main__"]
        for thing in (Thing, helper, function, cached):
            thing.__module__ = "__mp_main__"
        back = call(function, Thing(1))
        assert type(back) is Thing and back.x == 2
        assert call(lambda: function(Thing(4))).x == 5
        assert call(cached) == 5
        """
    )


def test_what_a_class_had_ends_when_all_of_it_has_been_brought_up_to_date(program):
    program(
        """
        # The old `__del__` is the last to know its globals, and an instance in them (3.11 crashed now and then).
        class Ending:
            def __del__(self):
                import sys
                vars(sys).setdefault("noted", []).append((type(self).before, type(self).behind))
            before = behind = 0
        held = Ending()
        for number in range(1, 4):
            Ending.before = Ending.behind = number
            assert call(lambda x: (held, x)[1], 1) == 1
        def noted():
            import sys
            return sys.noted
        assert call(noted) == [(2, 2), (3, 3)]
        """
    )
