"""One cell of the table in a fresh process: ``python -m compat.benchmarks.cell WORKLOAD PEER WORKERS PARAMS_JSON``.

Imports as little as possible before the workload runs: W1 measures what an import costs, and a spawned worker of some
peers imports this module again.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the named workload and print its answer."""
    import json

    workload, peer, workers, params = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
    if workload == "W1":
        from compat.benchmarks import start_up as module
    elif workload.startswith("J"):
        from compat.benchmarks import references as module  # type: ignore[no-redef]
    elif workload.startswith("X"):
        from compat.benchmarks import extras as module  # type: ignore[no-redef]
    else:
        from compat.benchmarks import workloads as module  # type: ignore[no-redef]
    from compat.benchmarks.peers import NotApplicable

    try:
        answer = module.WORKLOADS[workload](peer, workers, params)
    except NotApplicable as reason:
        answer = {"not_applicable": str(reason) or "no such operation"}
    from compat._proc import emit

    emit(answer)


if __name__ == "__main__":
    main()
