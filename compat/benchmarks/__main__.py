"""``python -m compat.benchmarks [--quick] [--check | --check-gross]``: measure, compare, report."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

from compat.benchmarks import plot, report, runner, targets


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m compat.benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, main peers, under two minutes")
    parser.add_argument("--peers", help="comma-separated names (default: all installed; --quick: the main ones)")
    parser.add_argument("--only", help="comma-separated workloads, e.g. W2,W3,X1")
    parser.add_argument("--workers", type=int, default=2, help="workers per peer (default 2)")
    parser.add_argument("--repeat", type=int, help="repetitions at most (default 3; --quick: 2)")
    parser.add_argument("--budget", type=float, help="seconds after which no further repetition starts")
    parser.add_argument("--python", default=sys.executable, help="interpreter to measure")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="directory of the reports")
    parser.add_argument("--check", action="store_true", help="print the targets, met / not met")
    parser.add_argument("--check-gross", action="store_true", help="exit 1 on crashes and gross regressions only")
    return parser.parse_args()


def main() -> int:
    """Measure and report; the exit code counts only with ``--check-gross``."""
    options = arguments()
    sizes = runner.QUICK if options.quick else runner.FULL
    peers = runner.QUICK_PEERS if options.quick else runner.FULL_PEERS
    if options.peers:
        peers = options.peers.split(",")
    workloads = list(sizes)
    if options.only:
        sizes = {**runner.FULL, **sizes}
        workloads = options.only.split(",")
    budget = options.budget or (105.0 if options.quick else 1140.0)
    repeat = options.repeat or (2 if options.quick else 3)
    left_out = runner.QUICK_LEFT_OUT if options.quick and not options.peers else set()
    plan = runner.Plan(sizes, peers, workloads, options.workers, repeat, budget, left_out, options.python)
    machine = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "when": time.strftime("%Y-%m-%d %H:%M:%S"),
        "workers": options.workers,
        "quick": options.quick,
    }
    cells = runner.run(plan, lambda line: print(line, file=sys.stderr, flush=True))
    rows = targets.evaluate(cells)
    text = report.markdown(cells, machine, rows)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "benchmarks.json").write_text(json.dumps(report.as_json(cells, machine, rows), indent=1))
    (options.out / "benchmarks.md").write_text(text)
    (options.out / "benchmarks.svg").write_text(plot.bars(cells))
    curves = plot.curves(cells)
    if curves:
        (options.out / "scaling.svg").write_text(curves)
    print(text)
    print(f"Written: {options.out}/benchmarks.json, benchmarks.md, benchmarks.svg{', scaling.svg' if curves else ''}")
    if options.check or options.check_gross:
        print()
        print(targets.as_text(rows))
    if options.check_gross:
        wrong = targets.gross(cells)
        print("\n".join(wrong) or "no crash, no gross regression")
        return 1 if wrong else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
