"""What modules that are loaded at once take instead of `typing`."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys

import pytest

from distpool import hints

NAMED: type = hints.NamedTuple  # type checkers see that of `typing`


class Point(NAMED):  # type: ignore[misc]
    """What the tests make."""

    x: int
    y: int = 2

    @property
    def sum(self) -> int:
        return self.x + self.y


def test_named_tuples() -> None:
    point = Point(1)
    assert point == (1, 2) == Point(x=1, y=2) and (point.x, point.y, point.sum) == (1, 2, 3)
    assert repr(point) == "Point(x=1, y=2)" and point._replace(y=3) == (1, 3)
    assert Point._fields == ("x", "y") and Point._field_defaults == {"y": 2}
    assert list(inspect.signature(Point).parameters) == ["x", "y"] and Point.__doc__ == "What the tests make."
    assert (Point.__module__, Point.__qualname__) == (__name__, "Point")
    assert pickle.loads(pickle.dumps(point)) == point
    with pytest.raises(TypeError):
        Point()


def test_the_names_of_typing() -> None:
    import typing

    assert set(hints.__all__) - {"T"} <= set(typing.__all__)


@pytest.mark.parametrize("modules", ["distpool.zygote, distpool.worker", "distpool.executor, distpool.opening"])
def test_what_everybody_waits_for_does_not_load_typing(modules: str) -> None:
    """Nor anything that takes as long: see `fields`, `record`."""
    code = "import sys; found = {'typing', 'dataclasses', 'inspect', 'asyncio', 'cloudpickle', 'multiprocessing'}; "
    code += f"found -= set(sys.modules); import {modules}; print(*found & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout == "\n"
