"""CONFORMANCE 2.12: everywhere, remotecall_eval, include, clear."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import distpool
from distpool import CompositeException, RemoteException, everywhere, include, myid, remotecall_eval, remotecall_fetch

from .helpers import ident

pytestmark = pytest.mark.time_limit(90)


@pytest.fixture(autouse=True)
def clean_main() -> Iterator[None]:
    """What a case defines in `__main__` of this process goes again: it is pytest's."""
    names = vars(sys.modules["__main__"])
    before = dict(names)
    yield
    for name in set(names) - set(before):
        del names[name]
    names.update(before)


def here(name: str) -> Any:
    return vars(sys.modules["__main__"])[name]


def test_C181_value_of_the_last_expression(team: list[int]) -> None:
    for pid in (1, team[0]):
        assert everywhere("myid()+1", pid) == pid + 1
        assert everywhere("myid()*2", pid) == 2 * pid
        assert everywhere("a = 1", pid) is None
        assert everywhere("a = 4\na += 1\na", pid) == 5
        assert everywhere("", pid) is None
        assert everywhere("def f():\n    return nprocs()\nf()", pid) == 5
    assert everywhere(
        """
        x = 2
        x * 3
        """,
        team[0],
    ) == 6  # fmt: skip


def test_texts_in_the_text_are_as_they_are(team: list[int]) -> None:
    text = "text = '''a\n   \n b'''\ntext"
    for pid in (1, team[0]):
        assert everywhere(text, pid) == "a\n   \n b"
        assert everywhere("\n  \n   x = 1\n   x", pid) == 1


def test_C182_there_and_only_there(team: list[int]) -> None:
    p, q = team[:2]
    assert everywhere("defined_on_p = 1", p) is None
    assert everywhere("defined_on_p", p) == 1
    assert "defined_on_p" not in vars(sys.modules["__main__"])
    with pytest.raises(RemoteException) as info:
        everywhere("defined_on_p", q)
    assert isinstance(info.value.captured.ex, NameError)
    assert everywhere("defined_on_p += 1", [p, p]) is None
    assert everywhere("defined_on_p", p) == 3


def test_C183_as_often_as_named_and_bindings(team: list[int]) -> None:
    p = team[0]
    seen: list[int] = []
    everywhere("seen.append(myid()); times = globals().get('times', 0) + 1", [1, p, 1, 1, p], seen=seen)
    assert seen == [1, 1, 1]
    assert here("seen") is seen
    assert everywhere("(times, seen)", p) == (2, [p, p])
    assert everywhere("times", 1) == 3


def test_C184_errors(team: list[int]) -> None:
    for pid in (1, team[0]):
        with pytest.raises(RemoteException, match="division by zero") as info:
            everywhere("1/0", pid)
        assert info.value.pid == pid
        assert isinstance(info.value.captured.ex, ZeroDivisionError)
    with pytest.raises(CompositeException) as several:
        everywhere("raise KeyError(myid())", [team[1], 1, team[0]])
    first, second, third = several.value.exceptions
    assert isinstance(first, RemoteException) and isinstance(third, RemoteException)
    assert (first.pid, third.pid) == (team[1], team[0])
    assert isinstance(second, KeyError)
    assert second.args == (1,)
    with pytest.raises(CompositeException) as one:
        everywhere("assert myid() != pid", pid=team[2])
    assert [error.pid for error in one.value.exceptions] == [team[2]]  # type: ignore[attr-defined]
    with pytest.raises(CompositeException) as twice:
        everywhere("n = globals().get('n', 0) + 1\nassert n == 1", [team[0], team[0]])
    assert len(twice.value) == 1


@pytest.mark.parametrize("kind", [SystemExit, GeneratorExit, BaseException])
def test_C184_what_is_no_exception_is_an_error_all_the_same(team: list[int], kind: type[BaseException]) -> None:
    text = f"raise {kind.__name__}('left')"
    for pid in (1, team[0]):
        for ask in (
            lambda: everywhere(text, pid),  # noqa: B023
            lambda: remotecall_eval("__main__", pid, text),  # noqa: B023
            lambda: everywhere(lambda: exec(text), pid),  # noqa: B023
        ):
            with pytest.raises(RemoteException) as info:
                ask()
            assert info.value.pid == pid and type(info.value.captured.ex) is kind
            assert kind.__name__ in info.value.captured.traceback
    with pytest.raises(CompositeException) as several:
        everywhere(text, [team[0], 1, team[1], 1])
    assert [error.pid for error in several.value.exceptions] == [team[0], 1, team[1], 1]  # type: ignore[attr-defined]
    assert {type(error.captured.ex) for error in several.value.exceptions} == {kind}  # type: ignore[attr-defined]
    with pytest.raises(CompositeException):
        everywhere(lambda: exec(text), [team[0], 1])


