"""What has to fit between two processes, and what is said when it does not (layer 1).

    JOIN, JOINED   each carries `own()` at a place that never changes, so that it can be read whatever else differs
    mismatch       -> the text for a VersionMismatchError, which names both sides and what to do

Pickles of functions hold byte code (of one minor version of Python) and calls into cloudpickle; all else is distpool's.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import sys

from distpool.errors import ProtocolError
from distpool.hints import Any

WIRE = "3"
"""Changes with every change of a frame that an older process would misunderstand."""

NAMES = ("wire protocol", "distpool", "Python", "byte order", "cloudpickle")

_ADVICE = {
    "Python": "name a Python of the same minor version with exename=",
    "cloudpickle": "install the same version of cloudpickle on both sides",
    "byte order": "such machines cannot work together",
}
_VERSION = re.compile(r"^__version__\s*=\s*[\"']([^\"']+)[\"']", re.MULTILINE)


@functools.cache
def own() -> list[str]:
    """This process's versions, in the order of `NAMES`."""
    distpool = str(getattr(sys.modules["distpool"], "__version__", ""))
    return [WIRE, distpool, f"{sys.version_info[0]}.{sys.version_info[1]}", sys.byteorder, _cloudpickle()]


def _cloudpickle() -> str:
    """Its version, or nothing. Read, not imported: that would cost each worker ten milliseconds."""
    module = sys.modules.get("cloudpickle")
    if module is not None:
        return str(getattr(module, "__version__", ""))
    spec = importlib.util.find_spec("cloudpickle")
    loader: Any = spec.loader if spec is not None else None
    if spec is None or spec.origin is None or not hasattr(loader, "get_data"):
        return ""
    found = _VERSION.search(loader.get_data(spec.origin).decode("utf-8", "replace"))
    return found[1] if found else ""


def read(control: bytes, place: int) -> list[str]:
    """The versions in a control part of whatever version; `ProtocolError` if there are none."""
    try:
        found = json.loads(control)[place]
    except (ValueError, TypeError, IndexError, KeyError):
        found = None
    if not isinstance(found, list) or not all(isinstance(part, str) for part in found):
        raise ProtocolError("its first message does not say which versions it has")
    return found


def mismatch(theirs: list[str], name: str) -> str:
    """Why `name`, which has these versions, does not fit this process; nothing if it does."""
    mine, said, advice = own(), [], []
    for index, what in enumerate(NAMES):
        there = theirs[index] if index < len(theirs) else ""
        if not _fit(what, there, mine[index]):
            said.append(f"{name} has {what} {there or '(unknown)'}, this process {mine[index] or '(unknown)'}")
            advice.append(_ADVICE.get(what, "install the same version of distpool on both sides"))
    return f"{'; '.join(said)} ({'; '.join(dict.fromkeys(advice))})" if said else ""


def _fit(what: str, one: str, other: str) -> bool:
    if what != "cloudpickle":
        return one == other
    # Its patch releases load each other's pickles; where it cannot be found, the first pickle will tell.
    return not one or not other or one.split(".")[:2] == other.split(".")[:2]


__all__ = ["NAMES", "WIRE", "mismatch", "own", "read"]
