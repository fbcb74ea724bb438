"""Objects with named fields, written and type-checked like dataclasses (layer 0).

Made without `exec`: dataclasses of all kinds of messages took 15 ms, a quarter of the time that a worker and its master
need to start, and the module `dataclasses` alone takes 5. Nor is `typing` loaded (`hints`).
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, dataclass_transform
else:

    def dataclass_transform():
        return lambda base: base


@dataclass_transform()
class Fields:
    """Base: the annotated attributes of a class are its fields, in order; a default is an attribute of the class."""

    FIELDS: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        cls.FIELDS = tuple(name for name, kind in cls.__annotations__.items() if not kind.startswith("ClassVar"))

    def __init__(self, *values: Any, **named: Any) -> None:
        fields = self.FIELDS
        found = self.__dict__
        found.update(zip(fields, values, strict=False))
        if len(values) == len(fields) and not named:
            return
        if len(values) > len(fields) or not set(fields[len(values) :]).issuperset(named):
            raise TypeError(f"{type(self).__name__}() has the fields {', '.join(fields)}")
        found.update(named)
        for name in fields:
            if name not in found:
                if not hasattr(self, name):  # a default is an attribute of the class
                    raise TypeError(f"{type(self).__name__}() needs {name}")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and all(getattr(self, name) == getattr(other, name) for name in self.FIELDS)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self.FIELDS)})"


__all__ = ["Fields"]
