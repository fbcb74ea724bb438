"""Progress bars for maps (layer 1: knows nothing of the rest).

`progress=True` uses tqdm if it is installed, else one plain line on stderr; a tqdm class or any callable
`factory(total=...)` is used as it is: what it returns needs `update(n)` and `close()`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from distpool.hints import Any


class Progress:
    """One bar; `update(n)` and `close()` may be called from one thread at a time."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def update(self, count: int = 1) -> None:
        """`count` more elements are done."""
        self._bar.update(count)

    def close(self) -> None:
        """The end of the map."""
        close = getattr(self._bar, "close", None)
        if close is not None:
            close()

    def wrap(self, results: Iterator[Any]) -> Iterator[Any]:
        """The same results, each one counted as it is delivered."""
        try:
            for result in results:
                self.update()
                yield result
        finally:
            self.close()


class _Line:
    """`done/total` on stderr, for those who have no tqdm; redrawn at most a hundred times."""

    def __init__(self, total: int | None = None) -> None:
        self._total = total
        self._done = 0
        self._shown = -1

    def update(self, count: int = 1) -> None:
        """Count and redraw if the percentage changed."""
        self._done += count
        step = self._done * 100 // self._total if self._total else self._done // 1000
        if step != self._shown and sys.stderr is not None:
            self._shown = step
            sys.stderr.write(f"\r{self._done}/{self._total or '?'}")
            sys.stderr.flush()

    def close(self) -> None:
        """End the line."""
        if sys.stderr is not None:
            sys.stderr.write(f"\r{self._done}/{self._total or self._done}\n")
            sys.stderr.flush()


def check_progress(wanted: Any) -> None:
    """`TypeError` for what `progress=` may not be."""
    if wanted and wanted is not True and not callable(wanted):
        raise TypeError("progress must be True, a tqdm class, or a callable that takes total=")


def make_progress(wanted: Any, total: int | None) -> Progress:
    """A bar for what the user gave as `progress=`; `TypeError` if that is nothing of the kind."""
    check_progress(wanted)
    if wanted is True:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            return Progress(_Line(total))
        return Progress(tqdm(total=total))
    bar = wanted(total=total)
    if not hasattr(bar, "update"):
        raise TypeError(f"progress={wanted!r} must give a bar with update(), not {type(bar).__name__}")
    return Progress(bar)
