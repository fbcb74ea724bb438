"""CONFORMANCE 2.5 - 2.7: errors with their stacks, functions, classes and globals that travel; in programs of their own
where `__main__` matters."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

import distpool
from distpool import (
    RemoteException,
    everywhere,
    fetch,
    myid,
    remote_do,
    remotecall,
    remotecall_fetch,
    remotecall_wait,
)

from .conftest import wait_until
from .helpers import ident


def run(code: str, cwd: Path | None = None, files: dict[str, str] | None = None) -> list[str]:
    """Lines that this program prints, run as a script of its own."""
    assert cwd is not None
    for name, text in (files or {}).items():
        (cwd / name).parent.mkdir(parents=True, exist_ok=True)
        (cwd / name).write_text(textwrap.dedent(text))
    script = cwd / "program.py"
    script.write_text("import distpool\nfrom distpool import *\n" + textwrap.dedent(code))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=50, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# -- errors ----------------------------------------------------------------------------------------------------------


def test_C080_remote_do_that_fails_says_so(team: list[int]) -> None:
    lines: list[tuple[int, str]] = []
    distpool.set_output_hook(lambda pid, line: lines.append((pid, line)))
    try:
        assert remote_do(lambda: 1 // 0, team[0]) is None
        wait_until(lambda: any("ZeroDivisionError" in line for _, line in lines))
    finally:
        distpool.set_output_hook(None)
    assert {pid for pid, _ in lines} == {team[0]} and any("Traceback" in line for _, line in lines)
    assert remotecall_fetch(myid, team[0]) == team[0]


def test_functions_of_a_file_that_is_run_by_runpy(tmp_path: Path) -> None:
    program = """
    class Own: pass
    def f(x): return Own() if x else g()
    def g(): return [limit]
    limit = 3
    with ClusterExecutor(1) as executor:
        assert executor.submit(f, 0).result(30) == list(executor.map(f, [0]))[0] == [3]
        assert type(executor.submit(f, 1).result(30)) is Own
    (pid,) = addprocs(1)
    assert pmap(f, [0]) == [[3]] and remotecall_fetch(f, pid, 0) == [3]
    """
    files = {"other.py": "from distpool import *\n" + textwrap.dedent(program)}
    code = """
    import runpy
    from distpool.wire import codec
    runpy.run_path("other.py")
    assert not codec.by_value_modules()
    print("passed")
    """
    assert run(code, tmp_path, files) == ["passed"]


class Falsy(Exception):
    def __bool__(self) -> bool:
        raise ValueError("neither true nor false")


def refuse() -> None:
    raise Falsy("why")


def test_an_error_that_cannot_be_formatted_ends_neither_a_worker_nor_a_wait(team: list[int]) -> None:
    lines: list[str] = []
    distpool.set_output_hook(lambda pid, line: lines.append(line))
    try:
        remote_do(refuse, team[0])
        wait_until(lambda: any("Falsy" in line for line in lines))
    finally:
        distpool.set_output_hook(None)
    assert remotecall_fetch(myid, team[0]) == team[0]
    with pytest.raises(RemoteException) as caught:
        remotecall(refuse, myid()).result(20)
    assert type(caught.value.captured.ex) is Falsy


def test_C081_remote_do_to_oneself_that_fails_says_so(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import distpool, time\ndistpool.remote_do(lambda: 1 // 0, 1)\ntime.sleep(1)\n")
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0 and "ZeroDivisionError" in done.stderr and done.stdout == ""


def test_C086_a_class_that_the_worker_cannot_import(tmp_path: Path) -> None:
    code = """
    import sys
    (pid,) = addprocs(1, env={"PYTHONPATH": ""})
    sys.path.insert(0, "only_here")
    import secret
    thing = secret.Thing()
    for call in (lambda: remotecall_fetch(id, pid, thing), lambda: remotecall_fetch(lambda: thing, pid)):
        try:
            call()
        except RemoteException as error:
            print(error.pid == pid, type(error.captured.ex).__name__, "secret" in str(error.captured.ex))
    print(remotecall_fetch(myid, pid) == pid)
    """
    lines = run(code, tmp_path, {"only_here/secret.py": "class Thing:\n    pass\n"})
    assert lines == ["True ModuleNotFoundError True"] * 2 + ["True"]


def test_C088_the_stack_of_a_function_that_only_the_worker_has(team: list[int], tmp_path: Path) -> None:
    module = tmp_path / "theirs.py"
    module.write_text("def foo():\n    raise ValueError('A.error')\n")
    remotecall_fetch(lambda: __import__("sys").path.insert(0, str(tmp_path)), team[0])
    with pytest.raises(RemoteException) as info:
        remotecall_fetch(lambda: __import__("theirs").foo(), team[0])
    error = info.value
    assert error.pid == team[0] and str(error.captured.ex) == "A.error"
    frames = [line for line in error.captured.traceback.splitlines() if line.lstrip().startswith("File ")]
    assert len(frames) > 1 and f'"{module}", line 2, in foo' in frames[-1]
    assert pickle.loads(pickle.dumps(error.captured.traceback)) == error.captured.traceback
    assert "theirs" not in sys.modules


def test_C092_an_exception_whose_class_is_not_here(team: list[int], tmp_path: Path) -> None:
    (tmp_path / "theirs_only.py").write_text(
        "class OwnError(Exception):\n    pass\ndef foo():\n    raise OwnError('x7')\n"
    )
    remotecall_fetch(lambda: __import__("sys").path.insert(0, str(tmp_path)), team[0])
    for ask in (
        lambda: remotecall_fetch(lambda: __import__("theirs_only").foo(), team[0]),
        lambda: fetch(remotecall(lambda: __import__("theirs_only").foo(), team[0])),
    ):
        with pytest.raises(RemoteException) as info:
            ask()
        text = str(info.value)
        assert "OwnError" in text and "x7" in text and "in foo" in text
        assert "rebuilt" in text or "ModuleNotFoundError" in text, "it says why it is not the exception itself"
    assert "theirs_only" not in sys.modules


def test_C094_causes_keep_their_stacks(team: list[int]) -> None:
    def deep() -> None:
        raise KeyError("deep")

    def nested() -> None:
        caught: list[BaseException] = []

        def work() -> None:
            try:
                deep()
            except KeyError as error:
                caught.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        try:
            raise LookupError("middle") from caught[0]
        except LookupError:
            raise RuntimeError("outer")  # noqa: B904

    with pytest.raises(RemoteException) as info:
        remotecall_fetch(nested, team[0])
    text = str(info.value)
    for part in ("KeyError: 'deep'", "in deep", "LookupError: middle", "RuntimeError: outer", "direct cause", "During"):
        assert part in text, part
    assert repr(info.value)


# -- functions, classes and globals ----------------------------------------------------------------------------------


def test_C097_C098_C103_C106_globals_of_a_script(tmp_path: Path) -> None:
    code = """
    (pid,) = addprocs(1)
    v1 = 1
    print([remotecall_fetch(lambda: v1, pid) for v1 in (1, 2, 3, 2)])
    v2 = [0] * 3
    seen = []
    for i in range(3):
        v2[i] = i + 1
        seen.append(remotecall_fetch(lambda: v2, pid))
    print(seen)
    v2 = [1, 2, 3]
    print(remotecall_fetch(lambda: (v2.append(4), v2)[1], pid), remotecall_fetch(lambda: v2, pid), v2)
    f1 = lambda x: x + 1
    f2 = lambda x: f1(x)
    print(remotecall_fetch(f2, pid, 1), remotecall_fetch(lambda: f2(2), pid))
    f1 = lambda x: x - 1
    print(remotecall_fetch(f2, pid, 1))
    """
    assert run(code, tmp_path) == [
        "[1, 2, 3, 2]",
        "[[1, 0, 0], [1, 2, 0], [1, 2, 3]]",
        "[1, 2, 3, 4] [1, 2, 3] [1, 2, 3]",
        "2 3",
        "0",
    ]


def test_C101_classes_of_a_script(tmp_path: Path) -> None:
    code = """
    class Point:
        def __init__(self, x):
            self.x = x
        def double(self):
            return Point(2 * self.x)
    (pid,) = addprocs(1)
    back = remotecall_fetch(lambda p: p.double(), pid, Point(4))
    print(isinstance(back, Point), type(back) is Point, back.x, remotecall_fetch(Point, pid, 7).x)
    print(type(remotecall_fetch(lambda: Point(1).double(), pid)) is Point)
    print(remotecall_fetch(lambda c: c(3).x, pid, Point))
    """
    assert run(code, tmp_path) == ["True True 8 7", "True", "3"]


class CountsPickles:
    def __init__(self) -> None:
        self.count = 0

    def __reduce__(self) -> Any:
        self.count += 1
        return CountsPickles, ()


def test_C105_once_per_message_and_once_per_worker(team: list[int]) -> None:
    counted = CountsPickles()
    one, two = remotecall_fetch(ident, team[0], [counted, counted])
    assert counted.count == 1 and one is two
    counted = CountsPickles()
    with distpool.ClusterExecutor(2) as executor:
        assert len(list(executor.map(lambda n: (counted.count, n)[1], range(100)))) == 100
    assert counted.count == 1, "Executor.map: once per call"
    counted = CountsPickles()
    pool = distpool.CachingPool(team)
    assert distpool.pmap(lambda n: (counted.count, n)[1], range(100), pool=pool) == list(range(100))
    assert 1 <= counted.count <= len(team)
    pool.clear()


def test_C107_what_everywhere_has_set_is_left_alone(tmp_path: Path) -> None:
    code = """
    (pid,) = addprocs(1)
    everywhere("shared = 'theirs'", pid)
    shared = "ours"
    print(remotecall_fetch(lambda: shared, pid), everywhere("shared", pid))
    """
    assert run(code, tmp_path) == ["ours theirs"]


def test_C109_functions_by_name_and_by_value(tmp_path: Path) -> None:
    code = """
    import os, sys
    (pid,) = addprocs(1, env={"PYTHONPATH": os.path.abspath("there")})
    sys.path.insert(0, "here")
    import both
    from both import which
    def mine():
        return "sender's " + which()
    print(remotecall_fetch(which, pid), which(), remotecall_fetch(mine, pid))
    everywhere("def mine(): return 'worker\\\\'s'", pid)
    print(remotecall_fetch(mine, pid), remotecall_fetch(lambda: mine(), pid))
    """
    files = {f"{place}/both.py": f"def which():\n    return '{place}'\n" for place in ("here", "there")}
    assert run(code, tmp_path, files) == ["there here sender's there", "sender's there sender's there"]


def test_C191_imports_reach_others_by_everywhere_only(team: list[int]) -> None:
    import colorsys  # noqa: F401

    fresh = distpool.addprocs(1)
    try:
        assert not remotecall_fetch(lambda: "colorsys" in __import__("sys").modules, fresh[0])
        everywhere("import colorsys", fresh)
        assert remotecall_fetch(lambda: "colorsys" in __import__("sys").modules, fresh[0])
        assert everywhere("colorsys.rgb_to_hsv(0, 0, 0)", fresh[0]) == (0.0, 0.0, 0)
    finally:
        distpool.rmprocs(fresh)


# -- the order of sending, the end of the program ----------------------------------------------------------------------


def test_C079_calls_are_sent_in_order(team: list[int]) -> None:
    """What one thread sends to one process is received in that order: puts into a channel there are in order."""
    channel = distpool.RemoteChannel(lambda: distpool.Channel(1000), team[0])
    seen = []
    for number in range(300):
        distpool.put(channel, number)
    for _ in range(300):
        seen.append(distpool.take(channel))
    assert seen == list(range(300))
    order = [remotecall(ident, team[0], number) for number in range(300)]
    assert [distpool.remoteref_id(ref).id for ref in order] == sorted(distpool.remoteref_id(ref).id for ref in order)
    assert [fetch(ref) for ref in order] == list(range(300))


def test_C260_threads_that_wait_do_not_hold_up_the_end(tmp_path: Path) -> None:
    code = """
    import threading, time
    (pid,) = addprocs(1)
    channel = RemoteChannel(None, pid)
    for wait in (channel.take, lambda: remotecall_fetch(time.sleep, pid, 100), lambda: fetch(Future(pid))):
        threading.Thread(target=wait, daemon=True).start()
    time.sleep(0.5)
    print("end")
    """
    assert run(code, tmp_path)[-1] == "end"


INTERRUPTED = """
import distpool, os, signal, threading, time
from distpool import *
pids = addprocs(2)
channel = RemoteChannel(None, pids[0])
def later():
    time.sleep(0.5)
    os.killpg(os.getpgid(0), signal.SIGINT)
