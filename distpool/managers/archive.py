"""Archives of pure files: what is sent to other hosts, identified by content (layer 8).

    "mypkg", "path/to/module.py", Path(...) --find--> Source: which files, under which names --pack--> Archive

Packages are found without being imported. An archive is compressed when somebody wants its bytes for the first time:
a host that has the content, or distpool itself, never does. Any thread.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import io
import os
import pkgutil
import sys
import threading
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from distpool.managers.unpacking import digest_of

AUTO = "auto"
"""The item of `ship` that lets workers fetch what they miss."""

_SKIPPED_DIRECTORIES = {
    *("__pycache__", ".git", ".hg", ".svn", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".ipynb_checkpoints"),
}
_SKIPPED_SUFFIXES = (".pyc", ".pyo")
_LONG_AGO = (1980, 1, 1, 0, 0, 0)  # the same bytes for the same content


@dataclass(frozen=True)
class Source:
    """Files that go into one archive: `parts` are (name in the archive, path here), directories with all below them.

    `name`: the module that it makes importable.
    """

    name: str
    parts: tuple[tuple[str, str], ...]


class Archive:
    """Files with their content: (name, whether it can be executed, bytes), sorted by name."""

    def __init__(self, files: Iterable[tuple[str, bool, bytes]]) -> None:
        self._files = sorted(files)
        self.digest = digest_of(self._files)
        self._lock = threading.Lock()  # protects `_data`: several logins may want it at the same time
        self._data = b""

    @property
    def data(self) -> bytes:
        """The archive as bytes; the same ones for the same content."""
        with self._lock:
            if not self._data:
                buffer = io.BytesIO()
                with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
                    for name, executable, content in self._files:
                        info = zipfile.ZipInfo(name, _LONG_AGO)
                        info.external_attr = (0o100755 if executable else 0o100644) << 16
                        info.compress_type = zipfile.ZIP_DEFLATED
                        info.create_system = 3
                        archive.writestr(info, content)
                self._data = buffer.getvalue()
            return self._data


# -- what the user names -----------------------------------------------------------------------------------------


def wishes(ship: Any) -> tuple[list[Source], bool]:
    """What `ship=` asks for: the sources, and whether workers may fetch what they miss ("auto").

    TypeError: it is no list of names and paths. ValueError: one of them cannot be found, or is nothing to import.
    """
    if ship is None:
        return [], False
    if ship == AUTO:
        return [], True
    if isinstance(ship, str | bytes | os.PathLike):
        raise TypeError(f"ship must be 'auto' or a list of names and paths, not {ship!r}")
    try:
        items = list(ship)
    except TypeError:
        raise TypeError(f"ship must be 'auto' or a list of names and paths, not {ship!r}") from None
    return [find(item) for item in items if item != AUTO], AUTO in items


def find(item: Any) -> Source:
    """The files of one item of `ship`: an importable name, or the path of a module or package.

    Example: `find("mypkg")`, `find("tools/helper.py")`
    """
    if isinstance(item, os.PathLike):
        return _find_path(os.fspath(item), item)
    if not isinstance(item, str):
        raise TypeError(f"ship takes names and paths, not {item!r}")
    if "/" in item or os.sep in item or item.startswith((".", "~")) or item.endswith(".py"):
        return _find_path(item, item)
    if not item or not all(part.isidentifier() for part in item.split(".")):
        raise ValueError(f"cannot ship {item!r}: neither the name of a module nor a path")
    source = find_module(item) if item != "__main__" else None
    if source is None:
        raise ValueError(f"cannot ship {item!r}: there is no module of that name here")
    return source


def find_module(name: str) -> Source | None:
    """The files of an importable module or package; None if there is none. It is not imported, nor are its parents.

    Those of parents come along: without their `__init__` it could not be imported. ValueError: it has no files.
    """
    parts: list[tuple[str, str]] = []
    names = name.split(".")
    spec = _spec(names[0])
    for depth in range(1, len(names)):
        if spec is None or spec.submodule_search_locations is None:
            return None
        if spec.origin and spec.has_location:
            parts.append(("/".join([*names[:depth], os.path.basename(spec.origin)]), spec.origin))
        spec = _spec_below(".".join(names[: depth + 1]), list(spec.submodule_search_locations))
    if spec is None:
        return None
    prefix = "/".join(names[:-1]) + "/" if len(names) > 1 else ""
    if spec.submodule_search_locations is not None:
        places = [os.fspath(place) for place in spec.submodule_search_locations]
        parts += [(prefix + names[-1], place) for place in places]
    elif spec.origin and spec.has_location:
        places = [spec.origin]
        parts.append((prefix + os.path.basename(spec.origin), spec.origin))
    else:
        raise ValueError(f"cannot ship {name!r}: it is part of Python itself")
    for place in places:
        if not os.path.exists(place):
            raise ValueError(f"cannot ship {name!r}: {place} is no file of its own (is it inside an archive?)")
    return Source(name, tuple(parts))


def _spec(name: str) -> importlib.machinery.ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except (ValueError, ImportError):  # a module that somebody has made by hand: it has no files
        return None


def _spec_below(name: str, places: Iterable[str]) -> importlib.machinery.ModuleSpec | None:
    """As PathFinder does it, which for namespace packages wants their parents to be imported."""
    portions: list[str] = []
    for place in places:
        finder = pkgutil.get_importer(place)
        spec = finder.find_spec(name) if finder is not None else None
        if spec is not None and spec.loader is not None:
            return spec
        if spec is not None:
            portions += spec.submodule_search_locations or []
    if not portions:
        return None
    spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = portions
    return spec


def _find_path(text: str, item: Any) -> Source:
    path = os.path.abspath(os.path.expanduser(text))
    base = os.path.basename(path)
    if os.path.isdir(path):
        if not base.isidentifier():
            raise ValueError(f"cannot ship {text!r}: {base!r} cannot be the name of a package")
        return Source(base, ((base, path),))
    if not os.path.isfile(path):
        raise ValueError(f"cannot ship {text!r}: there is no such file or directory")
    name = base.partition(".")[0]
    if not name.isidentifier() or not base.endswith(tuple(importlib.machinery.all_suffixes())):
        raise ValueError(f"cannot ship {text!r}: not a module (data files belong into a package)")
    return Source(name, ((base, path),))


# -- archives ----------------------------------------------------------------------------------------------------


def pack(*sources: Source) -> Archive:
    """The archive of these sources. OSError: a file cannot be read."""
    found: dict[str, str] = {}
    for source in sources:
        for name, path in source.parts:
            for inner, file in _files(name, path):
                found.setdefault(inner, file)  # of several places of a namespace package the first counts
    return Archive(_read(name, path) for name, path in found.items())


def _read(name: str, path: str) -> tuple[str, bool, bytes]:
    with open(path, "rb") as file:
        executable = bool(os.fstat(file.fileno()).st_mode & 0o100)
        return name, executable, file.read()


def _files(name: str, path: str) -> Iterator[tuple[str, str]]:
    if not os.path.isdir(path):
        yield name, path
        return
    seen = set()  # links to directories are followed, but not in circles
    for directory, inner, files in os.walk(path, followlinks=True, onerror=_raise):
        seen.add(os.path.realpath(directory))
        inner[:] = sorted(
            each
            for each in inner
            if each not in _SKIPPED_DIRECTORIES and os.path.realpath(os.path.join(directory, each)) not in seen
        )
        below = os.path.relpath(directory, path).replace(os.sep, "/")
        start = name if below == "." else f"{name}/{below}"
        for each in files:
            file = os.path.join(directory, each)
            if not each.endswith(_SKIPPED_SUFFIXES) and os.path.isfile(file):
                yield f"{start}/{each}", file


def _raise(error: OSError) -> None:
    raise error


@functools.cache
def own() -> Archive:
    """distpool and cloudpickle as they are here: all that a worker needs besides Python."""
    import cloudpickle

    packages = [
        ("distpool", os.path.dirname(os.path.abspath(str(sys.modules["distpool"].__file__)))),
        ("cloudpickle", os.path.dirname(os.path.abspath(str(cloudpickle.__file__)))),
    ]
    return pack(Source("distpool", tuple(packages)))


__all__ = ["AUTO", "Archive", "Source", "find", "find_module", "own", "pack", "wishes"]
