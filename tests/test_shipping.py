"""Modules that workers fetch when they import them. Local workers would find them anyway, so these are made to forget
where this program's modules are."""

from __future__ import annotations

import _imp
import importlib
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import distpool
from distpool import RemoteException, addprocs, remotecall, remotecall_fetch, rmprocs, shipping
from distpool.managers.unpacking import Cache

MODULES = {
    "fetched_one": "VALUE = 1\ndef f(a):\n    return a + VALUE\nclass Point:\n    x = 3\n",
    "fetched_two": "import fetched_one, fetched_three\nVALUE = fetched_one.VALUE + fetched_three.VALUE\n",
    "fetched_three": "VALUE = 2\n",
    "fetched_broken": "import no_such_module_anywhere\n",
    "fetched_failing": "raise RuntimeError('at import')\n",
    "fetched_circle_a": "import time; time.sleep(0.05)\nimport fetched_circle_b\nVALUE = 'a'\n",
    "fetched_circle_b": "import time; time.sleep(0.05)\nimport fetched_circle_a\nVALUE = 'b'\n",
    "fetched_calls": (
        "import distpool\n"
        "def ask():\n"
        "    import fetched_one\n"
        "    return fetched_one.Point\n"
        "class Mine:\n"
        "    pass\n"
        "def give():\n"
        "    import fetched_calls\n"
        "    return fetched_calls.Mine\n"
        "POINT = distpool.remotecall_fetch(ask, 1) if distpool.myid() != 1 else None\n"
        "CLASS = distpool.remotecall_fetch(give, 1) if distpool.myid() != 1 else None\n"
    ),
    "fetched_package/__init__": "from fetched_package.inner import VALUE\n",
    "fetched_package/inner": "VALUE = 5\n",
}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    place = tmp_path / "tree"
    (place / "fetched_package").mkdir(parents=True)
    for name, text in MODULES.items():
        (place / f"{name}.py").write_text(text)
    (place / "fetched_package" / "data.txt").write_text("data")
    for number in range(24):
        (place / f"fetched_many_{number}.py").write_text(f"import fetched_one\nVALUE = {number}\n")
    monkeypatch.syspath_prepend(place)
    yield place
    for name in [name for name in sys.modules if name.startswith("fetched_")]:
        del sys.modules[name]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What the master was asked for. (It keeps the functions that it is asked to call, so they stay as they are.)"""
    found: list[tuple[str, str]] = []
    own_module, offered = shipping.own_module, shipping._offered

    def look(name: str) -> Any:
        found.append(("offer", name))
        return own_module(name)

    class Offered:
        """The table of the node."""

        def __init__(self, node: Any) -> None:
            self.table = offered(node)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.table, name)

        def __setitem__(self, digest: str, packed: Any) -> None:
            self.table[digest] = packed

        def __iter__(self) -> Iterator[str]:
            return iter(self.table)

        def get(self, digest: str) -> Any:
            found.append(("content", next(iter(self.table[digest]._files))[0].partition("/")[0].removesuffix(".py")))
            return self.table[digest]

    monkeypatch.setattr(shipping, "own_module", look)
    monkeypatch.setattr(shipping, "_offered", Offered)
    return found


@pytest.fixture
def start(tree: Path, tmp_path: Path) -> Iterator[Callable[[int], list[int]]]:
    root = tmp_path / "cache"
    Cache(str(root)).prepare()

    def make(count: int) -> list[int]:
        pids = addprocs(count)
        hidden, cache = str(tree), str(root)

        def forget() -> None:
            import sys

            from distpool import shipping

            sys.path[:] = [entry for entry in sys.path if entry != hidden]
            sys.path_importer_cache.clear()
            shipping.install(cache)

        for pid in pids:
            remotecall_fetch(forget, pid)
        return pids

    yield make
    rmprocs(distpool.procs()[1:])


# By value: what is looked at is what the worker imports.
value = lambda name, attribute="VALUE": getattr(__import__("importlib").import_module(name), attribute)
has_spec = lambda name: __import__("importlib.util").util.find_spec(name) is not None


def test_a_module_that_is_missing(start: Any, tree: Path, asked: list[tuple[str, str]]) -> None:
    (pid,) = start(1)
    assert remotecall_fetch(value, pid, "fetched_two") == 3
    assert remotecall_fetch(value, pid, "fetched_package") == 5
    assert remotecall_fetch(value, pid, "fetched_package.inner") == 5
    place = remotecall_fetch(value, pid, "fetched_one", "__file__")
    assert not place.startswith(str(tree)) and place.endswith("fetched_one.py")
    read = lambda: __import__("importlib.resources").resources.files("fetched_package").joinpath("data.txt").read_text()
    assert remotecall_fetch(read, pid) == "data"
    assert len(asked) == len(set(asked)) == 8, "each once"


def test_functions_and_classes_by_reference(start: Any) -> None:
    import fetched_one  # type: ignore[import-not-found]

    (pid,) = start(1)
    assert remotecall_fetch(fetched_one.f, pid, 41) == 42
    assert isinstance(remotecall_fetch(lambda point: point, pid, fetched_one.Point()), fetched_one.Point)
    pool = distpool.WorkerPool([pid])
    with distpool.ClusterExecutor(pool) as executor:
        assert list(executor.map(fetched_one.f, range(10))) == list(range(1, 11))


def test_the_workers_of_a_host_fetch_it_once(start: Any, asked: list[tuple[str, str]]) -> None:
    first, second = start(2)
    for pid in (first, second):
        assert remotecall_fetch(value, pid, "fetched_three") == 2
    assert asked.count(("offer", "fetched_three")) == 2 and asked.count(("content", "fetched_three")) == 1


def test_what_nobody_has_is_missing_at_once(start: Any, asked: list[tuple[str, str]]) -> None:
    (pid,) = start(1)
    began = time.monotonic()
    for _ in range(3):
        with pytest.raises(RemoteException) as info:
            remotecall_fetch(value, pid, "no_such_module_anywhere")
        error = info.value.captured.ex
        assert type(error) is ModuleNotFoundError and error.name == "no_such_module_anywhere"
        assert str(error) == "No module named 'no_such_module_anywhere'"
    assert time.monotonic() - began < 5 and asked == [("offer", "no_such_module_anywhere")]
    with pytest.raises(RemoteException, match="No module named 'no_such_module_anywhere'"):
        remotecall_fetch(value, pid, "fetched_broken")
    with pytest.raises(RemoteException, match="at import"):
        remotecall_fetch(value, pid, "fetched_failing")
    assert remotecall_fetch(has_spec, pid, "fetched_one") and not remotecall_fetch(has_spec, pid, "nor_this_one")


def test_it_may_be_there_later(start: Any, tree: Path) -> None:
    (pid,) = start(1)
    with pytest.raises(RemoteException, match="fetched_later"):
        remotecall_fetch(value, pid, "fetched_later")
    (tree / "fetched_later.py").write_text("VALUE = 9\n")
    importlib.invalidate_caches()
    remotecall_fetch(lambda: __import__("importlib").invalidate_caches(), pid)
    assert remotecall_fetch(value, pid, "fetched_later") == 9


def test_the_standard_library_is_never_asked_for(start: Any, asked: list[tuple[str, str]]) -> None:
    (pid,) = start(1)
    for name in ("msvcrt", "winreg", "distpool.nothing", "os.nothing"):
        with pytest.raises(RemoteException, match="No module named"):
            remotecall_fetch(value, pid, name)
    assert not asked


def test_what_is_handed_out(tree: Path) -> None:
    assert shipping.own_module("fetched_one") is not None and shipping.own_module("fetched_package") is not None
    for name in (
        "os",
        "json",
        "sys",
        "numpy",
        "psutil",
        "distpool",
        "cloudpickle",
        "__main__",
        "no_such",
        "a.b",
        "",
        7,
    ):
        assert shipping.own_module(name) is None, name  # type: ignore[arg-type]
        assert shipping.offer(name) is None  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has changed meanwhile"):
        shipping.content("fetched_one", "0" * 40)


# -- locks -------------------------------------------------------------------------------------------------------


def test_modules_that_call_while_they_are_imported(start: Any) -> None:
    """The answer is a class of a module that has to be fetched, or of the very module that is being imported."""
    (pid,) = start(1)
    assert remotecall_fetch(lambda: __import__("fetched_calls").POINT.x, pid) == 3
    assert remotecall_fetch(lambda: __import__("fetched_calls").CLASS is __import__("fetched_calls").Mine, pid)


def test_many_threads_that_import(start: Any) -> None:
    (pid,) = start(1)
    calls = [remotecall(value, pid, f"fetched_many_{number}") for number in range(24)]
    assert [call.result(40) for call in calls] == list(range(24))


def test_circles_between_threads(start: Any) -> None:
    (pid,) = start(1)
    both = [remotecall(value, pid, "fetched_circle_a"), remotecall(value, pid, "fetched_circle_b")]
    assert [call.result(40) for call in both] == ["a", "b"]


def test_others_import_while_the_answer_is_awaited(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python holds the import lock while it asks a finder; here the master's answer depends on another import there."""
    (pid,) = start(1)
    real = shipping.own_module
    names: list[str] = []

    def look(name: str) -> Any:
        if name == "fetched_one":
            names.append(remotecall(value, pid, "colorsys", "__name__").result(20))
        return real(name)

    monkeypatch.setattr(shipping, "own_module", look)
    assert remotecall(value, pid, "fetched_one").result(30) == 1 and names == ["colorsys"]