def test_ctrl_c_during_the_local_run_comes_through(team: list[int]) -> None:
    text = "import signal\nif myid() == 1: signal.raise_signal(signal.SIGINT)"
    for pids in (1, [1, team[0]], [team[0], 1]):
        with pytest.raises(KeyboardInterrupt):
            everywhere(text, pids)
    with pytest.raises(RemoteException) as info:
        everywhere("raise KeyboardInterrupt", team[0])
    assert type(info.value.captured.ex) is KeyboardInterrupt


def test_C184_errors_before_anything_is_sent(team: list[int]) -> None:
    everywhere("sent = 0")
    with pytest.raises(SyntaxError):
        everywhere("sent = 1 +")
    for wrong in ("return 1", "break", "await x", "yield 1", "nonlocal z"):
        for pids in (team[0], None):
            with pytest.raises(SyntaxError):
                everywhere(f"sent = 1\n{wrong}", pids)
            with pytest.raises(SyntaxError):
                remotecall_eval("__main__", [1, *team] if pids is None else pids, f"sent = 1\n{wrong}")
    with pytest.raises(ModuleNotFoundError):
        everywhere("import no_such_module_anywhere\nsent = 1")
    with pytest.raises(ValueError, match="no process with id 9999 exists"):
        everywhere("sent = 1", [*team, 9999])
    for bad in (3, None, b"sent = 1"):
        with pytest.raises(TypeError):
            everywhere(bad)
    with pytest.raises(TypeError):
        everywhere("sent = 1", ["2"])
    with pytest.raises(ValueError, match="later"):
        everywhere("sent = 1", team, later=True)
    assert [everywhere("sent", pid) for pid in distpool.procs()] == [0] * 5


def test_C184_unpicklable_value(team: list[int]) -> None:
    with pytest.raises(RemoteException) as info:
        everywhere("import threading; threading.Lock()", team[0])
    assert isinstance(info.value.captured.ex, distpool.SerializationError)
    with pytest.raises(distpool.SerializationError):
        everywhere("lock", team[0], lock=threading.Lock())


def test_C185_local_run_comes_after_the_requests(team: list[int]) -> None:
    channel = distpool.RemoteChannel()
    source = "channel.put(1) if myid() != 1 else channel.take(timeout=20)"
    assert everywhere(source, [1, team[0]], channel=channel) is None
    assert not channel.isready()


def test_C187_default_is_everybody_of_now(team: list[int]) -> None:
    everywhere("of_now = myid()")
    assert here("of_now") == 1
    assert [everywhere("of_now", pid) for pid in team] == team
    (late,) = distpool.addprocs(1)
    with pytest.raises(RemoteException, match="of_now"):
        everywhere("of_now", late)
    distpool.rmprocs(late)


def test_C187_later(team: list[int]) -> None:
    everywhere("for_later = 10 * myid()", later=True)
    remotecall_fetch(lambda: everywhere("from_worker = myid()", later=True), team[0])

    def answer() -> int:
        return for_later + 1  # type: ignore[name-defined,no-any-return]  # noqa: F821

    assert everywhere(answer, later=True) is answer
    with pytest.raises(CompositeException):
        everywhere("if myid() == 1: raise KeyError", later=True)
    new = distpool.addprocs(2)
    for pid in new:
        assert everywhere("(for_later, answer(), from_worker)", pid) == (10 * pid, 10 * pid + 1, pid)
    with distpool.ClusterExecutor(1) as executor:
        assert executor.submit(lambda: for_later).result(30) == 10 * executor.workers[0]  # type: ignore[name-defined]  # noqa: F821
    distpool.rmprocs(new)


def test_C188_captures_no_locals(team: list[int]) -> None:
    foo = 1
    with pytest.raises(CompositeException) as info:
        everywhere("bar = foo", team)
    assert all(isinstance(error.captured.ex, NameError) for error in info.value.exceptions)  # type: ignore[attr-defined]
    everywhere("bar = foo", foo=foo)
    assert [everywhere("bar", pid) for pid in distpool.procs()] == [1] * 5


