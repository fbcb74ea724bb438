"""Why a test of CPython's does not apply. Everything that is not listed here must pass."""

from __future__ import annotations

SEMAPHORE = "impossible over sockets: a raw multiprocessing semaphore pickles only while a process is being spawned"
MANAGER_THREAD = "internal: reads _executor_manager_thread and _call_queue of CPython's implementation"
ON_DEMAND = "internal: counts the entries of _processes; distpool's workers start together, on purpose"

# Suite -> test -> reason
NOT_APPLICABLE: dict[str, dict[str, str]] = {
    "executor": {
        "ProcessPoolExecutorTest.test_max_workers_too_large": "Windows only: a limit of WaitForMultipleObjects",
        "ProcessPoolExecutorTest.test_saturation": SEMAPHORE,
        "ProcessPoolExecutorTest.test_idle_process_reuse_one": ON_DEMAND,
        "ProcessPoolExecutorTest.test_idle_process_reuse_multiple": ON_DEMAND,
        "ProcessPoolExecutorTest.test_python_finalization_error": "internal: counts the threads that CPython's starts",
        "ExecutorDeadlockTest.test_shutdown_deadlock_pickle": MANAGER_THREAD,
        "ExecutorDeadlockTest.test_gh105829_should_not_deadlock_if_wakeup_pipe_full": (
            "internal: replaces _ExecutorManagerThread.run and _ThreadWakeup of CPython's implementation"
        ),
        "ProcessPoolShutdownTest.test_processes_terminate": SEMAPHORE,
        "ProcessPoolShutdownTest.test_del_shutdown": MANAGER_THREAD,
        "ProcessPoolShutdownTest.test_shutdown_no_wait": MANAGER_THREAD,
    },
    "pool": {
        "_TestPoolWorkerErrors.test_unpickleable_result": (
            "the test's unpicklable result is a lambda, which cloudpickle can send: the call succeeds, by design"
        ),
        "_TestPoolWorkerLifetime.test_pool_worker_lifetime": "internal: calls the private Pool._repopulate_pool()",
        "TestPoolNotLeakOnFailure.test_release_unused_processes": (
            "internal: fakes the Process class of a multiprocessing context, which distpool does not start"
        ),
    },
}
# Tests that run with an adaptation, told beside their names.
ADAPTED = {
    "FailingInitializerMixin.test_initializer": "without its log queue, which cannot cross a socket",
    "ProcessPoolShutdownTest.test_hang_gh83386": "runs although the stdlib's own executor skips it",
}
# Seconds, where one minute is too short on a slow machine.
LIMITS = {"MiscTestCase.test_large_pool": 180.0}
