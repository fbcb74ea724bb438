"""Lists the tests, or runs one of them: ``python -m compat.cpython.child list`` / ``... SUITE Class.method``."""

from __future__ import annotations

import io
import sys
import unittest

from compat._proc import emit
from compat.cpython import adapters, cases


def run(suite: str, name: str) -> dict[str, object]:
    """One test: its status and what it said."""
    class_name, method = name.split(".")
    adapters.patch_subprocesses()
    # gh83386 is skipped for the stdlib's own executor: there ours must not be taken for it.
    adapters.patch(executor=method != "test_hang_gh83386")
    case = cases.CASES[suite][class_name]
    result = unittest.TextTestRunner(stream=io.StringIO(), verbosity=0).run(unittest.TestSuite([case(method)]))
    problems = result.failures + result.errors
    if problems:
        return {"status": "fail", "text": "\n".join(text for _, text in problems)}
    if result.skipped:
        return {"status": "skip", "text": result.skipped[0][1]}
    return {"status": "pass" if result.testsRun else "fail", "text": ""}


def main() -> None:
    """Do what the command line says."""
    if sys.argv[1] == "list":
        names = {suite: cases.test_names(suite) for suite in cases.CASES}
        emit({"names": names, "version": sys.version.split()[0], "has_suites": adapters.has_suites()})
    else:
        emit(run(sys.argv[1], sys.argv[2]))


if __name__ == "__main__":
    main()