def test_C189_imports_run_here_first(team: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_here_c189.py").write_text("value = 5\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(CompositeException) as info:
        everywhere("import only_here_c189")
    assert len(info.value) == 4, "the workers do not have it; this process does"
    assert sys.modules.pop("only_here_c189").value == 5
    for _ in range(2):
        everywhere(
            "if True:\n    with __import__('contextlib').suppress(ValueError):\n        import colorsys as cs", team
        )
        assert here("cs").__name__ == "colorsys"
        assert everywhere("cs.__name__", team[0]) == "colorsys"
    everywhere("try:\n    import no_such_module\nexcept ImportError:\n    no_such_module = None")
    assert everywhere("no_such_module", team[0]) is None


def test_C190_include(team: list[int], tmp_path: Path) -> None:
    name = "included_c190.py"
    file = Path(__file__).with_name(name)
    file.write_text("def from_file():\n    return 1 / 0\n\nmyid()\n")
    try:
        assert include(name, team[0]) == team[0]
        include(name)
        assert here("from_file").__code__.co_filename == str(file)
        with pytest.raises(RemoteException) as info:
            everywhere("from_file()", team[1])
        assert f'File "{file}", line 2, in from_file' in str(info.value)
    finally:
        file.unlink()
    with pytest.raises(OSError, match="included_c190"):
        include(name)
    (tmp_path / "outer.py").write_text("include('inner.py', myid())\n")
    (tmp_path / "inner.py").write_text("inner = myid()\n")
    include(tmp_path / "outer.py", [1, team[0]])
    assert (everywhere("inner", 1), everywhere("inner", team[0])) == (1, team[0])
    (tmp_path / "wrong.py").write_text("x = \n")
    with pytest.raises(SyntaxError):
        include(str(tmp_path / "wrong.py"))


def test_C193_clear(team: list[int]) -> None:
    everywhere("cleared, kept = 1, 2")
    assert distpool.clear("cleared") is None
    assert [everywhere("cleared", pid) for pid in distpool.procs()] == [1, None, None, None, None]
    distpool.clear(["cleared", "not_defined", "len"], 1)
    assert here("cleared") is None
    assert everywhere("('not_defined' in globals(), len([1]), kept)", team[0]) == (False, 1, 2)
    remotecall_eval("colorsys", team[0], "mine = 3")
    distpool.clear("mine", team[0], mod="colorsys")
    assert remotecall_eval("colorsys", team[0], "mine") is None
    with pytest.raises(TypeError):
        distpool.clear([3])
    for mod in (5, None, b"colorsys"):
        with pytest.raises(TypeError, match="module"):
            distpool.clear("kept", team[0], mod=mod)  # type: ignore[arg-type]


def test_remotecall_eval(team: list[int]) -> None:
    import math

    assert remotecall_eval("math", team[0], "floor(pi)") == 3
    assert remotecall_eval(math, 1, "floor(pi)") == 3
    assert remotecall_eval("__main__", team[:2], "y = 5") is None
    assert remotecall_eval(types.ModuleType("__main__"), team[1], "y") == 5
    with pytest.raises(RemoteException) as info:
        remotecall_eval("no_such_module", team[0], "1")
    assert isinstance(info.value.captured.ex, ModuleNotFoundError)
    with pytest.raises(CompositeException):
        remotecall_eval("__main__", team, "1/0")
    for bad in ((3, 1, "1"), ("math", None, "1"), ("math", 1, 3)):
        with pytest.raises(TypeError):
            remotecall_eval(*bad)  # type: ignore[arg-type]


# -- functions and classes ---------------------------------------------------------------------------------------


def test_a_named_function_is_defined(team: list[int]) -> None:
    everywhere("state = myid()")

    @everywhere
    def bump(by: int = 1, *, more: int = 0) -> int:
        """Documented."""
        global state  # noqa: PLW0603
        state += by + more  # type: ignore[name-defined]
        return state  # type: ignore[name-defined,no-any-return]

    assert here("bump") is bump
    assert everywhere("bump(); bump(2, more=3)", team[0]) == team[0] + 6
    assert everywhere("state", team[0]) == team[0] + 6, "its globals are those of __main__ there"
    assert everywhere("state", team[1]) == team[1]
    assert everywhere("bump.__doc__", team[1]) == "Documented."
    assert remotecall_fetch(lambda: bump.__name__, team[0]) == "bump"


def test_what_a_function_needs_comes_along_and_is_brought_up_to_date(team: list[int]) -> None:
    script = (
        "import distpool, math\n"
        "p = distpool.addprocs(1)[0]\n"
        "def helper(): return 1\n"
        "@distpool.everywhere\n"
        "def f(): return helper() + math.floor(2.5)\n"
        "assert distpool.everywhere('f()', p) == 3\n"
        "def helper(): return 10\n"
        "distpool.everywhere(f)\n"
        "assert distpool.everywhere('f()', p) == 12\n"
        "distpool.everywhere('def helper(): return 100', p)\n"
        "distpool.everywhere(f)\n"
        "assert distpool.everywhere('f()', p) == 102, 'what was defined there is not overwritten'\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_class_is_found_by_name(team: list[int]) -> None:
    @everywhere
    class Point:
        def __init__(self, x: int) -> None:
            self.x = x

    point = everywhere("Point(3)", team[0])
    assert type(point) is Point
    assert point.x == 3
    assert everywhere("type(point) is Point", team[1], point=point) is True
    assert type(remotecall_fetch(ident, team[2], point)) is Point
    old = Point

    @everywhere
    class Point:  # type: ignore[no-redef]
        y = 7

    assert everywhere("(Point.y, hasattr(Point(), 'x'))", team[0]) == (7, False)
    assert type(everywhere("Point()", team[0])) is Point
    assert Point is not old


CLASSES = """
import collections, dataclasses, enum
COUNT = 0

class S:
    made = 0
    def __init__(self, x=0):
        self.x = x
    def bump(self):
        global COUNT
        COUNT += 1
        type(self).made += 1

class SErr(Exception):
    pass

class Col(enum.Enum):
    R = 1

P = collections.namedtuple("P", "x y")

@dataclasses.dataclass
class D:
    a: int

D2 = dataclasses.make_dataclass("D2", ["a"])

if True:
    class InIf(S):
        pass
try:
    class InTry:
        class Inner:
            class Most:
                pass
finally:
    pass

def make():
    class Made:
        pass
    return Made

Made = make()
exec("class InExec: pass")
"""


def test_classes_of_source_text_are_found_by_name(team: list[int]) -> None:
    p, q = team[:2]
    everywhere(CLASSES)
    for path in ("S", "SErr", "Col", "P", "D", "D2", "InIf", "InTry.Inner.Most", "Made", "InExec"):
        own = everywhere(path, 1)
        assert everywhere(path, p) is own, path
        assert everywhere(f"given is {path}", q, given=own) is True, path
    assert type(everywhere("S(3)", p)) is here("S")
    assert everywhere("[type(x) is y for x, y in given]", p, given=[(here("S")(), here("S"))]) == [True]
    assert everywhere("Col.R", p) is here("Col").R
    for text in ("P(1, 2)", "D(1)", "D2(1)"):
        assert everywhere(text, p) == everywhere(text, 1), text
    for pids in (p, [p, q]):
        with pytest.raises((RemoteException, CompositeException)) as info:
            everywhere("raise SErr(myid())", pids)
        errors = getattr(info.value, "exceptions", [info.value])
        assert all(type(error.captured.ex) is here("SErr") for error in errors)
    ferry = distpool.RemoteChannel(None, q)
    everywhere("ferry.put(S(5))", p, ferry=ferry)
    assert everywhere("ferry.fetch().x * (type(ferry.fetch()) is S)", q, ferry=ferry) == 5
    assert type(ferry.take()) is here("S")


def test_a_function_that_is_sent_uses_the_classes_that_are_there(team: list[int]) -> None:
    everywhere(CLASSES)
    use = everywhere("lambda: S().bump()", 1)
    use()
    for _ in range(2):
        remotecall_fetch(use, team[0])
    assert [everywhere("(COUNT, S.made)", pid) for pid in (1, *team[:2])] == [(1, 1), (2, 2), (0, 0)]


def test_functions_run_the_senders_code_however_everywhere_defined_them(team: list[int]) -> None:
    everywhere("origin = myid()\ndef by_text(): return origin")

    @everywhere
    def by_object() -> int:
        return origin  # type: ignore[name-defined,no-any-return]  # noqa: F821

    assert everywhere("(by_text(), by_object())", team[0]) == (team[0], team[0])
    for name in ("by_text", "by_object"):
        assert remotecall_fetch(everywhere(f"lambda: {name}.__code__", 1), team[0]) == here(name).__code__
    assert remotecall_fetch(everywhere("lambda: by_text()", 1), team[0]) == 1


def test_a_class_is_known_by_name_while_the_text_still_runs(team: list[int]) -> None:
    channels = [distpool.RemoteChannel(None, pid) for pid in (1, team[0])]
    source = """
    class Early:
        pass
    if myid() == 1:
        ours, theirs = channels
    else:
        theirs, ours = channels
    ours.put(Early())
    seen = theirs.take(timeout=20)
    assert type(seen) is Early
    class Early:
        pass
    ours.put(Early())
    assert type(theirs.take(timeout=20)) is Early
    """
    everywhere(source, [1, team[0]], channels=channels)
    assert everywhere("type(given) is Early", team[0], given=here("Early")()) is True


def test_a_class_of_a_text_that_fails_is_known_by_name(team: list[int]) -> None:
    with pytest.raises(CompositeException) as info:
        everywhere("class Halfway(Exception): pass\nraise Halfway", [team[0], 1])
    there, local = info.value.exceptions
    assert type(there.captured.ex) is type(local) is here("Halfway")  # type: ignore[attr-defined]


def test_text_that_runs_again_replaces_its_classes(team: list[int]) -> None:
    p, q = team[:2]
    everywhere("class Again: version = 1\nold = Again()")
    first, old = here("Again"), here("old")
    everywhere("class Again: version = 2")
    second = here("Again")
    assert second is not first
    assert [everywhere("Again", pid) for pid in (p, q)] == [second, second]
    assert everywhere("(type(given) is Again, given.version)", p, given=old) == (True, 2), "old ones go by name as well"
    assert type(everywhere("old", p)) is second
    assert type(old) is first
    everywhere("class Again: version = 3", q)
    assert everywhere("given.version", q, given=second()) == 3, "each process has its own"
    assert everywhere("Again().version", p) == 2 and everywhere("Again()", q).version == 2

    @everywhere
    class Again:
        version = 4

    for pid in (p, q):
        assert everywhere("Again.version", pid) == 4 and type(everywhere("Again()", pid)) is Again
    everywhere("class Again: version = 5")
    for pid in (p, q):
        assert everywhere("given.version", pid, given=Again()) == 5
        assert type(everywhere("Again()", pid)) is here("Again") is not Again


def test_a_class_that_only_some_have_arrives_by_value(team: list[int]) -> None:
    p, q = team[:2]
    everywhere("class Theirs:\n    def who(self): return 'theirs'", p)
    value = everywhere("Theirs()", p)
    assert value.who() == "theirs" and "Theirs" not in vars(sys.modules["__main__"])
    assert type(everywhere("Theirs()", p)) is type(value)
    assert everywhere("type(given) is Theirs", p, given=value) is True, "it comes home"
    assert everywhere("given.who()", q, given=value) == "theirs"
    everywhere("class Theirs:\n    def who(self): return 'ours'", [1, q])
    assert type(everywhere("Theirs()", p)) is here("Theirs")
    assert everywhere("given.who()", q, given=here("Theirs")()) == "ours"
    everywhere("class Ours: pass", 1)
    back = remotecall_fetch(ident, p, here("Ours")())
    assert type(back) is here("Ours")


def test_classes_for_workers_to_come(team: list[int]) -> None:
    everywhere("class ForLater: pass", later=True)
    remotecall_fetch(lambda: everywhere("class FromWorker: pass", later=True), team[0])

    class Decorated:
        class Inner:
            pass

    everywhere(Decorated, later=True)
    (new,) = distpool.addprocs(1)
    try:
        for path in ("ForLater", "FromWorker", "Decorated", "Decorated.Inner"):
            assert everywhere(path, new) is everywhere(path, 1) is everywhere(path, team[1]), path
        assert everywhere("type(given) is ForLater", new, given=here("ForLater")()) is True
    finally:
        distpool.rmprocs(new)


def test_what_a_text_does_not_define_keeps_its_own_ways(team: list[int]) -> None:
    """Bindings and values that come by another way: they are numbered already, by the process that they are from."""

    class Bound:
        def __init__(self) -> None:
            self.kind = type(self)

    for _ in range(2):
        everywhere("class Local: pass\nBound = Bound\nOther = Bound", team[:2], Bound=Bound)
        assert everywhere("Bound", team[0]) is everywhere("Other", team[1]) is Bound
        assert everywhere("type(given) is Bound", team[0], given=Bound()) is True
    import colorsys

    remotecall_eval(colorsys, [1, team[0]], "class Tint: pass")
    tint = vars(colorsys)["Tint"]
    try:
        assert remotecall_eval(colorsys, team[0], "Tint") is tint, "by its module, as ever"
    finally:
        del colorsys.Tint  # type: ignore[attr-defined]


def test_strange_classes_do_no_harm(team: list[int]) -> None:
    source = """
    class Strange(type):
        def __eq__(cls, other): raise ValueError
        def __hash__(cls): raise ValueError
        def __getattribute__(cls, name): raise ValueError(name)
    class Odd(metaclass=Strange):
        pass
    class Even:
        pass
    """
    everywhere(source)
    assert everywhere("Even", team[0]) is here("Even")


def test_classes_of_files_and_of_a_script(tmp_path: Path) -> None:
    text = "class FromFile:\n    class Inner: pass\nif True:\n    class F2(FromFile): pass\n"
    (tmp_path / "defs.py").write_text(text)
    script = tmp_path / "script.py"
    script.write_text(
        "import distpool\n"
        "from distpool import everywhere, include, remotecall_fetch\n"
        "p, q = distpool.addprocs(2)\n"
        "include('defs.py')\n"
        "assert type(everywhere('F2()', p)) is F2 and everywhere('FromFile.Inner', p) is FromFile.Inner\n"
        "class Own:\n"
        "    where = 'script'\n"
        "own = Own()\n"
        "source = 'class Own: where = str(myid())'\n"
        "everywhere(source, p)\n"
        "assert everywhere('given.where', p, given=own) == 'script', 'a class of the script: by value, as ever'\n"
        "assert everywhere('Own().where', p) == str(p)\n"
        "assert type(remotecall_fetch(lambda: Own(), p)) is Own\n"
        "everywhere(source)\n"
        "assert Own is not type(own) and type(everywhere('Own()', p)) is type(everywhere('Own()', q)) is Own\n"
        "assert remotecall_fetch(lambda: Own.where, q) == str(q)\n"
        "assert type(remotecall_fetch(lambda: own, q)) is type(own)\n"
        "counted = '''\n"
        "DROPPED = 0\n"
        "class Counted:\n"
        "    def __del__(self):\n"
        "        global DROPPED\n"
        "        DROPPED += 1\n"
        "'''\n"
        "everywhere(counted)\n"
        "remotecall_fetch(lambda: [Counted() for _ in range(3)] and None, p)\n"
        "assert everywhere('DROPPED', p) == 3 and DROPPED == 0\n"
        "with distpool.ClusterExecutor(1) as executor:\n"
        "    assert type(executor.submit(lambda: Counted()).result(30)) is Counted\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_lambda_is_run(team: list[int]) -> None:
    n = 10
    assert everywhere(lambda: myid() * n, team[0]) == team[0] * n
    assert everywhere(lambda: myid() * n, 1) == n
    assert everywhere(lambda: None) is None
    with pytest.raises(CompositeException) as info:
        everywhere(lambda: 1 // (myid() - team[1]))
    assert [error.pid for error in info.value.exceptions] == [team[1]]  # type: ignore[attr-defined]
    assert everywhere(lambda: bound, team[0], bound=4) == 4  # type: ignore[name-defined]  # noqa: F821


def test_importable_functions_and_builtins(team: list[int]) -> None:
    assert everywhere(os.getpid) is os.getpid
    assert everywhere("getpid()", team[0]) != os.getpid()
    assert everywhere(ident, team[:1]) is ident
    assert everywhere("ident(4)", team[0]) == 4
    with pytest.raises(RemoteException):
        everywhere("ident", team[1])


def test_from_a_worker(team: list[int]) -> None:
    remotecall_fetch(lambda: everywhere("by_worker = 3 * myid()"), team[0])
    assert [everywhere("by_worker", pid) for pid in distpool.procs()] == [3 * pid for pid in distpool.procs()]
    assert remotecall_fetch(lambda: everywhere("by_worker", team[1]), team[0]) == 3 * team[1]


def test_a_worker_that_dies_in_it() -> None:
    pids = distpool.addprocs(2)
    with pytest.raises(CompositeException) as info:
        everywhere("import os\nif myid() == victim: os._exit(3)", pids, victim=pids[0])
    (error,) = info.value.exceptions
    assert isinstance(error, distpool.ProcessExitedException)
    assert error.worker_id == pids[0]
    with pytest.raises(distpool.ProcessExitedException):
        everywhere("1", pids[0])
    distpool.rmprocs(pids)


def test_tracebacks_show_the_source(team: list[int]) -> None:
    with pytest.raises(RemoteException) as info:
        everywhere("def deep():\n    return 1 / 0  # here\n\ndeep()", team[0])
    assert "return 1 / 0  # here" in str(info.value)
