"""What `typing` offers, for modules that every program and every worker loads before the first result (layer 0).

`typing` takes 2 ms to load, and its `NamedTuple` compiles the annotations, for which Python sets up its syntax tree in
another 1.5: together an eighth of what a zygote loads while everybody waits for it. Type checkers see the real names;
when the program runs, annotations are text that nobody looks at, and these are stand-ins. Modules that are loaded later
take `typing` itself; the few that come before a zygote is even started say TYPE_CHECKING = False themselves, which type
checkers know as well.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any as Any
    from typing import ClassVar as ClassVar
    from typing import NamedTuple as NamedTuple
    from typing import NoReturn as NoReturn
    from typing import Protocol as Protocol
    from typing import Self as Self
    from typing import TypeVar

    T = TypeVar("T")
else:
    from collections import namedtuple

    Any = ClassVar = NoReturn = Protocol = Self = T = object

    class _Named(type):
        """`class Point(NamedTuple)`: the annotated names are its fields, the rest is added, as `typing` does it."""

        def __new__(kind, name, bases, space):
            fields = space.get("__annotations__", {})
            defaults = [space[field] for field in fields if field in space]
            made = namedtuple(name, fields, defaults=defaults, module=space["__module__"])
            for key, value in space.items():
                if key not in fields:
                    setattr(made, key, value)
            return made

    NamedTuple = type.__new__(_Named, "NamedTuple", (), {})

__all__ = ["TYPE_CHECKING", "Any", "ClassVar", "NamedTuple", "NoReturn", "Protocol", "Self", "T"]
