"""``python -m compat.consumers [--install]``: every consumer in a process of its own, and the table."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from compat import _proc
from compat.consumers.programs import CONSUMERS

# Where the distribution's name is not the module's.
DISTRIBUTIONS = {
    "sklearn": "scikit-learn",
    "flask_executor": "flask-executor",
    "distributed": "dask[distributed]",
    "more_executors": "more-executors",
    "nautilus": "nautilus-sampler",
    "zeus": "zeus-mcmc",
    "platypus": "platypus-opt",
    "apscheduler": "apscheduler<4",
}


def install(python: str) -> None:
    """pip install what is missing, one by one: a distribution that cannot be built must not stop the others."""
    names = {module for _, modules, _ in CONSUMERS.values() for module in modules}
    for module in sorted(names):
        if importlib.util.find_spec(module) is None:
            name = DISTRIBUTIONS.get(module, module)
            done = subprocess.run([python, "-m", "pip", "install", "-q", name], check=False, timeout=900)
            print(f"pip install {name}: {'done' if done.returncode == 0 else 'failed'}", flush=True)


def main() -> int:
    """Run, print, count; 1 if a consumer failed."""
    parser = argparse.ArgumentParser(prog="python -m compat.consumers", description=__doc__)
    parser.add_argument("--install", action="store_true", help="pip install the missing libraries first")
    parser.add_argument("--peer", default="distpool", choices=["distpool", "stdlib"], help="class under test")
    parser.add_argument("--only", default="", help="consumers whose name contains this text")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds per consumer (default 120)")
    parser.add_argument("--json", type=Path, help="write the verdicts there")
    parser.add_argument("-j", type=int, default=2, help="consumers at the same time (default 2)")
    parser.add_argument("-v", action="store_true", help="print the traceback of every failure")
    options = parser.parse_args()
    if options.install:
        install(sys.executable)

    def run(name: str) -> tuple[str, str, str, float, str]:
        command = [sys.executable, "-W", "ignore", "-m", "compat.consumers.child", name, options.peer]
        outcome = _proc.run(command, options.limit)
        if outcome.result is None:
            return name, "fail", outcome.problem, outcome.seconds, outcome.stderr[-4000:]
        text = str(outcome.result["text"]).strip()
        return name, outcome.result["status"], text.splitlines()[-1][:200] if text else "", outcome.seconds, text

    names = [name for name in CONSUMERS if options.only in name]
    verdicts = []
    print("| consumer | takes | result | s | |\n| --- | --- | --- | --- | --- |")
    with ThreadPoolExecutor(options.j) as threads:
        for name, status, reason, seconds, text in threads.map(run, names):
            verdicts.append({"name": name, "status": status, "reason": reason, "seconds": seconds})
            print(f"| {name} | {CONSUMERS[name][2]} | {status} | {seconds:.1f} | {reason} |", flush=True)
            if options.v and status == "fail":
                print(text)
    count = {status: sum(v["status"] == status for v in verdicts) for status in ("pass", "fail", "skip")}
    print(f"\n{count['pass']} passed, {count['fail']} failed, {count['skip']} skipped")
    if options.json:
        options.json.write_text(json.dumps(verdicts, indent=1))
    return 1 if count["fail"] else 0


if __name__ == "__main__":
    sys.exit(main())
