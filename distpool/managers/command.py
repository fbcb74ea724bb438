"""What local workers are started with: the interpreter's command, the environment, the import path (layer 8).

Few imports: the first executor of a program needs this before anything else (`managers.zygotes`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from distpool.managers.surroundings import BLAS_VARIABLES, here

TYPE_CHECKING = False  # not from `typing`: see `hints`
if TYPE_CHECKING:
    from typing import Any


def command(exename: Any, exeflags: Any) -> tuple[list[str], bool]:
    """The interpreter's command, and whether it is another interpreter than this one.

    Our own gets the options that this program was started with (-O, -W, -X, as multiprocessing does it). A path
    may be relative; a name is looked up in PATH. TypeError, ValueError: they are none.
    """
    flags = [exeflags] if isinstance(exeflags, str) else _words(exeflags, "exeflags")
    if exename is None:
        if not sys.executable:
            raise ValueError("sys.executable is not known here: pass exename=")
        exename = sys.executable
    argv = [os.fspath(exename)] if isinstance(exename, (str, os.PathLike)) else _words(exename, "exename")
    if not argv:
        raise ValueError("exename must name a program")
    program = argv[0] if os.path.isabs(argv[0]) else _which(argv[0])
    argv[0] = os.path.abspath(program) if os.path.dirname(program) else program
    own = len(argv) == 1 and argv[0] == os.path.abspath(sys.executable or "")
    if own:
        flags = [*_own_options(), *flags]
    return [*argv, *flags], not own


def _words(value: Any, name: str) -> list[str]:
    try:
        return [os.fspath(part) for part in value]
    except TypeError:
        raise TypeError(f"{name} must be a str or a list of str, not {value!r}") from None


_OPTIONS = (
    *("debug", "dont_write_bytecode", "no_user_site", "no_site", "verbose", "bytes_warning", "quiet", "optimize"),
    *("isolated", "ignore_environment", "safe_path", "dev_mode"),
)
"""Names in `sys.flags` of what may have been asked for by an option, besides -W and -X."""


def _own_options() -> list[str]:
    """What this program was started with, as multiprocessing finds it out."""
    if not (sys.warnoptions or sys._xoptions or any(getattr(sys.flags, name) for name in _OPTIONS)):
        return []
    import subprocess  # 2 ms

    found: list[str] = getattr(subprocess, "_args_from_interpreter_flags", list)()
    return found


def _which(name: str) -> str:
    import shutil  # with all its compressors, 2 ms

    return shutil.which(name) or name


def pairs(env: Any) -> dict[str, str]:
    """`env` as given by the user, a mapping or pairs, as a dict of texts."""
    if env is None:
        return {}
    try:
        wanted = dict(env.items() if isinstance(env, Mapping) else env)
    except (TypeError, ValueError) as error:  # of `dict`, which names no argument
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"env must map str to str, not be {env!r}") from None
    for name, value in wanted.items():
        if not isinstance(name, str) or not isinstance(value, (str, os.PathLike)):
            raise TypeError(f"env must map str to str, not {name!r} to {value!r}")
        if not name or "=" in name or "\0" in name + str(value):
            raise ValueError(f"not an environment variable: {name!r}")
    return {name: os.fspath(value) for name, value in wanted.items()}


def environment(wanted: dict[str, str], threaded_blas: bool) -> dict[str, str]:
    """The complete environment of a worker: this program's, the user's wishes, and one thread for BLAS libraries."""
    env = dict(os.environ)
    if not threaded_blas:
        env.update(dict.fromkeys(BLAS_VARIABLES, "1"))
    env.update(wanted)
    return env


def import_path(wanted: dict[str, str], foreign: bool, moved: bool) -> list[str]:
    """sys.path as it is now, for a worker.

    '' becomes the current directory (it would be the worker's); with `moved` (the worker runs elsewhere) so do other
    relative entries. Another interpreter gets no entries of this one's installation. A PYTHONPATH among the user's
    wishes takes the place of ours.
    """
    current = here()
    path = [entry or current for entry in sys.path if isinstance(entry, str)]
    if moved:
        path = [os.path.join(current, entry) for entry in path]
    if "PYTHONPATH" in wanted:
        replaced = set(os.environ.get("PYTHONPATH", "").split(os.pathsep))
        ours = [entry for entry in wanted["PYTHONPATH"].split(os.pathsep) if entry]
        path = ours + [entry for entry in path if entry not in replaced and entry not in ours]
    if foreign:
        installed = installation()
        path = [entry for entry in path if not any((entry + os.sep).startswith(part + os.sep) for part in installed)]
    return path


def installation() -> set[str]:
    """Directories (and the zip) of this interpreter's own library and of its installed packages."""
    import sysconfig  # few need it, and it takes its time

    names = ("stdlib", "platstdlib", "purelib", "platlib")
    found = {sysconfig.get_path(name) for name in names}
    archive = f"python{sys.version_info[0]}{sys.version_info[1]}.zip"
    return found | {os.path.join(os.path.dirname(path), archive) for path in found}
