"""The classes under test, chosen by the environment variable ``COMPAT_PEER`` (workers inherit it).

Nothing of CPython's suites is changed; where a suite names a class itself, :func:`patch` puts ours in its place.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

PEER = os.environ.get("COMPAT_PEER", "distpool")
SITE = Path(__file__).resolve().parent / "site"

Executor: Any = None
Pool: Any = None

if PEER == "distpool":
    import distpool

    class ClusterExecutor(distpool.ClusterExecutor):
        """distpool's executor under the stdlib's rule for dead workers, which is the rule the suite tests."""

        def __init__(self, *args: Any, **options: Any) -> None:
            options.setdefault("on_worker_exit", "break")
            super().__init__(*args, **options)

    Executor, Pool = ClusterExecutor, distpool.DistPool
elif PEER == "stdlib":
    import concurrent.futures.process
    import multiprocessing.pool

    Executor = concurrent.futures.process.ProcessPoolExecutor

    class StdlibPool(multiprocessing.pool.Pool):
        """multiprocessing.Pool as a class."""

    Pool = StdlibPool
elif PEER == "loky":
    import loky

    class LokyExecutor(loky.ProcessPoolExecutor):  # type: ignore[misc]
        """loky under the stdlib's keyword: a renamed argument must not hide what else differs."""

        def __init__(self, max_workers: Any = None, mp_context: Any = None, **options: Any) -> None:
            super().__init__(max_workers, context=mp_context, **options)

    Executor = LokyExecutor
elif PEER == "multiprocess":
    import multiprocess

    Pool = multiprocess.Pool
else:
    raise SystemExit(f"unknown peer {PEER!r}: distpool, stdlib, loky or multiprocess")


def patch(*, executor: bool = True, pool: bool = True) -> None:
    """Put the classes under test where programs look for the stdlib's."""
    import concurrent.futures
    import multiprocessing

    if executor and Executor is not None and PEER != "stdlib":
        concurrent.futures.ProcessPoolExecutor = Executor
        setattr(concurrent.futures, Executor.__name__, Executor)
    if pool and Pool is not None:
        multiprocessing.Pool = Pool
    if PEER == "distpool":
        # The suites compare a whole stdout: worker output must come without "From worker N:".
        distpool.set_output_hook(lambda pid, line: line)


def patch_subprocesses() -> None:
    """Programs that a test starts get the same classes, by a ``sitecustomize`` (they would run isolated otherwise)."""
    from test.support import script_helper

    original = script_helper.run_python_until_end

    def run_python_until_end(*args: Any, **env_vars: Any) -> Any:
        inner = [str(SITE), str(SITE.parent.parent.parent), os.environ.get("PYTHONPATH", "")]
        env_vars = {"PYTHONPATH": os.pathsep.join(filter(None, inner)), "COMPAT_SITE": "1", **env_vars}
        env_vars["__isolated"] = False
        if args and args[0] == "-c":  # test_hang_gh83386 forgets this import for process pools
            args = ("-c", "import multiprocessing\n" + args[1], *args[2:])
        return original(*args, **env_vars)

    script_helper.run_python_until_end = run_python_until_end


def extend_test_package() -> None:
    """Add ``COMPAT_TEST_PATH`` (a directory ``test`` of the same Python version) to the ``test`` package."""
    path = os.environ.get("COMPAT_TEST_PATH")
    if path:
        import test

        if path not in test.__path__:
            test.__path__.append(path)


def has_suites() -> bool:
    """Whether this interpreter has the executor and Pool suites."""
    extend_test_package()
    try:
        return importlib.util.find_spec("test._test_multiprocessing") is not None and (
            importlib.util.find_spec("test.test_concurrent_futures") is not None
        )
    except ImportError:
        return False


VERSION = sys.version_info[:2]
