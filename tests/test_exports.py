"""The public API is one list, and importing it is cheap.

`API` lists every name that the design fixes, `NOT_YET` those of them that are still being built. A name leaves the
second list together with the code that it stands for, and never comes back. The rest is promised today.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import types

import pytest

import distpool

EXECUTORS = {"ClusterExecutor", "DistPool", "ExponentialBackOff", "Future", "pgenerate", "pmap"}

ERRORS = {
    *("AuthenticationError", "CapturedException", "ChannelClosedError", "CompositeException", "DistpoolError"),
    *("LaunchWorkerError", "ProcessExitedException", "RemoteException", "SerializationError", "TopologyError"),
    "VersionMismatchError",
}

MEMBERSHIP = {
    *("addprocs", "addprocs_async", "check_same_host", "cluster_cookie", "interrupt", "load_machine_file", "myid"),
    *("myrole", "nprocs", "nworkers", "on_worker_exited", "on_worker_started", "parse_machine", "procs", "rmprocs"),
    *("set_output_hook", "workers"),
}

CALLS = {
    *("clear", "distributed", "everywhere", "fetch_any", "fetchfrom", "include", "remote_do", "remotecall"),
    *("remotecall_eval", "remotecall_fetch", "remotecall_wait", "spawn", "spawnat", "splitrange", "sync"),
}

REFERENCES = {
    *("Channel", "RRID", "RemoteChannel", "channel_from_id", "fetch", "finalize", "isready", "put", "remoteref_id"),
    *("take", "wait", "worker_id_from_socket"),
}

POOLS = {"CachingPool", "WorkerPool", "default_worker_pool", "remote", "set_default_worker_pool"}

MANAGERS = {
    *("ClusterManager", "LocalManager", "SSHManager", "WorkerConfig", "default_addprocs_params", "init_worker"),
    *("process_messages", "start_worker"),
}

WATCHING = {"debug", "dump_stacks", "plot_trace", "stats", "trace"}

API = EXECUTORS | ERRORS | MEMBERSHIP | CALLS | REFERENCES | POOLS | MANAGERS | WATCHING | {"__version__"}
"""Every name that the design fixes."""

NOT_YET: set[str] = set()
"""Those of them that are still being built. A name leaves this set together with the code that it stands for."""

PUBLIC = API - NOT_YET


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_list_is_exact() -> None:
    assert set(distpool.__all__) == PUBLIC
    assert len(distpool.__all__) == len(PUBLIC), "a name stands twice in __all__"


def test_what_is_not_there_yet_is_not_promised() -> None:
    assert NOT_YET <= API
    assert NOT_YET.isdisjoint(distpool.__all__), "take the name out of NOT_YET"


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_exists_and_says_what_it_is(name: str) -> None:
    value = getattr(distpool, name)
    if isinstance(value, str):
        return
    doc = inspect.getdoc(value)
    assert doc and len(doc) > 20, f"distpool.{name} has no docstring"
    own = getattr(value, "__doc__", None)
    assert own, f"distpool.{name} only inherits its docstring"
    assert "Example:" in own, f"distpool.{name} has no example"


@pytest.mark.parametrize("name", sorted(EXECUTORS))
def test_every_public_method_has_a_docstring(name: str) -> None:
    value = getattr(distpool, name)
    if not isinstance(value, type):
        return
    members = {key: member for key, member in vars(value).items() if not key.startswith("_")}
    functions = {key: member for key, member in members.items() if isinstance(member, (types.FunctionType, property))}
    bare = [f"{name}.{key}" for key in functions if not inspect.getdoc(getattr(value, key))]
    assert not bare, f"no docstring: {bare}"


def test_dir_and_unknown_names() -> None:
    assert set(dir(distpool)) >= PUBLIC
    with pytest.raises(AttributeError, match="no_such_name"):
        distpool.no_such_name  # noqa: B018
    assert not hasattr(distpool, "__no_such_name__")


def test_star_import_brings_the_list() -> None:
    names = json.loads(
        python(
            "from distpool import *\nimport json\n"
            "print(json.dumps([n for n in globals() if n != 'json' and not n.startswith('__')]))"
        )
    )
    assert set(names) == {name for name in PUBLIC if not name.startswith("__")}


HEAVY = ("paramiko", "psutil", "numpy", "asyncio", "cloudpickle", "tqdm", "ssl", "distpool.node.node")


def test_import_loads_nothing_heavy_and_starts_nothing() -> None:
    report = json.loads(
        python(
            "import os, threading\n"
            "fds = set(os.listdir('/proc/self/fd')) if os.path.isdir('/proc/self/fd') else set()\n"
            "import distpool\n"
            "after = set(os.listdir('/proc/self/fd')) if fds else set()\n"
            "import json, sys\n"
            f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
            "print(json.dumps([heavy, threading.active_count(), len(after) - len(fds)]))"
        )
    )
    assert report == [[], 1, 0], "heavy modules, threads, additional descriptors"


def import_seconds(module: str) -> float:
    """Time of one import in a fresh interpreter, without the start of the interpreter."""
    return float(
        python(
            f"import time\nbegin = time.perf_counter()\nimport {module}\nprint(time.perf_counter() - begin)",
        )
    )


def test_import_costs_no_more_than_the_standard_librarys() -> None:
    """Alternating fresh processes, the best of each: the minimum is what the code costs, the rest is the machine."""
    ours, theirs = [], []
    for _ in range(7):
        ours.append(import_seconds("distpool"))
        theirs.append(import_seconds("concurrent.futures.process"))
    assert min(ours) <= 1.25 * min(theirs), f"{min(ours) * 1000:.1f} ms against {min(theirs) * 1000:.1f} ms"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("set_default_worker_pool", "p"),
        ("set_output_hook", "f"),
        ("on_worker_started", "f"),
        ("on_worker_exited", "f"),
        ("remotecall_eval", "module pids source"),
        ("include", "path pids"),
        ("splitrange", "first last n"),
        ("clear", "names_or_pool pids mod"),
        ("Future", "pid"),
        ("RemoteChannel", "factory pid"),
        ("Channel", "maxsize type"),
        ("remote", "f pool"),
        ("default_addprocs_params", "manager"),
        ("init_worker", "cookie manager"),
        ("start_worker", "out cookie close_stdin stderr_to_stdout"),
        ("process_messages", "reader writer incoming"),
    ],
)
def test_parameters_are_called_as_the_contract_says(name: str, parameters: str) -> None:
    public = getattr(distpool, name)
    public = public.__init__ if inspect.isclass(public) else public
    assert [each for each in inspect.signature(public).parameters if each != "self"] == parameters.split()
