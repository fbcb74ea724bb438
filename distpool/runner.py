"""`python -m distpool run`: workers first, then the user's program as `__main__` (layer 11).

    arguments --> Program (script, -m module, -c code, -) --> sys.argv, sys.path[0] as `python` sets them
              --> addprocs (inherits that sys.path) --> a fresh `__main__`, in which the program runs

Runs on the main thread. The program ends as it would without us: its exit code, its traceback, its atexit hooks.
"""

from __future__ import annotations

import builtins
import io
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from distpool.cluster import addprocs
from distpool.errors import CompositeException


@dataclass(frozen=True)
class Program:
    """What is to run: `kind` is "script", "module", "code" or "stdin"; `target` its path, name, text or "-"."""

    kind: str
    target: str
    arguments: Sequence[str]

    def announce(self) -> None:
        """`sys.argv` and `sys.path[0]` as `python` sets them for this program."""
        names = {"module": "-m", "code": "-c"}
        sys.argv[:] = [names.get(self.kind, self.target), *self.arguments]
        first = {"script": os.path.dirname(os.path.realpath(self.target)), "module": os.getcwd()}
        if not sys.flags.safe_path:  # else sys.path[0] is nobody's
            sys.path[0] = self.target if self.is_package else first.get(self.kind, "")

    @property
    def is_package(self) -> bool:
        """Whether the script is a directory, or an archive, with a `__main__.py`."""
        if self.kind != "script":
            return False
        if os.path.isdir(self.target):
            return True
        import zipfile

        return os.path.isfile(self.target) and zipfile.is_zipfile(self.target)

    def run(self) -> None:
        """Run it in a `__main__` of its own, which stays: hooks at exit still find it."""
        main = ModuleType("__main__")
        sys.modules["__main__"] = main
        if self.kind == "module" or self.is_package:
            name = self.target if self.kind == "module" else "__main__"
            # What `python -m` itself calls; `runpy.run_module` would take the module away again at its end.
            run_as_main: Any = runpy._run_module_as_main  # type: ignore[attr-defined]
            run_as_main(name, self.kind == "module")
            return
        main.__dict__.update(__builtins__=builtins, __spec__=None)
        if self.kind == "code":
            exec(compile(self.target, "<string>", "exec", dont_inherit=True), main.__dict__)
            return
        if self.kind == "stdin":
            exec(compile(sys.stdin.buffer.read(), "<stdin>", "exec", dont_inherit=True), main.__dict__)
            return
        main.__file__ = path = os.path.abspath(self.target)
        with io.open_code(path) as file:
            source = file.read()
        exec(compile(source, path, "exec", dont_inherit=True), main.__dict__)  # not this module's `from __future__`


def run(program: Program, machines: int | Sequence[Any] | Path | None, options: Mapping[str, Any]) -> int:
    """Add workers (None: no workers), run the program, and return the exit status, unless it exits by itself.

    Example: `run(Program("script", "job.py", []), 4, {})`
    """
    if program.kind == "script" and not os.path.exists(program.target):
        _complain(f"can't open file {program.target!r}: no such file")
        return 2  # as python does
    program.announce()
    if machines is not None:
        try:
            addprocs(machines, **options)
        except CompositeException as error:
            for each in error.exceptions:
                _complain(each)
            return 1  # those that did come up are ended by our end
        except (ValueError, TypeError, OSError) as error:
            return _complain(error)
    try:
        program.run()
    except Exception as error:
        _report(error)
        return 1
    return 0


def _report(error: Exception) -> None:
    """As the interpreter reports an uncaught exception, without the frames that are ours."""
    own = {__file__, runpy.__file__}
    trace: TracebackType | None = error.__traceback__
    while trace is not None and trace.tb_next is not None and _file(trace) in own | {"<frozen runpy>"}:
        trace = trace.tb_next
    if isinstance(error, SyntaxError) and trace is not None and _file(trace) in own:
        trace = None
    vars(sys).update(last_type=type(error), last_value=error, last_traceback=trace, last_exc=error)
    sys.excepthook(type(error), error.with_traceback(trace), trace)


def _file(trace: TracebackType) -> str:
    return trace.tb_frame.f_code.co_filename


def _complain(text: object) -> int:
    print(f"distpool: {text}", file=sys.stderr, flush=True)
    return 1


__all__ = ["Program", "run"]
