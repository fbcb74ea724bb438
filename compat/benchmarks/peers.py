"""One small adapter per library, all with the same five verbs, so that a workload is written once.

To add a peer: subclass :class:`Peer` (or :class:`Executor` / :class:`Pool` if it has their shape), and list it in
:data:`PEERS`. Libraries are imported inside ``open``: W1 measures that too.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any


class NotApplicable(Exception):
    """This peer has no such operation."""


class Peer:
    """What a workload needs of a library. ``fast``: gets the full task counts also in a quick run. ``scale``: factor on
    the task counts of a slow peer. ``holder_chunk``, ``uneven_chunk``: the chunk size that suits it best for W6 and W7
    (None: its own choice); ``usual_chunk``: that of its map if nobody says anything (None: its own choice)."""

    name = "?"
    module = "?"
    fast = False
    scale = 1.0
    arrays = True
    holder_chunk: int | None = None
    uneven_chunk: int | None = None
    usual_chunk: int | None = None

    def available(self) -> str:
        """Empty, or why this peer cannot be measured here."""
        missing = importlib.util.find_spec(self.module.partition(".")[0]) is None
        return f"{self.module} is not installed" if missing else ""

    def count(self, params: dict[str, Any], name: str) -> int:
        """How many tasks this peer gets in a workload."""
        return max(100, int(params.get(f"fast_{name}" if self.fast else name, params[name]) * self.scale))

    def open(self, workers: int) -> None:
        """Import the library and start ``workers`` workers."""
        raise NotImplementedError

    def call(self, fn: Callable[..., Any], *args: Any) -> Any:
        """One call, its value waited for."""
        raise NotImplementedError

    def start(self, fn: Callable[..., Any], *args: Any) -> Any:
        """Submit one call; what comes back goes to :meth:`finish`."""
        raise NotApplicable

    def finish(self, handle: Any) -> Any:
        """The value of a started call."""
        return handle.result()

    def all(self, fn: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Submit every call, then collect every value."""
        handles = [self.start(fn, *args) for args in arguments]
        return [self.finish(handle) for handle in handles]

    def map(self, fn: Callable[..., Any], items: Iterable[Any], chunksize: int | None) -> list[Any]:
        """The library's map; ``None`` leaves the chunk size to it."""
        raise NotApplicable

    def close(self) -> None:
        """Stop the workers and wait for them."""
        raise NotImplementedError


