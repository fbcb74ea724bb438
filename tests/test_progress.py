"""Progress bars: any callable that takes `total`, tqdm, or a plain line."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from distpool.progress import Progress, make_progress


class Bar:
    def __init__(self, total: int | None = None) -> None:
        self.total, self.n, self.closed = total, 0, 0

    def update(self, n: int = 1) -> None:
        self.n += n

    def close(self) -> None:
        self.closed += 1


def bar_of(progress: Progress) -> Any:
    return progress._bar


def test_a_callable_of_the_users_own() -> None:
    progress = make_progress(Bar, 10)
    progress.update()
    progress.update(3)
    progress.close()
    assert (bar_of(progress).total, bar_of(progress).n, bar_of(progress).closed) == (10, 4, 1)


def test_wrapped_results_are_counted_as_they_are_delivered() -> None:
    progress = make_progress(Bar, None)
    results = progress.wrap(iter("abc"))
    assert bar_of(progress).n == 0
    assert next(results) == "a" and bar_of(progress).n == 1
    assert list(results) == ["b", "c"]
    assert bar_of(progress).n == 3 and bar_of(progress).closed == 1


@pytest.mark.parametrize("how", ["error", "dropped"])
def test_the_bar_is_closed_however_it_ends(how: str) -> None:
    progress = make_progress(Bar, 3)

    def source() -> Any:
        yield 1
        raise OSError

    results = progress.wrap(source())
    next(results)
    if how == "error":
        with pytest.raises(OSError):
            next(results)
    else:
        del results
    assert bar_of(progress).closed == 1


def test_a_bar_without_close() -> None:
    class Small:
        def __init__(self, total: int | None) -> None:
            pass

        def update(self, n: int) -> None:
            pass

    progress = make_progress(Small, 1)
    progress.update()
    progress.close()


def test_tqdm(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    assert list(make_progress(True, 5).wrap(iter(range(5)))) == list(range(5))
    assert "5/5" in capsys.readouterr().err


@pytest.mark.parametrize("total, expected", [(5, "5/5"), (None, "5/5")])
def test_without_tqdm_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], total: int | None, expected: str
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    list(make_progress(True, total).wrap(iter(range(5))))
    assert expected in capsys.readouterr().err
    monkeypatch.setattr(sys, "stderr", None)
    list(make_progress(True, total).wrap(iter(range(5))))


@pytest.mark.parametrize("wanted", [1, "tqdm", object()])
def test_anything_else_is_an_error(wanted: Any) -> None:
    with pytest.raises(TypeError, match="progress"):
        make_progress(wanted, 1)


def test_what_gives_no_bar_is_said_at_once() -> None:
    with pytest.raises(TypeError, match="must give a bar with update"):
        make_progress(lambda total: None, 3)
