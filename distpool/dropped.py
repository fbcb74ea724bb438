"""What is to be done when an object is dropped half-way, without costing one that has come to its end (layer 0)."""

from __future__ import annotations

TYPE_CHECKING = False  # not from `typing`: see `hints`
if TYPE_CHECKING:
    from collections.abc import Callable


class WhenDropped:
    """Calls `action()` when it is dropped, unless `cancel` was called before. `action` must not refer to the owner.

    The owner could have a `__del__` itself, which looks whether there is something to do. But whoever presses Ctrl-C as
    Python enters a `__del__` has it printed and lost, and that moment comes at the end of every iteration (one of
    10,000 interrupts that strike a program which does nothing but small maps). A cancelled one has no `__del__`.
    """

    __slots__ = ("_action",)

    def __init__(self, action: Callable[[], object]) -> None:
        self._action = action

    def cancel(self) -> None:
        """Nothing is to be done any more. May be called again."""
        self.__class__ = _Cancelled  # type: ignore[assignment]
        self._action = _nothing

    def __del__(self) -> None:
        getattr(self, "_action", _nothing)()  # an interrupt may have kept it from being made


class _Cancelled:
    """The same object afterwards."""

    __slots__ = ("_action",)

    def cancel(self) -> None:
        """It is."""


def _nothing() -> None:
    pass


__all__ = ["WhenDropped"]
