"""`everywhere` and its kin in a process that is alone, and what is kept for workers to come."""

from __future__ import annotations

import io
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distpool import broadcast
from distpool.broadcast import clear, everywhere, include, remotecall_eval
from distpool.errors import CompositeException, RemoteException
from distpool.node import group as groups
from distpool.node import node as nodes

PATIENCE = 30.0


@pytest.fixture(autouse=True)
def names() -> Iterator[dict[str, Any]]:
    """The globals of `__main__`, as they were before."""
    import __main__

    before = dict(vars(__main__))
    yield vars(__main__)
    for name in set(vars(__main__)) - set(before):
        del vars(__main__)[name]


@pytest.fixture
def group() -> Iterator[groups.Group]:
    found = groups.of(nodes.current())
    yield found
    on_leader(found.prologues.clear)


def on_leader(function: Callable[[], Any]) -> None:
    """Run it there, after all that was asked for before."""
    done = threading.Event()
    loop = nodes.current().loop
    loop.call_soon(lambda: (function(), done.set()))
    with loop.following():
        assert done.wait(PATIENCE)


# -- source text ---------------------------------------------------------------------------------------------------


def test_text_runs_in_main_with_its_bindings(names: dict[str, Any]) -> None:
    assert everywhere("bc_x = size * 2", size=4) is None
    assert names["bc_x"] == 8 and names["size"] == 4
    assert everywhere("bc_x + 1", 1) == 9, "one pid: the value of the last expression"
    assert everywhere("bc_x + 1", [1]) is None
    assert everywhere("bc_x = 1", 1) is None


def test_indented_text_is_as_good(names: dict[str, Any]) -> None:
    everywhere(
        """
        def bc_twice(x):
            return x * 2
        """
    )
    assert names["bc_twice"](4) == 8


def test_as_often_as_a_pid_is_named(names: dict[str, Any]) -> None:
    everywhere("bc_n = 0")
    everywhere("bc_n += 1", [1, 1, 1])
    everywhere("bc_n += 1", [])
    assert names["bc_n"] == 3


def test_errors_of_one_and_of_several(names: dict[str, Any]) -> None:
    with pytest.raises(RemoteException) as alone:
        everywhere("1 / 0", 1)
    assert isinstance(alone.value.captured.ex, ZeroDivisionError)
    with pytest.raises(CompositeException) as several:
        everywhere("1 / 0", [1, 1])
    assert [type(error) for error in several.value.exceptions] == [ZeroDivisionError] * 2


def test_what_is_wrong_with_the_text_or_its_imports_is_raised_before_anything_runs(names: dict[str, Any]) -> None:
    with pytest.raises(SyntaxError):
        everywhere("bc_y = 1\nx =")
    with pytest.raises(ModuleNotFoundError):
        everywhere("bc_y = 1\nimport no_such_module_of_ours")
    assert "bc_y" not in names


@pytest.mark.parametrize("wrong", ["return 1", "break", "await x", "yield 1", "nonlocal z"])
def test_what_only_a_compiler_finds_is_raised_before_anything_runs(names: dict[str, Any], wrong: str) -> None:
    for text in (wrong, f"bc_y = 1\n{wrong}", f"import no_such_module_of_ours\n{wrong}"):
        for call in (everywhere, lambda text: remotecall_eval("__main__", 1, text)):
            with pytest.raises(SyntaxError):
                call(text)
    assert "bc_y" not in names


def test_a_warning_of_the_compiler_comes_once(names: dict[str, Any], tmp_path: Path) -> None:
    text = "bc_y = 1\nbc_y is 1\nbc_text = '\\d'\nbc_y"
    (tmp_path / "warns.py").write_text(text)
    calls: tuple[Callable[[], object], ...] = (
        lambda: everywhere(text),
        lambda: everywhere(text, 1),
        lambda: include(tmp_path / "warns.py", [1, 1]),
        lambda: remotecall_eval("__main__", 1, text),
    )
    for call in calls:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            call()
        assert sorted(str(warning.message).partition(" ")[0].strip('"') for warning in seen) == ["invalid", "is"]
        assert {warning.lineno for warning in seen} == {2, 3}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for call in calls:
            with pytest.raises(SyntaxError):
                call()


