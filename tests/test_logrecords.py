"""Handlers of the log are the user's code: whatever they do, the leader goes on."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator

import pytest
from wires import until

from distpool import ClusterExecutor, ProcessExitedException
from distpool.flag import Flag
from distpool.node import logrecords
from distpool.node import node as nodes
from distpool.node.logrecords import Records
from distpool.node.threads import ThreadCache

PATIENCE = 30.0


class Handler(logging.Handler):
    """Calls `act(text)` for each record of the level WARNING."""

    def __init__(self, act: Callable[[str], object]) -> None:
        super().__init__(logging.WARNING)
        self.act = act

    def emit(self, record: logging.LogRecord) -> None:
        self.act(record.getMessage())


@pytest.fixture
def handle() -> Iterator[Callable[[Callable[[str], object]], None]]:
    """Adds a handler to `distpool`, for the time of the test."""
    added: list[Handler] = []

    def add(act: Callable[[str], object]) -> None:
        added.append(Handler(act))
        logging.getLogger("distpool").addHandler(added[-1])

    yield add
    for handler in added:
        logging.getLogger("distpool").removeHandler(handler)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("kind", [RuntimeError, SystemExit, KeyboardInterrupt])
def test_a_handler_raises(
    make: Callable[..., ClusterExecutor],
    handle: Callable[..., None],
    kind: type[BaseException],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The call fails with the error of its own, the executor works on, and what the handler raised is shown."""

    def fails(text: str) -> None:
        raise kind("from the handler")

    handle(fails)
    executor = make(1)
    with pytest.raises(ProcessExitedException):
        executor.submit(die).result(PATIENCE)
    assert executor.submit(abs, -1).result(PATIENCE) == 1
    executor.shutdown()
    assert nodes.current().records.join(PATIENCE)
    assert "--- Logging error ---" in (said := capfd.readouterr().err) and "from the handler" in said


def test_a_handler_uses_the_executor(make: Callable[..., ClusterExecutor], handle: Callable[..., None]) -> None:
    """It submits a call and waits for its result, which the leader has to bring."""
    told: list[tuple[str, int]] = []
    executor = make(2)
    executor.submit(abs, -1).result(PATIENCE)
    handle(lambda text: told.append((text, executor.submit(abs, -3).result(PATIENCE))))
    with pytest.raises(ProcessExitedException):
        executor.submit(die).result(PATIENCE)
    until(lambda: any("terminated" in text for text, _ in told), "the handler has its result", PATIENCE)
    assert {value for _, value in told} == {3}


def test_a_handler_that_waits_keeps_nobody(make: Callable[..., ClusterExecutor], handle: Callable[..., None]) -> None:
    go = threading.Event()
    told: list[str] = []

    def waits(text: str) -> None:
        go.wait(PATIENCE)
        told.append(text)

    executor = make(1)
    handle(waits)
    for _ in range(5):
        with pytest.raises(ProcessExitedException):
            executor.submit(die).result(PATIENCE)
        assert executor.submit(abs, -1).result(PATIENCE) == 1
    assert not told
    go.set()
    until(lambda: sum("terminated" in text for text in told) == 5, "all records have come", PATIENCE)
    replaced = [text for text in told if "replaces" in text]
    assert len(replaced) == 5 and told.index(replaced[0]) > 0, "in their order"


def test_a_retry_is_told_before_the_result(
    make: Callable[..., ClusterExecutor], caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever has the outcome finds in the log what has led to it."""
    executor = make(1)
    with caplog.at_level(logging.WARNING, "distpool"):
        with pytest.raises(ZeroDivisionError):
            executor.options(retries=2).submit(divmod, 1, 0).result(PATIENCE)
        assert [record.getMessage()[:8] for record in caplog.records].count("retrying") == 2


def test_who_writes_waits_for_a_moment_and_not_behind_a_slow_one(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = ThreadCache("test-records")
    records = Records(threads)
    order: list[int] = []
    records.write(lambda: order.append(1))
    assert order == [1], "it is written when `write` returns"
    assert records.join(PATIENCE)
    go = threading.Event()
    records.write(lambda: (go.wait(PATIENCE), order.append(2)))
    waits: list[float | None] = []

    class Watched(Flag):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout)
            return super().wait(timeout)

    monkeypatch.setattr(logrecords, "Flag", Watched)
    records.write(lambda: order.append(3))
    assert order == [1] and not waits, "nobody waits behind one that takes long"
    assert not records.join(0.01)
    go.set()
    assert records.join(PATIENCE) and order == [1, 2, 3]
    records.write(lambda: order.append(4))
    assert order == [1, 2, 3, 4] and len(waits) == 1