for wait in (
    lambda: remotecall_fetch(time.sleep, pids[0], 3),
    lambda: pmap(time.sleep, [3, 3]),
    lambda: channel.take(),
    lambda: fetch(Future(pids[1])),
    lambda: remotecall(time.sleep, pids[1], 3).wait(),
):
    threading.Thread(target=later).start()
    begin = time.monotonic()
    try:
        wait()
        print("through")
    except KeyboardInterrupt:
        print("interrupted", time.monotonic() - begin < 2.5)
print([remotecall_fetch(myid, pid) for pid in pids] == pids)
"""


def test_C266_ctrl_c_gives_control_back_and_kills_no_worker(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(INTERRUPTED)
    environment = {**os.environ, "PYTHONPATH": str(Path(distpool.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True,
        text=True,
        timeout=50,
        start_new_session=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["interrupted True"] * 5 + ["True"]


def test_C052_a_rendezvous_put_returns_when_the_value_is_out(team: list[int]) -> None:
    numpy = pytest.importorskip("numpy")
    channel = distpool.RemoteChannel(lambda: distpool.Channel(0, type=numpy.ndarray))
    assert distpool.channel_from_id(distpool.remoteref_id(channel)).type is numpy.ndarray

    def produce() -> None:
        big = numpy.zeros(300_000)
        for number in range(1, 11):
            big[0] = number
            channel.put(big)

    thread = threading.Thread(target=produce)
    thread.start()
    assert remotecall_fetch(lambda: [float(channel.take()[0]) for _ in range(10)], team[0]) == [
        float(number) for number in range(1, 11)
    ]
    thread.join(10)
    with pytest.raises(TypeError):
        channel.put([1.0])


def test_C050_a_channel_closed_with_an_error(team: list[int]) -> None:
    channel = distpool.Channel(2)
    channel.put(1)
    channel.close(ValueError("why"))
    assert channel.take() == 1
    for use in (channel.take, lambda: channel.put(2), lambda: list(channel)):
        with pytest.raises(ValueError, match="why"):
            use()


def test_C088_wait_of_a_failed_call(team: list[int]) -> None:
    with pytest.raises(RemoteException, match="division"):
        remotecall_wait(lambda: 1 // 0, team[0])