def test_what_is_no_exception_is_an_error_all_the_same(names: dict[str, Any]) -> None:
    for kind in (SystemExit, GeneratorExit, BaseException):
        with pytest.raises(RemoteException) as alone:
            everywhere("raise bc_kind", 1, bc_kind=kind)
        assert type(alone.value.captured.ex) is kind and alone.value.__cause__ is alone.value.captured.ex
        with pytest.raises(CompositeException) as several:
            everywhere("raise bc_kind", [1, 1])
        errors: Any = several.value.exceptions
        assert [(type(error), type(error.captured.ex), error.pid) for error in errors] == [
            (RemoteException, kind, 1)
        ] * 2
    for pids in (1, [1]):
        with pytest.raises(KeyboardInterrupt):
            everywhere("raise KeyboardInterrupt", pids)


@pytest.mark.parametrize("pids", [True, [1, True], ["1"], 1.0, [None]])
def test_pids_are_ints(pids: Any) -> None:
    with pytest.raises(TypeError):
        everywhere("1", pids)


def test_unknown_pids_are_refused_before_anything_runs(names: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="987654"):
        everywhere("bc_y = 1", [1, 987654])
    assert "bc_y" not in names


def test_misuse() -> None:
    for arguments in ((5,), (None,), (b"x = 1",)):
        with pytest.raises(TypeError, match="source text or something callable"):
            everywhere(*arguments)
    with pytest.raises(ValueError, match="later=True"):
        everywhere("1", [1], later=True)


# -- functions and classes -----------------------------------------------------------------------------------------


def test_named_things_are_defined_and_returned(names: dict[str, Any]) -> None:
    def bc_function() -> int:
        return 5

    class bc_Class:
        pass

    assert everywhere(bc_function) is bc_function is names["bc_function"]
    assert everywhere(bc_Class, 1) is bc_Class is names["bc_Class"]


def test_what_has_no_name_is_run(names: dict[str, Any]) -> None:
    assert everywhere(lambda: 6, 1) == 6
    assert everywhere(lambda: 6) is None
    with pytest.raises(RemoteException):
        everywhere(lambda: 1 / 0, 1)


# -- modules and files ---------------------------------------------------------------------------------------------


def test_code_in_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("bc_module")
    monkeypatch.setitem(sys.modules, "bc_module", module)
    assert remotecall_eval("bc_module", 1, "a = 3\na + 1") == 4 and module.a == 3
    assert remotecall_eval(module, [1], "a = 4") is None and module.a == 4
    with pytest.raises(RemoteException):
        remotecall_eval("bc_no_module", 1, "1")
    for arguments in ((5, 1, "1"), ("bc_module", 1, 5), ("bc_module", None, "1")):
        with pytest.raises(TypeError):
            remotecall_eval(*arguments)


