"""``python -m compat.faults``: every fault on every installed peer, each in a process of its own, and the table."""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from compat import _proc
from compat.faults.beds import BEDS, available
from compat.faults.rows import ROWS

LIMIT = 75.0


def run(row: str, peer: str, env: dict[str, str]) -> dict[str, str]:
    """One cell."""
    outcome = _proc.run([sys.executable, "-W", "ignore", "-m", "compat.faults.child", row, peer], LIMIT, env=env)
    if outcome.result is None:
        status = "HANG" if outcome.timed_out else "CRASH"
        return {
            "row": row,
            "peer": peer,
            "status": status,
            "text": outcome.problem,
            "traceback": outcome.stderr[-3000:],
        }
    return {"row": row, "peer": peer, "traceback": "", **outcome.result}


def main() -> int:
    """Run, print; 1 if a row fails on distpool."""
    parser = argparse.ArgumentParser(prog="python -m compat.faults", description=__doc__)
    parser.add_argument("--peers", help="comma-separated (default: all that are installed)")
    parser.add_argument("--only", default="", help="rows whose name starts with one of these, comma-separated")
    parser.add_argument("--slack", type=float, default=3.0, help="factor on time bounds (default 3; quiet machine: 1)")
    parser.add_argument("--json", type=Path, help="write the cells there")
    parser.add_argument("-j", type=int, default=2, help="cells at the same time (default 2)")
    parser.add_argument("-v", action="store_true", help="print tracebacks")
    options = parser.parse_args()
    peers = options.peers.split(",") if options.peers else [name for name in BEDS if available(name)]
    rows = [name for name in ROWS if name.startswith(tuple(options.only.split(",")))]
    env = {"COMPAT_SLACK": str(options.slack)}
    pairs = [(row, peer) for row in rows for peer in peers]
    cells = []
    with ThreadPoolExecutor(options.j) as threads:
        for cell in threads.map(lambda pair: run(*pair, env), pairs):
            cells.append(cell)
            print(f"{cell['status']:5} {cell['row']:12} {cell['peer']:14} {cell['text']}", file=sys.stderr, flush=True)
            if options.v and cell.get("traceback"):
                print(cell["traceback"], file=sys.stderr)
    table = {(cell["row"], cell["peer"]): cell for cell in cells}
    print("\n| row | what happens | " + " | ".join(peers) + " |\n|" + " --- |" * (len(peers) + 2))
    for row in rows:
        marks = " | ".join(table[row, peer]["status"] for peer in peers)
        print(f"| {row} | {ROWS[row][0]} | {marks} |")
    counts = []
    for peer in peers:
        mine = [table[row, peer]["status"] for row in rows]
        counts.append(f"{mine.count('ok')} of {len(mine) - mine.count('-')}")
    print("| passed | | " + " | ".join(counts) + " |")
    missing = [name for name in BEDS if not available(name)]
    if missing:
        print(f"\nNot installed: {', '.join(missing)}.")
    print("\n'-': the peer has no such feature.")
    if options.json:
        options.json.write_text(json.dumps(cells, indent=1))
    bad = sum(cell["peer"].startswith("distpool") and cell["status"] not in ("ok", "-") for cell in cells)
    print(f"{bad} cells of distpool fail; {os.cpu_count()} CPUs, slack {options.slack:g}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
