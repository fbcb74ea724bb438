"""Loggers that are looked up when something is logged."""

from __future__ import annotations

import builtins
import logging
import subprocess
import sys
from typing import Any

import pytest

from distpool.logs import Log


def test_what_is_logged_goes_to_the_logger_of_that_name(caplog: pytest.LogCaptureFixture) -> None:
    log = Log("somewhere")
    with caplog.at_level(logging.INFO, "distpool.somewhere"):
        log.info("worker %d", 3)
        log.debug("too little")
        try:
            raise ValueError("from here")
        except ValueError:
            log.exception("it failed")
    assert [(record.name, record.getMessage()) for record in caplog.records] == [
        ("distpool.somewhere", "worker 3"),
        ("distpool.somewhere", "it failed"),
    ]
    assert "from here" in caplog.text


def test_a_program_that_does_not_ask_sees_nothing() -> None:
    source = """if True:
        import sys
        import distpool
        from distpool.logs import Log
        log = Log("x")
        assert "logging" not in sys.modules, "loaded before anything was logged"
        log.warning("nobody asked for this")
        import logging
        logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
        log.warning("this was asked for")
    """
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "distpool.x: this was asked for\n"


@pytest.mark.parametrize(
    "source",
    [
        "import logging, distpool",
        "import logging; from distpool import errors",
        "import distpool, logging; distpool.ClusterExecutor",
        "import distpool, logging; distpool.Future",
        "import distpool, logging; distpool.remotecall",
        "import distpool, logging; distpool.addprocs",
        "import distpool, logging; distpool.DistPool",
        "import distpool, logging; distpool.pmap",
    ],
)
def test_the_null_handler_is_there(source: str) -> None:
    """Before anything is logged: with the import of the package, or with the first name that can log."""
    look = "print([type(handler).__name__ for handler in logging.getLogger('distpool').handlers])"
    command = [sys.executable, "-c", f"{source}\n{look}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("['NullHandler']\n", "")


def test_the_import_does_not_load_logging_and_respects_what_is_there() -> None:
    source = """if True:
        import sys
        import distpool
        assert "logging" not in sys.modules
        assert "distpool.logs" not in sys.modules
        del sys.modules["distpool"]
        import logging
        own = logging.StreamHandler()
        logging.getLogger("distpool").addHandler(own)
        import distpool
        assert logging.getLogger("distpool").handlers == [own]
    """
    subprocess.run([sys.executable, "-c", source], timeout=60, check=True)


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), MemoryError()])
def test_a_log_that_cannot_be_loaded_costs_nobody(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    real = builtins.__import__

    def without_logging(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "logging":
            raise error
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_logging)
    Log("x").error("no descriptors left: %s", 0)
