"""One function per consumer. ``make.executor()`` and ``make.pool()`` give the class under test with two workers;
``make.patch()`` puts it where a library names the stdlib's class itself. To add a consumer: write a function, decorate
it with the distributions that it needs, assert a result that only a working pool can give.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compat.consumers import tasks

Program = Callable[[Any], None]
CONSUMERS: dict[str, tuple[Program, tuple[str, ...], str]] = {}


def consumer(name: str, takes: str, *modules: str) -> Callable[[Program], Program]:
    """Register a program under a name, with what it takes and the modules that it imports."""

    def register(program: Program) -> Program:
        CONSUMERS[name] = (program, modules, takes)
        return program

    return register


def equal(found: object, expected: object) -> None:
    """An assertion that -O does not remove."""
    if found != expected:
        raise AssertionError(f"{found!r} instead of {expected!r}")


def close_to(found: float, expected: float, tolerance: float) -> None:
    """An assertion on a number."""
    if not abs(found - expected) <= tolerance:
        raise AssertionError(f"{found!r} is not within {tolerance} of {expected!r}")


# --- the standard library -------------------------------------------------------------------------------------------


@consumer("asyncio", "executor")
def asyncio_gather(make: Any) -> None:
    """run_in_executor, wrap_future, an error, a timeout that cancels."""
    import asyncio

    async def main(executor: Any) -> None:
        loop = asyncio.get_running_loop()
        calls = [loop.run_in_executor(executor, tasks.slow_square, n) for n in range(20)]
        equal(await asyncio.gather(*calls), [n * n for n in range(20)])
        equal(await asyncio.wrap_future(executor.submit(tasks.add, 1, 2)), 3)
        try:
            await loop.run_in_executor(executor, tasks.fail, 7)
        except ValueError as error:
            equal(str(error), "bad value 7")
        else:
            raise AssertionError("no error")
        done, _ = await asyncio.wait([loop.run_in_executor(executor, tasks.add, n, 1) for n in range(5)])
        equal(sorted(task.result() for task in done), [1, 2, 3, 4, 5])

    with make.executor() as executor:
        asyncio.run(main(executor))


@consumer("concurrent.futures", "executor")
def futures_mixed(make: Any) -> None:
    """wait and as_completed over futures of two executors, callbacks included."""
    from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, as_completed, wait

    seen: list[float] = []
    with make.executor() as executor, ThreadPoolExecutor(2) as threads:
        futures = [executor.submit(tasks.square, n) for n in range(10)]
        futures += [threads.submit(tasks.square, n) for n in range(10, 20)]
        for future in futures:
            future.add_done_callback(lambda done: seen.append(done.result()))
        equal(sorted(future.result() for future in as_completed(futures)), [n * n for n in range(20)])
        done, _ = wait([executor.submit(tasks.slow_square, n) for n in range(4)], return_when=FIRST_COMPLETED)
        equal(bool(done), True)
    equal(sorted(seen), [n * n for n in range(20)])


@consumer("compileall", "executor class")
def compile_all(make: Any) -> None:
    """compile_dir(workers=2) makes its own ProcessPoolExecutor."""
    import compileall

    make.patch()
    with tempfile.TemporaryDirectory() as directory:
        for index in range(6):
            Path(directory, f"module{index}.py").write_text(f"VALUE = {index}\n")
        equal(bool(compileall.compile_dir(directory, workers=2, quiet=1)), True)
        equal(len(list(Path(directory, "__pycache__").glob("*.pyc"))), 6)


@consumer("multiprocessing.Manager", "executor")
def manager_proxies(make: Any) -> None:
    """Proxies of a Manager as arguments (they need the caller's authkey)."""
    import multiprocessing

    with multiprocessing.get_context("spawn").Manager() as manager:
        shared = manager.list()
        with make.executor() as executor:
            for future in [executor.submit(shared.append, n) for n in range(10)]:
                future.result(30)
        equal(sorted(shared), list(range(10)))


# --- event loops ----------------------------------------------------------------------------------------------------


@consumer("tornado", "executor", "tornado")
def tornado_loop(make: Any) -> None:
    """IOLoop.run_in_executor, and futures yielded to the loop."""
    from tornado.ioloop import IOLoop

    async def main(executor: Any) -> list[Any]:
        loop = IOLoop.current()
        last = loop.run_in_executor(executor, tasks.add, 1, 2)
        found = [await loop.run_in_executor(executor, tasks.square, n) for n in range(10)]
        return [*found, await last]

    with make.executor() as executor:
        equal(IOLoop(make_current=False).run_sync(lambda: main(executor)), [*(n * n for n in range(10)), 3])


@consumer("anyio", "executor", "anyio")
def anyio_tasks(make: Any) -> None:
    """Futures waited for in anyio's worker threads, in a task group."""
    import anyio

    results: dict[int, Any] = {}

    async def one(executor: Any, value: int) -> None:
        results[value] = await anyio.to_thread.run_sync(executor.submit(tasks.slow_square, value).result)

    async def main(executor: Any) -> None:
        async with anyio.create_task_group() as group:
            for value in range(8):
                group.start_soon(one, executor, value)

    with make.executor() as executor:
        anyio.run(main, executor)
    equal(results, {n: n * n for n in range(8)})


@consumer("trio", "executor", "trio")
def trio_tasks(make: Any) -> None:
    """A done-callback that wakes a trio task from another thread."""
    import trio

    async def call(executor: Any, fn: Any, *args: Any) -> Any:
        token, event = trio.lowlevel.current_trio_token(), trio.Event()
        future = executor.submit(fn, *args)
        future.add_done_callback(lambda _: token.run_sync_soon(event.set))
        await event.wait()
        return future.result()

    async def main(executor: Any) -> None:
        with trio.fail_after(30):
            equal([await call(executor, tasks.square, n) for n in range(10)], [n * n for n in range(10)])

    with make.executor() as executor:
        trio.run(main, executor)


@consumer("reactivex", "executor", "reactivex")
def reactive(make: Any) -> None:
    """from_future over executor futures, merged in order."""
    import reactivex
    from reactivex import operators

    with make.executor() as executor:
        found = (
            reactivex.from_iterable(range(10))
            .pipe(
                operators.map(lambda n: reactivex.from_callable(executor.submit(tasks.square, n).result)),
                operators.merge_all(),
                operators.to_list(),
            )
            .run()
        )
    equal(sorted(found), [n * n for n in range(10)])


@consumer("aiohttp", "executor", "aiohttp")
def aiohttp_server(make: Any) -> None:
    """A web handler that computes in the executor."""
    import asyncio

    from aiohttp import ClientSession, web

    async def main(executor: Any) -> None:
        async def handler(request: Any) -> Any:
            value = int(request.query["n"])
            found = await asyncio.get_running_loop().run_in_executor(executor, tasks.slow_square, value)
            return web.json_response(found)

        app = web.Application()
        app.router.add_get("/", handler)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        async with ClientSession() as session:

            async def get(value: int) -> int:
                async with session.get(f"http://127.0.0.1:{port}/?n={value}") as response:
                    return int(await response.json())

            equal(await asyncio.gather(*(get(n) for n in range(10))), [n * n for n in range(10)])
        await runner.cleanup()

    with make.executor() as executor:
        asyncio.run(main(executor))


@consumer("flask-executor", "executor class", "flask_executor", "flask")
def flask_executor(make: Any) -> None:
    """Flask-Executor in its process mode."""
    make.patch()
    from flask import Flask
    from flask_executor import Executor

    app = Flask("compat")
    app.config["EXECUTOR_TYPE"] = "process"
    app.config["EXECUTOR_MAX_WORKERS"] = 2
    executor = Executor(app)
    with app.app_context():
        equal([executor.submit(tasks.square, n).result(30) for n in range(5)], [0, 1, 4, 9, 16])
    executor.shutdown()


@consumer("apscheduler", "executor", "apscheduler")
def apscheduler_jobs(make: Any) -> None:
    """A job executor over ours; results by the scheduler's events."""
    import threading

    from apscheduler.events import EVENT_JOB_EXECUTED
    from apscheduler.executors.pool import BasePoolExecutor
    from apscheduler.schedulers.background import BackgroundScheduler

    class JobExecutor(BasePoolExecutor):  # type: ignore[misc]
        """What apscheduler documents for one's own pool."""

        def __init__(self, pool: Any) -> None:
            super().__init__(pool)

    results: list[float] = []
    finished = threading.Event()

    def heard(event: Any) -> None:
        results.append(event.retval)
        if len(results) == 3:
            finished.set()

    with make.executor() as executor:
        scheduler = BackgroundScheduler(executors={"default": JobExecutor(executor)}, timezone="UTC")
        scheduler.add_listener(heard, EVENT_JOB_EXECUTED)
        scheduler.start()
        for value in (2, 3, 4):
            scheduler.add_job(tasks.square, args=(value,), misfire_grace_time=None)
        equal(finished.wait(30), True)
        scheduler.shutdown(wait=True)
    equal(sorted(results), [4, 9, 16])


# --- data -----------------------------------------------------------------------------------------------------------


@consumer("dask scheduler", "executor", "dask", "numpy")
def dask_scheduler(make: Any) -> None:
    """dask.compute(scheduler=executor)."""
    import dask

    lazy = [dask.delayed(tasks.square)(n) for n in range(20)]
    with make.executor() as executor:
        (total,) = dask.compute(dask.delayed(sum)(lazy), scheduler=executor)
    equal(total, sum(n * n for n in range(20)))


@consumer("dask pool", "pool", "dask", "numpy")
def dask_pool(make: Any) -> None:
    """dask.multiprocessing.get with a pool, and dask.config.set(pool=...)."""
    import dask
    import dask.array

    with make.pool() as pool, dask.config.set(pool=pool, scheduler="processes"):
        array = dask.array.arange(1000, chunks=100)
        equal(int((array**2).sum().compute()), sum(n * n for n in range(1000)))


@consumer("xarray", "executor", "xarray", "dask")
def xarray_compute(make: Any) -> None:
    """A chunked DataArray computed on the executor."""
    import numpy
    import xarray

    data = xarray.DataArray(numpy.arange(400.0).reshape(20, 20), dims=("x", "y")).chunk({"x": 5})
    with make.executor() as executor:
        found = (data * 2).mean().compute(scheduler=executor)
    close_to(float(found), 399.0, 1e-9)


@consumer("distributed.Worker", "executor", "distributed")
def distributed_worker(make: Any) -> None:
    """A dask worker whose tasks run in our executor."""
    import asyncio

    from distributed import Client, Scheduler, Worker

    async def main(executor: Any) -> None:
        async with (
            Scheduler(port=0, dashboard_address=None, protocol="tcp", host="127.0.0.1") as scheduler,
            Worker(scheduler.address, executor={"ours": executor}, nthreads=2, dashboard_address=None) as _,
            Client(scheduler.address, asynchronous=True) as client,
        ):
            import dask

            with dask.annotate(executor="ours"):
                futures = [client.submit(tasks.square, n) for n in range(10)]
            equal(await client.gather(futures), [n * n for n in range(10)])

    with make.executor() as executor:
        asyncio.run(asyncio.wait_for(main(executor), 60))


@consumer("joblib", "backend", "joblib")
def joblib_backend(make: Any) -> None:
    """joblib.Parallel on distpool's backend."""
    import joblib

    with make.joblib():
        found = joblib.Parallel(n_jobs=2)(joblib.delayed(tasks.square)(n) for n in range(50))
    equal(found, [n * n for n in range(50)])


@consumer("scikit-learn", "joblib backend", "sklearn", "joblib")
def sklearn_search(make: Any) -> None:
    """A grid search and a forest on distpool's joblib backend."""
    from sklearn.datasets import load_iris
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import SVC

    data = load_iris()
    with make.joblib():
        search = GridSearchCV(SVC(), {"C": [0.1, 1, 10]}, cv=3, n_jobs=2).fit(data.data, data.target)
        forest = RandomForestClassifier(20, n_jobs=2, random_state=1).fit(data.data, data.target)
    equal(search.best_score_ > 0.95 and forest.score(data.data, data.target) > 0.95, True)


@consumer("toolz", "pool", "toolz")
def toolz_fold(make: Any) -> None:
    """toolz.sandbox.fold with pool.imap."""
    from toolz.sandbox.parallel import fold

    with make.pool() as pool:
        equal(fold(tasks.add, range(1000), 0, map=pool.imap, chunksize=50), 499500)


@consumer("zarr", "executor", "zarr", "numpy")
def zarr_chunks(make: Any) -> None:
    """Workers that write the chunks of one array."""
    import numpy
    import zarr

    with tempfile.TemporaryDirectory() as directory, make.executor() as executor:
        array = zarr.open_array(directory, mode="w", shape=(40,), chunks=(10,), dtype="f8")
        futures = [executor.submit(array.__setitem__, slice(n, n + 10), float(n)) for n in range(0, 40, 10)]
        for future in futures:
            future.result(30)
        equal(float(numpy.asarray(zarr.open_array(directory, mode="r")[:]).sum()), 600.0)


# --- optimisation and sampling --------------------------------------------------------------------------------------


@consumer("scipy differential_evolution", "map of an executor", "scipy")
def scipy_evolution(make: Any) -> None:
    """workers=executor.map"""
    from scipy.optimize import differential_evolution

    with make.executor() as executor:
        found = differential_evolution(
            tasks.sphere, [(-5, 5)] * 2, workers=executor.map, updating="deferred", seed=1, maxiter=30
        )
    close_to(found.fun, 0.0, 1e-3)


@consumer("scipy brute", "map of a pool", "scipy")
def scipy_brute(make: Any) -> None:
    """workers=pool.map"""
    from scipy.optimize import brute

    with make.pool() as pool:
        found = brute(tasks.sphere, ((-2, 2), (-2, 2)), Ns=9, workers=pool.map, finish=None)
    close_to(float(abs(found).sum()), 0.0, 1e-9)


@consumer("scipy quad_vec", "map of a pool", "scipy")
def scipy_integral(make: Any) -> None:
    """Adaptive integration, batches on the pool."""
    from scipy.integrate import quad_vec

    with make.pool() as pool:
        value, _ = quad_vec(tasks.parabola, 0, 3, workers=pool.map)
    close_to(float(value), 9.0, 1e-9)


@consumer("emcee", "pool", "emcee", "numpy")
def emcee_sampler(make: Any) -> None:
    """An ensemble sampler on a pool."""
    import emcee
    import numpy

    numpy.random.seed(1)
    with make.pool() as pool:
        sampler = emcee.EnsembleSampler(16, 2, tasks.minus_half_sphere, pool=pool)
        sampler.run_mcmc(numpy.random.randn(16, 2), 200)
    close_to(float(sampler.get_chain(flat=True, discard=50).std()), 1.0, 0.25)


@consumer("emcee executor", "executor", "emcee", "numpy")
def emcee_executor(make: Any) -> None:
    """The same on an executor: it has a map."""
    import emcee
    import numpy

    numpy.random.seed(1)
    with make.executor() as executor:
        sampler = emcee.EnsembleSampler(16, 2, tasks.minus_half_sphere, pool=executor)
        sampler.run_mcmc(numpy.random.randn(16, 2), 200)
    close_to(float(sampler.get_chain(flat=True, discard=50).std()), 1.0, 0.25)


@consumer("zeus", "pool", "zeus", "numpy")
def zeus_sampler(make: Any) -> None:
    """A slice sampler on a pool."""
    import numpy
    import zeus

    numpy.random.seed(1)
    with make.pool() as pool:
        sampler = zeus.EnsembleSampler(8, 2, tasks.minus_half_sphere, pool=pool, verbose=False)
        sampler.run_mcmc(numpy.random.randn(8, 2), 60, progress=False)
    close_to(float(sampler.get_chain(flat=True, discard=20).std()), 1.0, 0.4)


@consumer("dynesty", "pool", "dynesty", "numpy")
def dynesty_sampler(make: Any) -> None:
    """Nested sampling with pool= and queue_size=."""
    import dynesty
    import numpy

    with make.pool() as pool:
        sampler = dynesty.NestedSampler(
            tasks.log_likelihood,
            tasks.unit_cube,
            2,
            nlive=50,
            pool=pool,
            queue_size=2,
            rstate=numpy.random.default_rng(1),
        )
        sampler.run_nested(dlogz=1.0, print_progress=False)
    close_to(float(sampler.results.logz[-1]), -2.77, 1.5)


@consumer("nautilus", "pool", "nautilus", "numpy")
def nautilus_sampler(make: Any) -> None:
    """Importance nested sampling; reads the size of the pool."""
    from nautilus import Prior, Sampler

    prior = Prior()
    prior.add_parameter("a")
    prior.add_parameter("b")
    with make.pool() as pool:
        sampler = Sampler(prior, tasks.named_likelihood, n_live=100, n_networks=1, pool=(pool, None), seed=1)
        sampler.run(n_eff=200, verbose=False)
    close_to(float(sampler.log_z), -2.77, 0.5)


@consumer("adaptive", "executor", "adaptive")
def adaptive_learner(make: Any) -> None:
    """BlockingRunner with ntasks (it does not know our class)."""
    import adaptive

    learner = adaptive.Learner1D(tasks.parabola, bounds=(-1, 1))
    with make.executor() as executor:
        adaptive.BlockingRunner(learner, npoints_goal=30, executor=executor, ntasks=2)
    # Which points it takes depends on the order in which results come; their values do not.
    equal(learner.npoints >= 30 and all(value == x * x for x, value in learner.data.items()), True)


@consumer("deap", "map of an executor", "deap")
def deap_algorithm(make: Any) -> None:
    """toolbox.register("map", executor.map)"""
    import random

    from deap import algorithms, base, creator, tools

    random.seed(1)
    creator.create("Fitness", base.Fitness, weights=(-1.0,))
    creator.create("Individual", list, fitness=creator.Fitness)
    toolbox = base.Toolbox()
    toolbox.register("value", random.uniform, -5, 5)
    toolbox.register("individual", tools.initRepeat, creator.Individual, toolbox.value, 2)
    toolbox.register("population", tools.initRepeat, list, toolbox.individual)
    toolbox.register("evaluate", tasks.sphere_fitness)
    toolbox.register("mate", tools.cxBlend, alpha=0.5)
    toolbox.register("mutate", tools.mutGaussian, mu=0, sigma=0.5, indpb=0.5)
    toolbox.register("select", tools.selTournament, tournsize=3)
    with make.executor() as executor:
        toolbox.register("map", executor.map)
        population, _ = algorithms.eaSimple(toolbox.population(n=40), toolbox, 0.6, 0.3, 12, verbose=False)
    equal(min(individual.fitness.values[0] for individual in population) < 0.5, True)


@consumer("pymoo", "starmap of a pool", "pymoo", "numpy")
def pymoo_problem(make: Any) -> None:
    """StarmapParallelization(pool.starmap)"""
    from pymoo.algorithms.soo.nonconvex.ga import GA
    from pymoo.optimize import minimize

    try:
        from pymoo.parallelization import StarmapParallelization
    except ImportError:
        from pymoo.core.problem import StarmapParallelization

    from compat.consumers.pymoo_problem import Sphere

    with make.pool() as pool:
        problem = Sphere(elementwise_runner=StarmapParallelization(pool.starmap))
        found = minimize(problem, GA(pop_size=30), ("n_gen", 20), seed=1, verbose=False)
    close_to(float(found.F[0]), 0.0, 0.1)


@consumer("platypus", "pool and executor", "platypus")
def platypus_search(make: Any) -> None:
    """PoolEvaluator(pool) and SubmitEvaluator(executor.submit)."""
    import platypus

    problem = platypus.Problem(1, 2)
    problem.types[:] = platypus.Real(-10, 10)
    problem.function = tasks.schaffer
    with make.pool() as pool:
        algorithm = platypus.NSGAII(problem, evaluator=platypus.PoolEvaluator(pool))
        algorithm.run(1000)
    best = min(sum(solution.objectives) for solution in algorithm.result)
    close_to(best, 2.0, 0.2)
    with make.executor() as executor:
        again = platypus.NSGAII(problem, evaluator=platypus.SubmitEvaluator(executor.submit))
        again.run(300)
    equal(len(again.result) > 0, True)


@consumer("nevergrad", "executor", "nevergrad", "numpy")
def nevergrad_minimise(make: Any) -> None:
    """optimizer.minimize(..., executor=...)"""
    import nevergrad

    optimizer = nevergrad.optimizers.OnePlusOne(parametrization=2, budget=300, num_workers=2)
    optimizer.parametrization.random_state.seed(1)
    with make.executor() as executor:
        found = optimizer.minimize(tasks.sphere, executor=executor, batch_mode=False)
    close_to(tasks.sphere(found.value), 0.0, 0.5)


@consumer("optuna", "executor", "optuna")
def optuna_ask_tell(make: Any) -> None:
    """ask and tell with evaluations on the executor."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    with make.executor() as executor:
        for _ in range(10):
            trials = [study.ask() for _ in range(4)]
            points = [[trial.suggest_float("x", -3, 3), trial.suggest_float("y", -3, 3)] for trial in trials]
            for trial, value in zip(trials, executor.map(tasks.sphere, points), strict=True):
                study.tell(trial, value)
    equal(len(study.trials) == 40 and study.best_value < 2.0, True)


@consumer("lmfit", "pool", "lmfit", "emcee")
def lmfit_emcee(make: Any) -> None:
    """Minimizer.emcee(workers=pool)"""
    import lmfit
    import numpy

    x = numpy.linspace(0, 1, 20)
    parameters = lmfit.Parameters()
    parameters.add("a", value=1.8, min=0, max=5)
    parameters.add("b", value=0.9, min=0, max=5)
    minimizer = lmfit.Minimizer(tasks.residual, parameters, fcn_args=(x, 2 * x + 1))
    with make.pool() as pool:
        found = minimizer.emcee(steps=150, nwalkers=12, burn=50, workers=pool, progress=False, is_weighted=True, seed=1)
    close_to(float(found.params["a"].value), 2.0, 1.0)


@consumer("pyabc", "executor", "pyabc")
def pyabc_sampler(make: Any) -> None:
    """ConcurrentFutureSampler(executor)"""
    import logging

    import pyabc

    logging.disable(logging.INFO)
    with make.executor() as executor, tempfile.TemporaryDirectory() as directory:
        prior = pyabc.Distribution(mean=pyabc.RV("uniform", 0, 4))
        sampler = pyabc.sampler.ConcurrentFutureSampler(executor, client_max_jobs=4)
        abc = pyabc.ABCSMC(tasks.gaussian_model, prior, tasks.distance, population_size=30, sampler=sampler)
        abc.new(f"sqlite:///{directory}/run.db", {"y": 2.0})
        history = abc.run(max_nr_populations=3)
        frame, weights = history.get_distribution()
        close_to(float((frame["mean"] * weights).sum()), 2.0, 0.6)


# --- tools that wrap or make executors ------------------------------------------------------------------------------


@consumer("tqdm over map", "executor", "tqdm")
def tqdm_map(make: Any) -> None:
    """A progress bar over executor.map, and tqdm.contrib's way of replacing submit."""
    import io

    import tqdm

    with make.executor() as executor:
        bar = tqdm.tqdm(executor.map(tasks.square, range(30)), total=30, file=io.StringIO())
        equal(list(bar), [n * n for n in range(30)])
        count = 0
        original = executor.submit

        def submit(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            return original(*args, **kwargs)

        executor.submit = submit
        equal(list(executor.map(tasks.square, range(10))), [n * n for n in range(10)])
        equal(count, 10)


@consumer("tqdm.contrib.concurrent", "executor class", "tqdm")
def tqdm_process_map(make: Any) -> None:
    """process_map; its lock is a Manager's, because a raw one cannot reach a worker over a socket."""
    import io
    import multiprocessing

    import tqdm

    make.patch()
    from tqdm.contrib.concurrent import process_map

    with multiprocessing.get_context("spawn").Manager() as manager:
        tqdm.tqdm.set_lock(manager.RLock())
        found = process_map(
            tasks.square, range(30), max_workers=2, chunksize=3, file=io.StringIO(), tqdm_class=tqdm.tqdm
        )
    equal(found, [n * n for n in range(30)])


@consumer("more_executors", "executor", "more_executors")
def more_executors_chain(make: Any) -> None:
    """Retry, map and throttle layers round our executor."""
    from more_executors import Executors

    with make.executor() as inner:
        executor = Executors.with_map(Executors.with_throttle(inner, 2), lambda value: value + 1)
        executor = Executors.with_retry(executor, max_attempts=2)
        equal([executor.submit(tasks.square, n).result(30) for n in range(5)], [1, 2, 5, 10, 17])
        executor.shutdown()


@consumer("futureproof", "executor", "futureproof")
def futureproof_tasks(make: Any) -> None:
    """A TaskManager over ours; its monitor cannot travel (it holds a lock) and must cost nobody else."""
    from futureproof import TaskManager
    from futureproof.executors import _FutureProofExecutor

    class Ours(_FutureProofExecutor):  # type: ignore[misc]
        """The documented way of wrapping another executor class."""

        def __init__(self) -> None:
            super().__init__(make.executor, monitor_interval=0)
            self._monitor_future = self._executor.submit(tasks.square, 1)

    manager = TaskManager(Ours())
    manager.map(tasks.square, range(10))
    manager.run()
    equal(sorted(manager.results), [n * n for n in range(10)])


@consumer("schwimmbad", "pool", "schwimmbad")
def schwimmbad_choice(make: Any) -> None:
    """A program written for schwimmbad's pools (map with a callback) on ours."""
    import schwimmbad

    serial = schwimmbad.SerialPool()
    expected = list(serial.map(tasks.square, range(20)))
    with make.pool() as pool:
        equal(list(pool.map(tasks.square, range(20))), expected)


@consumer("black", "executor class", "black")
def black_format(make: Any) -> None:
    """black formats several files in its own ProcessPoolExecutor."""
    make.patch()
    import black.concurrency
    from black import WriteBack
    from black.mode import Mode
    from black.report import Report

    black.concurrency.ProcessPoolExecutor = make.executor_class
    with tempfile.TemporaryDirectory() as directory:
        paths = set()
        for index in range(4):
            path = Path(directory, f"module{index}.py")
            path.write_text("x = [1,2,\n3]\n")
            paths.add(path)
        report = Report(quiet=True)
        black.concurrency.reformat_many(
            sources=paths, fast=True, write_back=WriteBack.YES, mode=Mode(), report=report, workers=2, no_cache=True
        )
        equal((report.change_count, report.failure_count), (4, 0))
        equal({path.read_text() for path in paths}, {"x = [1, 2, 3]\n"})


@consumer("yapf", "executor class", "yapf")
def yapf_format(make: Any) -> None:
    """yapf --parallel names concurrent.futures.ProcessPoolExecutor."""
    make.patch()
    import yapf

    with tempfile.TemporaryDirectory() as directory:
        paths = [Path(directory, f"module{index}.py") for index in range(4)]
        for path in paths:
            path.write_text("x = [1,2,\n3]\n")
        equal(yapf.main(["yapf", "--in-place", "--parallel", *map(str, paths)]), 0)
        equal({path.read_text() for path in paths}, {"x = [1, 2, 3]\n"})


@consumer("pylint", "executor class", "pylint")
def pylint_jobs(make: Any) -> None:
    """pylint -j 2 with its initializer in every worker."""
    import io

    make.patch()
    from pylint.lint import Run
    from pylint.reporters.text import TextReporter

    with tempfile.TemporaryDirectory() as directory:
        for index in range(4):
            Path(directory, f"module{index}.py").write_text('"""Doc."""\nimport os\n')
        text = io.StringIO()
        names = [str(path) for path in Path(directory).glob("*.py")]
        Run(["-j2", "--disable=all", "--enable=unused-import", *names], reporter=TextReporter(text), exit=False)
        equal(text.getvalue().count("unused-import"), 4)
