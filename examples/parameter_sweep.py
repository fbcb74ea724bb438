"""Find good parameters of a classifier by cross-validation, although some candidates are bad and one worker dies.

    python examples/parameter_sweep.py [--folds 5] [--workers 4]

Needs scikit-learn. The sweep shows what `pmap` does with the three kinds of trouble that long sweeps meet:
  a combination that scikit-learn refuses     on_error turns its ValueError into the score nan: no second try
  an evaluation that fails for a passing reason    retry_delays: tried again, after a growing pause
  an evaluation whose process is killed       the same: it runs again on another worker, and the worker is replaced
"""

import argparse
import itertools
import math
import os
import signal
import tempfile
import time
from pathlib import Path

from sklearn.datasets import load_digits
from sklearn.model_selection import cross_val_score
from sklearn.svm import SVC

from distpool import ClusterExecutor, ExponentialBackOff

GRID = {"kernel": ["rbf", "poly", "sigmoid"], "C": [-1.0, 0.1, 1.0, 10.0], "gamma": [0.0003, 0.001, "scale"]}


def first_time(name, folder):
    """True once: stands for whatever goes wrong today and not tomorrow."""
    try:
        Path(folder, name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def evaluate(candidate, folds, folder):
    """Mean accuracy of one candidate on scikit-learn's handwritten digits."""
    if candidate == {"kernel": "rbf", "C": 1.0, "gamma": 0.001} and first_time("killed", folder):
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))  # as the kernel does when memory runs out
    if candidate == {"kernel": "poly", "C": 0.1, "gamma": "scale"} and first_time("offline", folder):
        raise ConnectionError("the data server did not answer")
    images, digits = load_digits(return_X_y=True)
    return float(cross_val_score(SVC(**candidate), images, digits, cv=folds, error_score="raise").mean())


def refused(error):
    """Called here, in this process: a refused combination counts as nan, everything else is tried again."""
    print(f"  {type(error).__name__}: {str(error).splitlines()[0]}")
    if isinstance(error, ValueError):
        return math.nan
    raise error


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--folds", type=int, default=3)
    arguments.add_argument("--workers", type=int, default=os.cpu_count())
    options = arguments.parse_args()
    candidates = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]
    with tempfile.TemporaryDirectory() as folder, ClusterExecutor(options.workers) as executor:
        begin = time.perf_counter()
        scores = executor.pmap(
            lambda candidate: evaluate(candidate, options.folds, folder),
            candidates,
            on_error=refused,
            retry_delays=ExponentialBackOff(3, first_delay=0.05),
        )
        seconds = time.perf_counter() - begin
    ranked = sorted((pair for pair in zip(scores, candidates, strict=True) if pair[0] == pair[0]), key=lambda p: -p[0])
    print(f"{len(candidates)} candidates, {len(candidates) - len(ranked)} refused, {seconds:.1f} s; the best:")
    for score, candidate in ranked[:3]:
        print(f"  {score:.4f}  {candidate}")


if __name__ == "__main__":
    main()
