"""``python -m compat.cpython``: CPython's own suites, one process per test, and the table of what they said."""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from compat import _proc
from compat.cpython import reasons


@dataclass
class Verdict:
    """One line of the table."""

    suite: str
    test: str
    status: str  # pass, fail, not applicable
    reason: str
    seconds: float
    text: str = ""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m compat.cpython", description=__doc__)
    parser.add_argument("--python", default=sys.executable, help="interpreter with a test package (default: this one)")
    parser.add_argument(
        "--test-path", help="directory 'test' of that version, e.g. of Debian's libpython3.11-testsuite"
    )
    parser.add_argument("--peer", default="distpool", help="distpool (default), stdlib, loky or multiprocess")
    parser.add_argument("--only", default="", help="run the tests whose suite:Class.method contains this text")
    parser.add_argument("--strict", action="store_true", help="also run what is listed as not applicable")
    parser.add_argument("--json", type=Path, help="write the verdicts there")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds per test (default 60)")
    parser.add_argument("-j", type=int, default=2, help="tests at the same time (default 2)")
    return parser.parse_args()


def run_one(options: argparse.Namespace, env: dict[str, str], suite: str, test: str) -> Verdict:
    """Run one test in a process of its own."""
    listed = reasons.NOT_APPLICABLE.get(suite, {}) if options.peer == "distpool" and not options.strict else {}
    if test in listed:
        return Verdict(suite, test, "not applicable", listed[test], 0.0)
    limit = max(options.limit, reasons.LIMITS.get(test, 0.0))
    outcome = _proc.run([options.python, "-m", "compat.cpython.child", suite, test], limit, env=env)
    adapted = reasons.ADAPTED.get(test, "")
    if outcome.result is None:
        return Verdict(suite, test, "fail", outcome.problem, outcome.seconds, outcome.stderr[-4000:])
    status, text = outcome.result["status"], outcome.result["text"]
    if status == "skip":
        return Verdict(suite, test, "not applicable", f"skips itself: {text}", outcome.seconds)
    lines = [line for line in text.strip().splitlines() if line.strip()]
    reason = lines[-1][:200] if status == "fail" and lines else adapted
    return Verdict(suite, test, status, reason, outcome.seconds, text)


def main() -> int:
    """Run, print, count; 1 if anything failed."""
    options = arguments()
    env = {"COMPAT_PEER": options.peer}
    if options.test_path:  # workers need it too: by the sitecustomize that CPython's subprocesses get
        env |= {"COMPAT_TEST_PATH": options.test_path, "PYTHONPATH": str(Path(__file__).parent / "site")}
    listing = _proc.run([options.python, "-m", "compat.cpython.child", "list"], 120, env=env)
    if listing.result is None or not listing.result["has_suites"]:
        why = listing.problem or "no test.test_concurrent_futures and test._test_multiprocessing"
        print(f"{options.python} cannot run the suites: {why}. Use --python with an interpreter built from source,")
        print("or --test-path with the directory 'test' out of Debian's libpython3.X-testsuite.")
        return 2
    names = [(suite, test) for suite, tests in listing.result["names"].items() for test in tests]
    names = [pair for pair in names if options.only in f"{pair[0]}:{pair[1]}"]
    print(f"CPython {listing.result['version']}, {options.peer}, {len(names)} tests, {os.cpu_count()} CPUs\n")
    with ThreadPoolExecutor(options.j) as threads:
        futures = [threads.submit(run_one, options, env, *pair) for pair in names]
        verdicts = []
        for future in futures:
            verdict = future.result()
            verdicts.append(verdict)
            where = f"{verdict.suite}: {verdict.test}"
            print(f"{verdict.status:15} {verdict.seconds:5.1f} s  {where:75} {verdict.reason}", flush=True)
    print("\n| suite | public tests | pass | fail | not applicable |\n| --- | --- | --- | --- | --- |")
    for suite in dict.fromkeys(verdict.suite for verdict in verdicts):
        mine = [verdict.status for verdict in verdicts if verdict.suite == suite]
        count = {status: mine.count(status) for status in ("pass", "fail", "not applicable")}
        public = count["pass"] + count["fail"]
        print(f"| {suite} | {public} | {count['pass']} | {count['fail']} | {count['not applicable']} |")
    failures = [verdict for verdict in verdicts if verdict.status == "fail"]
    for verdict in failures:  # last, where the end of a long log still has them
        print(f"\nfail: {verdict.suite}: {verdict.test} after {verdict.seconds:.1f} s\n{verdict.text[-2000:]}")
    failed = len(failures)
    print(f"\n{sum(verdict.status == 'pass' for verdict in verdicts)} passed, {failed} failed")
    if options.json:
        options.json.write_text(json.dumps([asdict(verdict) for verdict in verdicts], indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