def test_interrupts_while_it_is_awaited(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (pid,) = start(1)
    asked, go_on = threading.Event(), threading.Event()
    real = shipping.own_module

    def look(name: str) -> Any:
        asked.set()
        go_on.wait(20)
        return real(name)

    monkeypatch.setattr(shipping, "own_module", look)
    call = remotecall(value, pid, "fetched_one")
    assert asked.wait(20)
    distpool.interrupt(pid)
    with pytest.raises(RemoteException) as info:
        call.result(20)
    assert isinstance(info.value.captured.ex, KeyboardInterrupt)
    go_on.set()
    assert remotecall(value, pid, "fetched_one").result(20) == 1


def test_the_import_lock_is_given_back() -> None:
    for depth in range(3):
        for _ in range(depth):
            _imp.acquire_lock()
        with shipping.import_lock_released():
            assert not _imp.lock_held()
        for _ in range(depth):
            _imp.release_lock()
        with pytest.raises(RuntimeError):
            _imp.release_lock()


def test_a_process_that_is_alone_fetches_nothing(tmp_path: Path) -> None:
    assert shipping.Fetcher(str(tmp_path)).find_spec("fetched_one") is None


def test_a_disk_that_cannot(start: Any, tmp_path: Path) -> None:
    (pid,) = start(1)
    import shutil

    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("")
    with pytest.raises(RemoteException, match="fetched_one cannot be fetched from process 1") as info:
        remotecall_fetch(value, pid, "fetched_one")
    assert type(info.value.captured.ex) is ImportError


def test_threads_that_offer_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = itertools.count()
    monkeypatch.setattr(shipping, "own_module", lambda name: name)
    monkeypatch.setattr(shipping.archive, "pack", lambda source: SimpleNamespace(digest=str(next(numbers))))
    offered: dict[str, Any] = {}
    monkeypatch.setattr(shipping, "_offered", lambda node: offered)
    problems: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(5_000):
                shipping.offer("module")
        except RuntimeError as error:
            problems.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    finally:
        sys.setswitchinterval(interval)
    assert not problems and len(offered) <= shipping._REMEMBERED + len(threads)