def test_code_in_a_module_that_is_at_hand(names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It need not be found by its name, and what is found by that may be another one."""
    module = types.ModuleType("bc_at_hand")
    assert remotecall_eval(module, 1, "a = 3\na + 1") == 4
    assert remotecall_eval(module, [1, 1], "a += 1") is None and module.a == 5
    monkeypatch.setitem(sys.modules, "bc_at_hand", types.ModuleType("bc_at_hand"))
    assert remotecall_eval(module, 1, "a") == 5
    main = types.ModuleType("__main__")
    remotecall_eval(main, 1, "bc_there = 1")
    assert main.bc_there == 1 and "bc_there" not in names
    clear("a", 1, mod=module)
    assert module.a is None
    with pytest.raises(RemoteException):
        clear("a", 1, mod="bc_nowhere")
    for mod in (5, None):
        with pytest.raises(TypeError, match="module"):
            clear("a", 1, mod=mod)  # type: ignore[arg-type]


def test_a_file_starts_at_the_callers_folder(names: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "inner.py").write_text("bc_inner = 1\nbc_inner + 1\n")
    outer = tmp_path / "outer.py"
    outer.write_text("from distpool import include\nbc_value = include('inner.py', 1)\n")
    assert include(str(outer)) is None and names["bc_value"] == 2
    assert include(outer.with_name("inner.py"), 1) == 2
    with pytest.raises(FileNotFoundError):
        include("bc_no_file.py")


def test_encodings_and_errors_of_files(names: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "latin.py").write_bytes("# -*- coding: latin-1 -*-\nbc_text = 'ä'\r\n".encode("latin-1"))
    include(tmp_path / "latin.py")
    assert names["bc_text"] == "ä"
    bad: tuple[bytes, ...] = (b"x = = 1\n", b"bc_text = 1\nreturn 1\n", b"x = '\xe4'\n", b"# -*- coding: no-such -*-\n")
    for data in bad:
        (tmp_path / "bad.py").write_bytes(data)
        with pytest.raises(SyntaxError) as info:
            include(tmp_path / "bad.py")
        assert info.value.filename == str(tmp_path / "bad.py") or b"coding" in data
    assert names["bc_text"] == "ä"


def test_names_are_set_to_none_where_they_are(names: dict[str, Any]) -> None:
    names.update(bc_a=1, bc_b=2, bc_c=3)
    clear("bc_a", 1)
    clear(["bc_b", "bc_none"], [1])
    assert (names["bc_a"], names["bc_b"], names["bc_c"]) == (None, None, 3) and "bc_none" not in names
    clear("bc_c")  # all workers: this process, where it is alone
    assert names["bc_c"] is None
    with pytest.raises(TypeError):
        clear([5])


# -- for workers to come -------------------------------------------------------------------------------------------


def test_what_ran_here_is_kept_and_what_failed_is_not(group: groups.Group) -> None:
    everywhere("bc_kept = 1", later=True)
    with pytest.raises(CompositeException):
        everywhere("1 / 0", later=True)
    on_leader(lambda: None)
    assert [action.text for action in group.prologues] == ["bc_kept = 1"]


def test_only_the_one_that_failed_is_forgotten(group: groups.Group) -> None:
    """Text and bindings may be alike, and need not be comparable: nobody asks them, least of all on the leader."""
    text = "if bc_fail:\n    1 / 0"
    fails = np.zeros(1)
    everywhere(text, later=True, bc_fail=fails)
    fails[0] = 1
    for table in (fails, np.ones(1)):
        with pytest.raises(CompositeException):
            everywhere(text, later=True, bc_fail=table)
    on_leader(lambda: None)
    assert len(group.prologues) == 1 and group.prologues[0].bindings["bc_fail"] is fails


def test_a_worker_that_joins_at_once_gets_it(group: groups.Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """It joins on the leader, right behind the moment in which the text was kept there."""
    ran: list[int] = []
    monkeypatch.setattr(group, "run_prologue", lambda action, pid: None)
    monkeypatch.setattr(broadcast, "_run_prologue", lambda action, pid: ran.append(pid))
    loop = nodes.current().loop
    whole = loop.call_soon

    def join_behind(callback: Callable[[], object]) -> None:
        whole(lambda: (callback(), [group.run_prologue(action, 5) for action in group.prologues]))

    monkeypatch.setattr(loop, "call_soon", join_behind)
    broadcast._keep_for_later(broadcast._for_callable(lambda: None, {}))
    monkeypatch.undo()
    assert 5 in ran


def test_errors_on_workers_that_join_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    class Unsendable(broadcast._Run):
        def start(self, pid: int, times: int) -> Any:
            raise ValueError("no way")

    broadcast._run_prologue(Unsendable(lambda: None, {}), 5)
    assert capsys.readouterr().err == "everywhere(later=True) failed on worker 5: no way\n"
    closed = io.StringIO()
    closed.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", closed)
        broadcast._run_prologue(Unsendable(lambda: None, {}), 5)


def test_texts_have_names_that_no_tool_takes_for_files(names: dict[str, Any], tmp_path: Path) -> None:
    """Seen: `coverage report` and `trace --count` ended with an error, as they could not read what had run."""
    names["seen"] = []
    inner = "seen.append(sys._getframe().f_code.co_filename); include('part.py')"
    (tmp_path / "part.py").write_text("seen.append('part')\n")
    outer = tmp_path / "outer.py"
    outer.write_text(
        f"import sys\nfrom distpool import everywhere, include\neverywhere({f'everywhere({inner!r})'!r})\n"
    )
    include(outer)
    name, part = names["seen"]
    assert name.startswith(f"<{outer} (everywhere ") and name.endswith(")>") and part == "part"