class Executor(Peer):
    """Anything with the interface of concurrent.futures."""

    holder_chunk = 100
    uneven_chunk = 32  # of 2,000: with 1, ppe reaches 0.83 of the ideal instead of 0.97, with 8 0.95; loky alike
    usual_chunk = 1
    executor: Any

    def call(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.executor.submit(fn, *args).result()

    def start(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.executor.submit(fn, *args)

    def map(self, fn: Callable[..., Any], items: Iterable[Any], chunksize: int | None) -> list[Any]:
        if chunksize is None:
            raise NotApplicable("its default is chunksize 1")
        return list(self.executor.map(fn, items, chunksize=chunksize))

    def close(self) -> None:
        self.executor.shutdown(wait=True)


class Pool(Peer):
    """Anything with the interface of multiprocessing.Pool."""

    pool: Any

    def call(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.pool.apply(fn, args)

    def start(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.pool.apply_async(fn, args)

    def finish(self, handle: Any) -> Any:
        return handle.get()

    def map(self, fn: Callable[..., Any], items: Iterable[Any], chunksize: int | None) -> list[Any]:
        return list(self.pool.map(fn, items, chunksize))

    def close(self) -> None:
        self.pool.close()
        self.pool.join()


class ProcessPool(Executor):
    """concurrent.futures.ProcessPoolExecutor with one start method."""

    module = "concurrent.futures"

    def __init__(self, method: str) -> None:
        self.method = method
        self.name = "ppe" if method == "fork" else f"ppe-{method}"

    def open(self, workers: int) -> None:
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        self.executor = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context(self.method))


class StdlibPool(Pool):
    """multiprocessing.Pool, forked."""

    name, module, fast = "pool", "multiprocessing", True

    def open(self, workers: int) -> None:
        import multiprocessing

        self.pool = multiprocessing.get_context("fork").Pool(workers)


class Distpool(Executor):
    """distpool.ClusterExecutor"""

    name, module, fast = "distpool", "distpool", True
    holder_chunk = uneven_chunk = 1

    def open(self, workers: int) -> None:
        import distpool

        self.executor = distpool.ClusterExecutor(workers)


class DistpoolPool(Pool):
    """distpool.DistPool."""

    name, module, fast = "distpool-pool", "distpool", True

    def open(self, workers: int) -> None:
        import distpool

        self.pool = distpool.DistPool(workers)


class DistpoolTcp(Distpool):
    """distpool over TCP with every same-host short cut switched off (the ``remote`` row)."""

    name = "distpool-tcp"

    def open(self, workers: int) -> None:
        import os

        os.environ["DISTPOOL_TRANSPORT"] = "tcp"
        os.environ["DISTPOOL_SHM"] = "0"
        super().open(workers)


class Loky(Executor):
    """loky's reusable executor."""

    name = module = "loky"

    def open(self, workers: int) -> None:
        import loky

        self.executor = loky.get_reusable_executor(max_workers=workers)


class Mpire(Pool):
    """mpire.WorkerPool with living workers."""

    name = module = "mpire"

    def open(self, workers: int) -> None:
        import mpire

        self.pool = mpire.WorkerPool(n_jobs=workers, keep_alive=True)

    def map(self, fn: Callable[..., Any], items: Iterable[Any], chunksize: int | None) -> list[Any]:
        return list(self.pool.map(fn, items, chunk_size=chunksize))

    def close(self) -> None:
        self.pool.stop_and_join()


class Pebble(Peer):
    """pebble.ProcessPool."""

    name = module = "pebble"
    holder_chunk = 100
    uneven_chunk = 32
    usual_chunk = 1

    def open(self, workers: int) -> None:
        import pebble

        self.pool = pebble.ProcessPool(max_workers=workers)

    def call(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.start(fn, *args).result()

    def start(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.pool.schedule(fn, args=args)

    def map(self, fn: Callable[..., Any], items: Iterable[Any], chunksize: int | None) -> list[Any]:
        return list(self.pool.map(fn, items, chunksize=chunksize or 1).result())

    def close(self) -> None:
        self.pool.close()
        self.pool.join()


class Pathos(Peer):
    """pathos.pools.ProcessPool (multiprocess and dill underneath)."""

    name = module = "pathos"

    def open(self, workers: int) -> None:
        from pathos.pools import ProcessPool as PathosPool

        self.pool = PathosPool(nodes=workers)

    def call(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.pool.pipe(fn, *args)

    def start(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.pool.apipe(fn, *args)

    def finish(self, handle: Any) -> Any:
        return handle.get()

    def map(self, fn: Callable[..., Any], items: Iterable[Any], chunksize: int | None) -> list[Any]:
        return list(self.pool.map(fn, items, **({"chunksize": chunksize} if chunksize else {})))

    def close(self) -> None:
        self.pool.close()
        self.pool.join()


class Joblib(Peer):
    """joblib.Parallel with its default backend, kept open."""

    name = module = "joblib"

    def open(self, workers: int) -> None:
        import joblib

        self.workers, self.joblib = workers, joblib
        self.parallel = joblib.Parallel(n_jobs=workers).__enter__()

    def call(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.parallel([self.joblib.delayed(fn)(*args)])[0]

    def all(self, fn: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        self.parallel.batch_size = 1
        return list(self.parallel(self.joblib.delayed(fn)(*args) for args in arguments))

    def map(self, fn: Callable[..., Any], items: Iterable[Any], chunksize: int | None) -> list[Any]:
        self.parallel.batch_size = chunksize or "auto"
        return list(self.parallel(self.joblib.delayed(fn)(item) for item in items))

    def close(self) -> None:
        self.parallel.__exit__(None, None, None)
        from joblib.externals.loky import get_reusable_executor

        get_reusable_executor().shutdown(wait=True)


class Dask(Peer):
    """dask.distributed with one single-threaded process per worker."""

    name, module, scale = "dask", "distributed", 0.1

    def open(self, workers: int) -> None:
        from distributed import Client, LocalCluster

        self.cluster = LocalCluster(n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=None)
        self.client = Client(self.cluster)

    def call(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.start(fn, *args).result()

    def start(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.client.submit(fn, *args, pure=False)

    def all(self, fn: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        return list(self.client.gather([self.start(fn, *args) for args in arguments]))

    def map(self, fn: Callable[..., Any], items: Iterable[Any], chunksize: int | None) -> list[Any]:
        return list(self.client.gather(self.client.map(fn, list(items), pure=False, batch_size=chunksize)))

    def close(self) -> None:
        self.client.close()
        self.cluster.close()


EXECNET_LOOP = """
import importlib
while True:
    item = channel.receive()
    if item is None:
        break
    module, name, args = item
    channel.send(getattr(importlib.import_module(module), name)(*args))
"""


class Execnet(Peer):
    """execnet: a loop in each gateway; the calls are dealt out in turn (it has no scheduler of its own)."""

    name = module = "execnet"
    arrays = False

    def open(self, workers: int) -> None:
        import execnet

        self.group = execnet.Group([f"popen//python={sys.executable}" for _ in range(workers)])
        self.channels = [gateway.remote_exec(EXECNET_LOOP) for gateway in self.group]
        self.turn = 0

    def call(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.finish(self.start(fn, *args))

    def start(self, fn: Callable[..., Any], *args: Any) -> Any:
        self.turn += 1
        channel = self.channels[self.turn % len(self.channels)]
        channel.send((fn.__module__, fn.__name__, args))
        return channel

    def finish(self, handle: Any) -> Any:
        return handle.receive(60)

    def close(self) -> None:
        for channel in self.channels:
            channel.send(None)
        self.group.terminate(timeout=5)


class Ray(Peer):
    """ray tasks on a local instance."""

    name = module = "ray"
    scale = 0.1

    def open(self, workers: int) -> None:
        import ray

        self.ray = ray
        self.remote: dict[Any, Any] = {}
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)

    def call(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.ray.get(self.start(fn, *args))

    def start(self, fn: Callable[..., Any], *args: Any) -> Any:
        if fn not in self.remote:
            self.remote[fn] = self.ray.remote(lambda *call_args: fn(*call_args))
        return self.remote[fn].remote(*args)

    def finish(self, handle: Any) -> Any:
        return self.ray.get(handle)

    def all(self, fn: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        return list(self.ray.get([self.start(fn, *args) for args in arguments]))

    def close(self) -> None:
        self.ray.shutdown()


PEERS: dict[str, Callable[[], Peer]] = {
    "ppe": lambda: ProcessPool("fork"),
    "ppe-forkserver": lambda: ProcessPool("forkserver"),
    "ppe-spawn": lambda: ProcessPool("spawn"),
    "pool": StdlibPool,
    "loky": Loky,
    "joblib": Joblib,
    "mpire": Mpire,
    "pebble": Pebble,
    "pathos": Pathos,
    "dask": Dask,
    "execnet": Execnet,
    "ray": Ray,
    "distpool": Distpool,
    "distpool-pool": DistpoolPool,
    "distpool-tcp": DistpoolTcp,
}
