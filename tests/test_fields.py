"""Objects with named fields: made by position or name, with defaults, and compared."""

from __future__ import annotations

from typing import ClassVar

import pytest

from distpool.fields import Fields


class Order(Fields):
    """What the tests make."""

    LIMIT: ClassVar[int] = 3
    name: str
    count: int = 1
    note: str | None = None


def test_by_position_and_by_name() -> None:
    assert Order.FIELDS == ("name", "count", "note")
    order = Order("a", note="n")
    assert (order.name, order.count, order.note) == ("a", 1, "n")
    assert Order("a", 2, "n") == Order(note="n", count=2, name="a") != Order("a", 2)
    assert Order("a") != ("a", 1, None) and repr(Order("a")) == "Order(name='a', count=1, note=None)"


def test_each_object_has_its_own() -> None:
    order = Order("a")
    order.count = 7
    assert (order.count, Order("a").count) == (7, 1)


@pytest.mark.parametrize(
    ("values", "named", "text"),
    [
        ((), {}, "needs name"),
        ((), {"count": 2}, "needs name"),
        (("a", 1, None, 4), {}, "has the fields name, count, note"),
        (("a",), {"name": "b"}, "has the fields"),
        (("a",), {"size": 1}, "has the fields"),
    ],
)
def test_what_does_not_fit(values: tuple[object, ...], named: dict[str, object], text: str) -> None:
    with pytest.raises(TypeError, match=text):
        Order(*values, **named)  # type: ignore[arg-type]


def test_not_hashable_because_they_change() -> None:
    with pytest.raises(TypeError):
        hash(Order("a"))
