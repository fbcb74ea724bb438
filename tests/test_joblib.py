"""joblib's backend: whatever calls `joblib.Parallel` runs on distpool's workers, and survives what breaks them."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import joblib
import numpy as np
import pytest
from faults.helpers import Gate, all_at_once, hold

import distpool.integrations.joblib
from distpool import ClusterExecutor, ProcessExitedException
from distpool.integrations.joblib import DistpoolBackend

PATIENCE = 30.0


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    yield
    gc.collect()  # a backend's executor goes with it


@pytest.fixture
def backend() -> Iterator[DistpoolBackend]:
    made = DistpoolBackend()
    yield made
    made.abort_everything(ensure_ready=False)


def square(number: int) -> int:
    return number * number


def whoami(_: int = 0) -> int:
    return os.getpid()


def fail_at(number: int, bad: int) -> int:
    if number == bad:
        raise KeyError(number)
    return number


def nested(number: int) -> list[int]:
    return joblib.Parallel(n_jobs=2)(joblib.delayed(square)(each) for each in range(number))


def total(array: Any) -> float:
    array += 1  # arguments are writable, as with loky they are not
    return float(array.sum())


def threads_of_blas() -> str | None:
    return os.environ.get("OMP_NUM_THREADS")


def test_results_in_order(backend: DistpoolBackend) -> None:
    with joblib.parallel_config(backend, n_jobs=2):
        found = joblib.Parallel()(joblib.delayed(square)(number) for number in range(500))
        assert found == [number * number for number in range(500)]
        assert os.getpid() not in joblib.Parallel()(joblib.delayed(whoami)() for _ in range(20))


def test_by_its_name_and_with_functions_that_cannot_be_imported() -> None:
    offset = 7
    with joblib.parallel_config("distpool", n_jobs=2):
        found = joblib.Parallel()(joblib.delayed(lambda number: number + offset)(number) for number in range(20))
    assert found == list(range(7, 27))


def test_workers_stay_between_calls(backend: DistpoolBackend) -> None:
    with joblib.parallel_config(backend, n_jobs=2):
        first = set(joblib.Parallel()(joblib.delayed(whoami)(number) for number in range(50)))
        second = set(joblib.Parallel()(joblib.delayed(whoami)(number) for number in range(50)))
    assert len(first | second) <= 2


def test_the_number_of_jobs_is_the_number_of_workers(backend: DistpoolBackend) -> None:
    for count in (3, 2):
        with joblib.parallel_config(backend, n_jobs=count):
            assert joblib.Parallel()(joblib.delayed(square)(number) for number in range(5)) == [0, 1, 4, 9, 16]
        assert backend._own is not None and backend._own._max_workers == count
    assert joblib.Parallel(n_jobs=1, backend=backend)([joblib.delayed(whoami)()]) == [os.getpid()]


def test_negative_numbers_and_none(backend: DistpoolBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distpool.integrations.joblib, "usable_cpus", lambda: 8)
    assert [backend.effective_n_jobs(n_jobs) for n_jobs in (None, -1, -2, -20, 5)] == [8, 8, 7, 1, 5]
    with pytest.raises(ValueError, match="n_jobs == 0 in Parallel has no meaning"):
        backend.effective_n_jobs(0)


def test_an_executor_of_the_users_own(make: Callable[..., ClusterExecutor]) -> None:
    executor = make(2)
    mine = all_at_once(executor, 2)
    with joblib.parallel_config("distpool", executor=executor):
        assert set(joblib.Parallel()(joblib.delayed(whoami)() for _ in range(50))) <= mine
        with pytest.raises(KeyError):
            joblib.Parallel()(joblib.delayed(fail_at)(number, 5) for number in range(50))
    assert executor.submit(square, 3).result(PATIENCE) == 9
    assert all_at_once(executor, 2) == mine  # what failed was joblib's
    with pytest.raises(TypeError, match="max_workers"):
        DistpoolBackend(executor=executor, max_workers=2)


def test_hosts(backend: DistpoolBackend) -> None:
    hosts = distpool.LocalManager(2)
    with joblib.parallel_config("distpool", hosts=hosts):
        parallel = joblib.Parallel()
        assert parallel(joblib.delayed(square)(number) for number in range(30)) == [n * n for n in range(30)]
        assert parallel._effective_n_jobs() == 2


def test_an_error_is_raised_as_itself_and_the_next_call_works(backend: DistpoolBackend) -> None:
    with joblib.parallel_config(backend, n_jobs=2):
        for _ in range(2):
            with pytest.raises(KeyError, match="13"):
                joblib.Parallel()(joblib.delayed(fail_at)(number, 13) for number in range(200))
            assert joblib.Parallel()(joblib.delayed(square)(number) for number in range(5)) == [0, 1, 4, 9, 16]


def test_a_task_that_kills_its_process(backend: DistpoolBackend) -> None:
    with joblib.parallel_config(backend, n_jobs=2):
        with pytest.raises(ProcessExitedException) as caught:
            joblib.Parallel()(joblib.delayed(os._exit if number == 3 else square)(number) for number in range(20))
        assert caught.value.exitcode == 3
        assert joblib.Parallel()(joblib.delayed(square)(number) for number in range(5)) == [0, 1, 4, 9, 16]


def test_a_time_limit(backend: DistpoolBackend, gate: Gate) -> None:
    with joblib.parallel_config(backend, n_jobs=2):
        with pytest.raises(multiprocessing.TimeoutError):
            joblib.Parallel(timeout=0.2)(joblib.delayed(hold)(gate.address) for _ in range(4))
        assert joblib.Parallel()(joblib.delayed(square)(number) for number in range(5)) == [0, 1, 4, 9, 16]


def test_results_as_they_come(backend: DistpoolBackend) -> None:
    with joblib.parallel_config(backend, n_jobs=2):
        found = joblib.Parallel(return_as="generator")(joblib.delayed(square)(number) for number in range(100))
        assert next(found) == 0
        assert list(found) == [number * number for number in range(1, 100)]
        unordered = joblib.Parallel(return_as="generator_unordered")(joblib.delayed(square)(n) for n in range(50))
        assert sorted(unordered) == sorted(number * number for number in range(50))
        dropped = joblib.Parallel(return_as="generator")(joblib.delayed(square)(number) for number in range(1000))
        next(dropped)
        del dropped
        gc.collect()
        assert joblib.Parallel()(joblib.delayed(square)(number) for number in range(5)) == [0, 1, 4, 9, 16]


def test_parallel_inside_of_parallel(backend: DistpoolBackend) -> None:
    with joblib.parallel_config(backend, n_jobs=2):
        found = joblib.Parallel()(joblib.delayed(nested)(number) for number in range(6))
    assert found == [[each * each for each in range(number)] for number in range(6)]


def test_large_arrays(backend: DistpoolBackend) -> None:
    array = np.arange(200_000, dtype=float)
    with joblib.parallel_config(backend, n_jobs=2):
        assert joblib.Parallel()(joblib.delayed(total)(array) for _ in range(4)) == [array.sum() + 200_000] * 4
    assert array[0] == 0


def test_threads_of_numerical_libraries() -> None:
    for inner, expected in ((None, str(max(1, joblib.cpu_count() // 2))), (3, "3")):
        with joblib.parallel_config("distpool", n_jobs=2, inner_max_num_threads=inner):
            found = joblib.Parallel()(joblib.delayed(threads_of_blas)() for _ in range(4))
        if inner is not None or "OMP_NUM_THREADS" not in os.environ:
            assert set(found) == {expected}


def test_from_several_threads(backend: DistpoolBackend) -> None:
    found: list[Any] = []

    def work(start: int) -> None:
        with joblib.parallel_config(DistpoolBackend(executor=executor), n_jobs=2):
            found.append(joblib.Parallel()(joblib.delayed(square)(n) for n in range(start, start + 30)))

    with ClusterExecutor(2) as executor:
        threads = [threading.Thread(target=work, args=(number * 100,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    assert sorted(found) == [[n * n for n in range(start, start + 30)] for start in (0, 100, 200, 300)]


def test_the_workers_go_with_the_backend() -> None:
    with joblib.parallel_config("distpool", n_jobs=2):
        ospids = set(joblib.Parallel()(joblib.delayed(whoami)(number) for number in range(20)))
    gc.collect()
    deadline = time.monotonic() + PATIENCE
    while any(os.path.exists(f"/proc/{ospid}") for ospid in ospids):
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


def test_scikit_learn(backend: DistpoolBackend) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import SVC

    data = datasets.load_iris()
    with joblib.parallel_config(backend, n_jobs=2):
        search = GridSearchCV(SVC(), {"C": [0.1, 1.0]}, cv=2).fit(data.data, data.target)
    assert search.best_score_ > 0.9
