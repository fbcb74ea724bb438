"""All 32 combinations of pmap's options, against a model of the rules.

distributed x batch_size x on_error x retry_delays x retry_check, each for every way in which an element can end: it
works, it fails always or once with an error of one of three types, its worker dies once. What pmap gives (a list or an
error), how often the element was called, and which errors `on_error` saw must be what the rules say.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import distpool
from distpool import ClusterExecutor, ProcessExitedException, pmap

BAD = 4
"""The element that does not simply work."""

COUNT = 10
KINDS: dict[str, tuple[type[BaseException] | None, bool]] = {
    # how the bad element ends: its error, and whether every call fails or only the first
    "works": (None, False),
    "handled": (KeyError, True),
    "flaky": (ValueError, False),
    "other": (TypeError, False),
    "always": (ValueError, True),
    "dies": (ProcessExitedException, False),
}

COMBINATIONS = list(itertools.product((True, False), (1, 3), (False, True), ((), (0.0, 0.0)), (None, ValueError)))


pytestmark = pytest.mark.leaves_processes  # the module's executor replaces workers; its shutdown ends them all


@pytest.fixture(scope="module")
def executor() -> Iterator[ClusterExecutor]:
    with ClusterExecutor(2) as made:
        yield made


def act(path: str, kind: str, number: int) -> int:
    """The function under the map; notes each call."""
    with open(path, "ab") as log:
        log.write(b"%d\n" % number)
    error, always = KINDS[kind]
    if number != BAD or error is None or (not always and calls_of(path, number) > 1):
        return number * 10
    if error is ProcessExitedException:
        os.kill(os.getpid(), signal.SIGKILL)
    raise error("foobar")


def calls_of(path: str, number: int) -> int:
    return Path(path).read_text().split().count(str(number))


def model(
    kind: str, hook: bool, delays: tuple[float, ...], check: type | None
) -> tuple[int, Any, type[BaseException] | None, int]:
    """Calls of the bad element, its value, the error that ends the map, and how often the hook is called."""
    error, always = KINDS[kind]
    if error is None:
        return 1, BAD * 10, None, 0
    if hook and error is KeyError:
        return 1, "given", None, 1
    retries = len(delays) if check is None or issubclass(error, check) else 0
    if always or not retries:
        return 1 + retries, None, error, (1 + retries) * hook
    return 2, BAD * 10, None, 1 * hook


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("distributed", "batch_size", "hook", "delays", "check"), COMBINATIONS)
def test_combination(
    executor: ClusterExecutor,
    tmp_path: Path,
    kind: str,
    distributed: bool,
    batch_size: int,
    hook: bool,
    delays: tuple[float, ...],
    check: type | None,
) -> None:
    if kind == "dies" and not distributed:
        pytest.skip("it would be this process that dies")
    path = str(tmp_path / "log")
    seen: list[BaseException] = []

    def on_error(error: BaseException) -> str:
        seen.append(error)
        if isinstance(error, KeyError):
            return "given"
        raise error

    def call() -> list[Any]:
        return pmap(
            lambda number: act(path, kind, number),
            range(COUNT),
            pool=executor,
            distributed=distributed,
            batch_size=batch_size,
            on_error=on_error if hook else None,
            retry_delays=delays,
            retry_check=check,
        )

    calls, value, error, hooked = model(kind, hook, delays, check)
    if error is None:
        assert call() == [value if number == BAD else number * 10 for number in range(COUNT)]
        assert [calls_of(path, number) for number in range(COUNT) if number != BAD] == [1] * (COUNT - 1)
    else:
        with pytest.raises(error) as caught:
            call()
        assert type(caught.value) is error
        if error is not ProcessExitedException:
            assert caught.value.args == ("foobar",)
            assert "in act" in str(caught.value.__cause__)
        assert max(calls_of(path, number) for number in range(COUNT) if number != BAD) <= 1
    assert calls_of(path, BAD) == calls
    assert len(seen) == hooked
    assert all(type(failure) is KINDS[kind][0] for failure in seen)


def test_there_are_32() -> None:
    assert len(set(COMBINATIONS)) == 32


Wrap = Callable[[Any], Any]


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
@pytest.mark.parametrize("wrap", [list, iter], ids=["list", "iterator"])
def test_C134_all_elements_fail(executor: ClusterExecutor, batch_size: int | str, wrap: Wrap) -> None:
    """C134: nothing special about a batch of which nothing is left."""

    def boom(number: int) -> None:
        raise RuntimeError("foobar")

    inputs = wrap([0] * 50)
    assert executor.pmap(boom, inputs, on_error=lambda error: 0.0, batch_size=batch_size) == [0.0] * 50
    errors = executor.pmap(boom, wrap([0] * 5), on_error=lambda error: error, batch_size=batch_size)
    assert [repr(error) for error in errors] == ["RuntimeError('foobar')"] * 5
    assert distpool.__version__
