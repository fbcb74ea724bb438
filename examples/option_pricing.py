"""Price a European call option by Monte Carlo on every processor, and check the price against Black and Scholes.

    python examples/option_pricing.py [--paths 10000000] [--workers 4]

Needs nothing but distpool; with numpy installed, the same time buys many more paths.
"""

import argparse
import math
import os
import random
import time

from distpool import ClusterExecutor

try:
    import numpy
except ImportError:
    numpy = None

SPOT, STRIKE, RATE, VOLATILITY, YEARS = 100.0, 105.0, 0.03, 0.25, 1.0
DRIFT, SPREAD = (RATE - VOLATILITY**2 / 2) * YEARS, VOLATILITY * math.sqrt(YEARS)
BATCHES = 64


def payoffs(seed, paths):
    """Sum and sum of squares of the option's payoff over `paths` random paths."""
    if numpy:
        normal = numpy.random.default_rng(seed).standard_normal(paths)
        values = numpy.maximum(SPOT * numpy.exp(DRIFT + SPREAD * normal) - STRIKE, 0.0)
        return float(values.sum()), float((values * values).sum())
    gauss, exp, total, squares = random.Random(seed).gauss, math.exp, 0.0, 0.0
    for _ in range(paths):
        value = SPOT * exp(DRIFT + SPREAD * gauss(0.0, 1.0)) - STRIKE
        if value > 0.0:
            total += value
            squares += value * value
    return total, squares


def estimate(sums, paths):
    """Discounted mean of the payoff, and its standard error."""
    total, squares = (math.fsum(column) for column in zip(*sums, strict=True))
    discount, mean = math.exp(-RATE * YEARS), total / paths
    return discount * mean, discount * math.sqrt((squares / paths - mean * mean) / paths)


def black_scholes():
    """The exact price."""
    d1 = (math.log(SPOT / STRIKE) + (RATE + VOLATILITY**2 / 2) * YEARS) / SPREAD
    below = [(1 + math.erf(d / math.sqrt(2))) / 2 for d in (d1, d1 - SPREAD)]
    return SPOT * below[0] - STRIKE * math.exp(-RATE * YEARS) * below[1]


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--paths", type=int, default=100_000_000 if numpy else 6_000_000)
    arguments.add_argument("--workers", type=int, default=os.cpu_count())
    options = arguments.parse_args()
    each = max(1, options.paths // BATCHES)

    begin = time.perf_counter()
    alone = estimate(map(payoffs, range(BATCHES), [each] * BATCHES), each * BATCHES)
    one_process = time.perf_counter() - begin

    begin = time.perf_counter()
    with ClusterExecutor(options.workers) as executor:
        price, error = estimate(executor.map(payoffs, range(BATCHES), [each] * BATCHES), each * BATCHES)
    several = time.perf_counter() - begin

    print(f"Monte Carlo    {price:.4f} +- {error:.4f}  ({each * BATCHES:,} paths)")
    print(f"Black-Scholes  {black_scholes():.4f}")
    print(f"one process    {one_process:.2f} s")
    print(f"{options.workers} workers      {several:.2f} s with their start: {one_process / several:.2f} times as fast")
    print(f"same digits    {'yes' if (price, error) == alone else 'NO'}")


if __name__ == "__main__":
    main()
