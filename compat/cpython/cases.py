"""Test classes made of CPython's mixins and the class under test. Importable, because workers look tests up by name."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import unittest
from collections.abc import Iterator
from typing import Any

from compat.cpython import adapters

adapters.extend_test_package()

EXECUTOR_MIXINS = [
    ("test_process_pool", "ProcessPoolExecutorTest"),
    ("test_deadlock", "ExecutorDeadlockTest"),
    ("test_shutdown", "ProcessPoolShutdownTest"),
    ("test_init", "InitializerMixin"),
    ("test_init", "FailingInitializerMixin"),
    ("test_as_completed", "AsCompletedTests"),
    ("test_wait", "WaitTests"),
]
POOL_CLASSES = ["_TestPool", "_TestPoolWorkerErrors", "_TestPoolWorkerLifetime"]
# Class -> the tests of it that use a Pool.
POOL_OTHERS = {
    "TestInitializers": ["test_pool_initializer"],
    "TestStdinBadfiledescriptor": ["test_pool_in_process"],
    "TestPoolNotLeakOnFailure": ["test_release_unused_processes"],
    "MiscTestCase": ["test_large_pool"],
}


def suite_module(name: str) -> Any:
    """A module of test.test_concurrent_futures; on 3.11 it is one single module."""
    package = importlib.import_module("test.test_concurrent_futures")
    return importlib.import_module(f"{package.__name__}.{name}") if hasattr(package, "__path__") else package


def executor_cases() -> dict[str, type[unittest.TestCase]]:
    """A TestCase per mixin of the executor suite, with our executor in place of ProcessPoolExecutor."""
    util = suite_module("util")

    class UnderTest(util.ExecutorMixin):  # type: ignore[misc, name-defined]
        """The context is spawn: workers that are fresh interpreters, as ours are."""

        executor_type = adapters.Executor
        ctx = "spawn"

        def get_context(self) -> Any:
            return multiprocessing.get_context(self.ctx)

    cases = {}
    for module_name, mixin_name in EXECUTOR_MIXINS:
        module = suite_module(module_name)
        mixin = getattr(module, mixin_name)
        bases: tuple[type, ...] = (mixin, UnderTest, util.BaseTestCase)
        if mixin_name == "FailingInitializerMixin":
            bases = (without_log_queue(module), *bases)
        cases[mixin_name] = type(mixin_name, bases, {"__module__": __name__})
    return cases


def without_log_queue(module: Any) -> type:
    """FailingInitializerMixin sends a raw multiprocessing.Queue in initargs; the rest of its test is public."""

    class Public:
        """Same test, nothing in initargs."""

        def setUp(self) -> None:
            self.executor_kwargs = {"initializer": module.init_fail}
            self.log_queue = None
            module.ExecutorMixin.setUp(self)

        @contextlib.contextmanager
        def _assert_logged(self, message: str) -> Iterator[None]:
            yield

    return Public


def pool_cases() -> dict[str, type[unittest.TestCase]]:
    """TestCases of the multiprocessing suite that use a Pool, with ours."""
    suite = importlib.import_module("test._test_multiprocessing")
    cases: dict[str, type[unittest.TestCase]] = {}
    for name in POOL_CLASSES:
        bases = (getattr(suite, name), suite.ProcessesMixin, unittest.TestCase)
        cases[name] = type(name, bases, {"__module__": __name__, "Pool": staticmethod(adapters.Pool)})
    for name in POOL_OTHERS:
        if hasattr(suite, name):
            cases[name] = type(name, (getattr(suite, name),), {"__module__": __name__})
    main_handling = importlib.import_module("test.test_multiprocessing_main_handling")
    cases["SpawnCmdLineTest"] = main_handling.SpawnCmdLineTest
    return cases


CASES: dict[str, dict[str, type[unittest.TestCase]]] = {}
if adapters.has_suites():
    if adapters.Executor is not None:
        CASES["executor"] = executor_cases()
    if adapters.Pool is not None:
        CASES["pool"] = pool_cases()
    for cases_of_suite in CASES.values():
        globals().update(cases_of_suite)


def test_names(suite: str) -> list[str]:
    """Every test of a suite as ``Class.method``."""
    names = []
    for name, case in CASES.get(suite, {}).items():
        methods = unittest.defaultTestLoader.getTestCaseNames(case)
        wanted = POOL_OTHERS.get(name, methods)
        names += [f"{name}.{method}" for method in methods if method in wanted]
    return names
