"""How a started process becomes a worker: its sockets, its surroundings, and its exit code."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distpool import startup

REPO = str(Path(__file__).resolve().parents[1])


# -- sockets ---------------------------------------------------------------------------------------------------------


def settings(**changes: Any) -> dict[str, Any]:
    return {"transport": "unix", "directory": "", "bind": "127.0.0.1", **changes}


@pytest.fixture
def short() -> Iterator[str]:
    """A directory whose path leaves room for the names of sockets."""
    with tempfile.TemporaryDirectory(prefix="dp", dir="/tmp") as name:
        yield name


def test_a_unix_socket(short: str) -> None:
    with startup.listen(settings(directory=short), "w1") as listener:
        path = os.path.join(short, "w1.sock")
        assert startup.unix_path(listener) == path
        assert startup.address_of(listener, settings()) == ["unix", path]
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
    startup.remove(path)
    startup.remove(path)
    startup.remove("")
    assert not os.path.exists(path)


@pytest.mark.parametrize("directory", ["/no/such/directory", "/tmp/" + "x" * 200])
def test_tcp_where_the_file_system_refuses(directory: str) -> None:
    with startup.listen(settings(directory=directory), "w1") as listener:
        kind, host, port = startup.address_of(listener, settings())
        assert (kind, host) == ("tcp", "127.0.0.1") and startup.unix_path(listener) == ""
        socket.create_connection((host, port), 10).close()


def test_tcp() -> None:
    with startup.listen(settings(transport="tcp"), "w1") as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
    with pytest.raises(OSError):
        startup.listen(settings(transport="tcp", bind="192.0.2.1"), "w1")  # an address of nobody


# -- the entry point -------------------------------------------------------------------------------------------------


@pytest.fixture
def entry(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("some_entry")
    monkeypatch.setitem(sys.modules, "some_entry", module)
    return module


@pytest.mark.parametrize(
    ("outcome", "code", "text"),
    [
        (None, 0, ""),
        (5, 5, ""),
        (True, 1, ""),
        (SystemExit(), 0, ""),
        (SystemExit(7), 7, ""),
        (SystemExit("why"), 1, "why\n"),
        (KeyError("x"), 1, "KeyError: 'x'"),
        (KeyboardInterrupt(), 1, "KeyboardInterrupt"),
    ],
)
def test_outcomes_become_exit_codes(
    entry: Any, outcome: Any, code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[Any] = []

    def run(listener: Any, found: Any) -> Any:
        given.append((listener, found))
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    entry.run = run
    listener: Any = object()
    order = {"entry": "some_entry:run"}
    assert startup.run(listener, order) == code
    assert given == [(listener, order)]
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("name", ["some_entry:no", "no_such_module_here:run"])
def test_an_entry_point_that_is_not_there(entry: Any, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert startup.run(None, {"entry": name}) == 1  # type: ignore[arg-type]
    assert "Error" in capsys.readouterr().err


def test_directories_may_have_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Finder:
        def invalidate_caches(self) -> None:
            asked.append("finder")

    monkeypatch.setattr(sys, "path_importer_cache", {"a": Finder(), "b": None, "c": object()})
    startup._forget_directories()
    assert asked == ["finder"]


# -- a whole process: all of this is for good ------------------------------------------------------------------------


def child(code: str, *, stdin: Any = subprocess.DEVNULL, **options: Any) -> subprocess.Popen[str]:
    text = f"import os, sys; sys.path.insert(0, {REPO!r}); from distpool import startup\n{code}"
    env = {**os.environ, **options.pop("env", {})}
    return subprocess.Popen(
        [sys.executable, "-c", text],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        **options,
    )


def outcome(code: str, **options: Any) -> tuple[int, str, str]:
    process = child(code, **options)
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


def test_surroundings_of_a_worker(tmp_path: Path) -> None:
    order = {"cwd": str(tmp_path), "sys_path": ["/first"], "own_path": True}
    code, out, err = outcome(
        "import random; before = random.Random(); random.seed(1); old = sys.modules['__main__']\n"
        "sys.modules['__mp_main__'] = old; secret = 1\n"
        f"startup.prepare({order!r}, ['/own', '', '/first'])\n"
        "main = sys.modules['__main__']\n"
        "assert main is not old and main is sys.modules['__mp_main__'] and not hasattr(main, 'secret')\n"
        "assert main.__builtins__ is __import__('builtins') and sys.argv == ['']\n"
        "assert random.random() != 0.13436424411240122\n"
        "print(os.getcwd(), sys.path, sys.stdout.encoding, sys.stdout.line_buffering, sys.stdout.mode, '\\udc80')\n",
        env={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    )
    assert (code, err) == (0, "")
    assert out == f"{tmp_path} ['/first', '/own'] utf-8 True w \\udc80\n"


def test_a_directory_that_is_gone(tmp_path: Path) -> None:
    order = {"cwd": str(tmp_path / "none"), "sys_path": [], "own_path": False}
    code, out, err = outcome(
        f"startup.prepare({order!r}, ['/own']); print(os.getcwd(), sys.path)", env={"HOME": str(tmp_path)}
    )
    assert code == 0 and out == f"{tmp_path} []\n" and "cannot work in" in err and "No such file" in err


def test_neither_the_directory_nor_the_home_may_be_entered(tmp_path: Path) -> None:
    order = {"cwd": str(tmp_path / "none"), "sys_path": [], "own_path": False}
    code, out, err = outcome(
        f"enter = os.chdir; os.chdir = lambda path: enter(path if path != {str(tmp_path)!r} else '/no/such')\n"
        f"startup.prepare({order!r}, []); print(os.getcwd())",
        env={"HOME": str(tmp_path)},
    )
    assert (code, out) == (0, "/\n") and "cannot work in" in err and "using '/'" in err


def test_the_environment_is_replaced() -> None:
    code = (
        "import time; wanted = {**os.environ, 'NEW': '1', 'TZ': 'UTC-5'}; del wanted['OLD']\n"
        "startup._set_environment(wanted); assert os.environ == wanted\n"
        "print(time.timezone, flush=True); os.system('echo $NEW$OLD')"
    )
    assert outcome(code, env={"OLD": "x", "TZ": "UTC"}) == (0, "-18000\n1\n", "")


def test_the_end_of_a_worker() -> None:
    code, out, err = outcome(
        "import atexit, threading\n"
        "atexit.register(print, 'atexit'); thread = threading.Thread(target=print, args=('thread',))\n"
        "print('buffered'); thread.start(); startup.finish(259)"
    )
    assert code == 3 and out == "buffered\nthread\natexit\n" and err == ""


def test_an_end_that_is_held_up() -> None:
    held = "import threading; startup.EXIT_SECONDS = 0.01; threading.Thread(target=threading.Event().wait).start()\n"
    assert outcome(held + "startup.finish(4)")[0] == 4
    beside = (
        "import threading; startup.EXIT_SECONDS = 1000\n"
        "threading.Thread(target=startup.finish, args=(5, False)).start(); threading.Event().wait()"
    )
    assert outcome(beside)[0] == 5  # the main thread is not waited for


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA is only a limit on Linux")
def test_an_end_with_little_memory() -> None:
    """It needs a thread, whose stack would be 8 MiB."""
    found = outcome(
        "import atexit, resource; resource.setrlimit(resource.RLIMIT_DATA, (150 << 20, -1)); held = []\n"
        "import threading; atexit.register(lambda: print('hook', threading.stack_size()))\n"
        "try:\n    while True: held.append(bytearray(1 << 20))\n"
        "except MemoryError: del held[-2:]\n"
        "startup.finish(7)"
    )
    assert found == (7, "hook 0\n", ""), "and threads of the user's have the usual stack"


def test_an_error_at_the_end_does_not_hold_it_up() -> None:
    closed = "import atexit; atexit.register(lambda: 1 // 0); sys.stdout.close(); startup.finish(6)"
    code, _, err = outcome(closed)
    assert code == 6 and "ZeroDivisionError" in err


@pytest.mark.parametrize(
    "stream",
    ["None", "object()", "type('Own', (), {'flush': lambda self: sys.exit('flushed')})()", "sys.stderr.close() or 5"],
)
def test_standard_output_that_the_user_has_replaced(stream: str) -> None:
    """Nothing is said on the way out, and what was printed before comes all the same."""
    found = outcome(f"print('before', end=''); sys.stdout = {stream}; startup.finish(6)")
    assert found == (6, "before", "")
    assert outcome(f"sys.stderr = {stream}; del sys.stdout; startup.finish(7)") == (7, "", "")


def test_limits_that_may_not_be_had() -> None:
    """The rest is taken all the same."""
    code, out, err = outcome(
        "import os, resource\n"
        "soft, hard = resource.getrlimit(resource.RLIMIT_CORE)\n"
        "startup.take_limits({'RLIMIT_NOFILE': [9, 5], 'RLIMIT_OF_OTHERS': [1, 1], 'affinity': [1 << 14],\n"
        "    'RLIMIT_CORE': [0, hard], 'nice': os.getpriority(os.PRIO_PROCESS, 0), 'umask': 0o31})\n"
        "assert resource.getrlimit(resource.RLIMIT_CORE) == (0, hard); print(os.umask(0))"
    )
    assert (code, out, err) == (0, f"{0o31}\n", "")


def test_ignored_signals() -> None:
    code, out, err = outcome(
        "import signal; from signal import SIGUSR1, SIGUSR2, SIGHUP\n"
        "signal.signal(SIGHUP, signal.SIG_IGN); startup.ignore([SIGUSR1]); startup.ignore([SIGUSR2])\n"
        "print(*[signal.getsignal(number).name for number in (SIGUSR1, SIGUSR2, SIGHUP)])"
    )
    assert (code, out, err) == (0, "SIG_DFL SIG_IGN SIG_IGN\n", "")


@pytest.mark.parametrize("way", ["kernel", "thread"])
def test_the_lifeline(way: str) -> None:
    """The worker dies with whoever holds the other end; by the kernel also while it holds the interpreter lock."""
    reader, writer = os.pipe()
    arm = f"os.set_inheritable({reader}, False); startup.arm_lifeline({reader}); print('armed', flush=True)\n"
    if way == "thread":
        arm = "sys.platform = 'elsewhere'\n" + arm + "import threading; threading.Event().wait()"
    elif sys.platform != "linux":
        pytest.skip("no O_ASYNC with signals of one's own here")
    else:
        arm += "sum(range(10 ** 15))"
    process = child(arm, pass_fds=[reader])
    os.close(reader)
    assert process.stdout is not None and process.stdout.readline() == "armed\n"
    os.close(writer)
    process.communicate(timeout=30)
    assert process.returncode == (1 if way == "thread" else -signal.SIGKILL)


def test_a_lifeline_that_is_cut_already() -> None:
    reader, writer = os.pipe()
    os.close(writer)
    process = child(f"startup.arm_lifeline({reader}); import threading; threading.Event().wait()", pass_fds=[reader])
    os.close(reader)
    process.communicate(timeout=30)
    assert process.returncode == 1


def test_an_executed_worker(tmp_path: Path) -> None:
    order = {
        **settings(transport="tcp"), "cwd": str(tmp_path), "sys_path": [REPO, *sys.path], "own_path": False,
        "entry": "the_entry:run",
    }  # fmt: skip
    (tmp_path / "the_entry.py").write_text(
        "import os, sys\ndef run(listener, settings):\n"
        "    print(listener.getsockname()[1], os.getcwd(), repr(sys.stdin.read()))\n    return 9\n"
    )
    order["sys_path"].insert(0, str(tmp_path))
    with child("startup.exec_main([])", stdin=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        out = process.stdout.read()
    assert process.returncode == 9
    header, said = out.splitlines()
    assert header.startswith("distpool_worker:") and header.endswith("#127.0.0.1")
    port = header.removeprefix("distpool_worker:").partition("#")[0]
    assert said == f"{port} {tmp_path} ''"


def test_an_executed_worker_that_is_told_nothing() -> None:
    assert outcome("startup.exec_main([])") == (1, "", "")
