"""Runs one consumer: ``python -m compat.consumers.child NAME PEER``."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from compat._proc import emit
from compat.consumers.programs import CONSUMERS


class Skip(Exception):
    """This consumer cannot run here."""


class Make:
    """Gives a program the class under test."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        if peer == "distpool":
            import distpool

            self.executor_class: Any = distpool.ClusterExecutor
            self.module: Any = distpool
        else:
            import concurrent.futures
            import multiprocessing.pool

            self.executor_class = concurrent.futures.ProcessPoolExecutor
            self.module = multiprocessing.pool

    def executor(self) -> Any:
        """Two workers behind concurrent.futures' interface."""
        return self.executor_class(max_workers=2)

    def pool(self) -> Any:
        """Two workers behind multiprocessing.Pool's interface."""
        return (self.module.DistPool if self.peer == "distpool" else self.module.Pool)(2)

    def patch(self) -> None:
        """For libraries that name the stdlib's class themselves."""
        import concurrent.futures

        concurrent.futures.ProcessPoolExecutor = self.executor_class  # type: ignore[misc]

    @contextmanager
    def joblib(self) -> Iterator[None]:
        """distpool's backend; the stdlib has none, so that run measures joblib's multiprocessing backend."""
        import joblib

        if self.peer == "distpool":
            if importlib.util.find_spec("distpool.integrations.joblib") is None:
                raise Skip("distpool.integrations.joblib does not exist")
            import distpool.integrations.joblib

            register = getattr(distpool.integrations.joblib, "register", None)
            if register is not None:
                register()
        with joblib.parallel_config(backend=self.peer if self.peer == "distpool" else "multiprocessing"):
            yield


def main() -> None:
    """Run the program and say how it ended."""
    program, modules, _ = CONSUMERS[sys.argv[1]]
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        emit({"status": "skip", "text": "not installed: " + ", ".join(missing)})
        return
    try:
        program(Make(sys.argv[2]))
    except Skip as reason:
        emit({"status": "skip", "text": str(reason)})
    except ImportError as error:
        if (error.name or "").partition(".")[0] in ("distpool", "compat"):
            raise
        emit({"status": "skip", "text": f"cannot be imported here: {error}"})
    except Exception:
        emit({"status": "fail", "text": traceback.format_exc()})
    else:
        emit({"status": "pass", "text": ""})


if __name__ == "__main__":
    main()
