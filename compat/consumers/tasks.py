"""Functions that the consumers run on workers; importable, so that the stdlib's classes can run the same programs."""

from __future__ import annotations

import time
from typing import Any


def square(value: float) -> float:
    """value * value"""
    return value * value


def slow_square(value: int) -> int:
    """The same, later."""
    time.sleep(0.02)
    return value * value


def add(left: int, right: int) -> int:
    """Two arguments."""
    return left + right


def fail(value: int) -> int:
    """An error that the caller must see as it is."""
    raise ValueError(f"bad value {value}")


def sphere(vector: Any) -> float:
    """The optimisers' test function: its minimum is 0 at the origin."""
    return float(sum(x * x for x in vector))


def sphere_fitness(vector: Any) -> tuple[float]:
    """The same as deap wants it."""
    return (sphere(vector),)


def minus_half_sphere(vector: Any) -> float:
    """Log-probability of a standard normal."""
    return -0.5 * sphere(vector)


def log_likelihood(vector: Any) -> float:
    """A narrow normal in the unit cube."""
    return -0.5 * sphere([(x - 0.5) / 0.1 for x in vector])


def unit_cube(vector: Any) -> Any:
    """Prior transform of nested samplers."""
    return vector


def named_likelihood(parameters: Any) -> float:
    """The same for samplers that pass a dict of names."""
    return log_likelihood([parameters["a"], parameters["b"]])


def parabola(x: float) -> float:
    """What adaptive learns."""
    return x * x


def residual(parameters: Any, x: Any, data: Any) -> Any:
    """lmfit: a line through the data."""
    return parameters["a"] * x + parameters["b"] - data


def gaussian_model(parameters: Any) -> dict[str, float]:
    """pyabc: a model that returns its mean."""
    import random

    return {"y": parameters["mean"] + random.gauss(0, 0.1)}


def distance(left: Any, right: Any) -> float:
    """pyabc: distance of two simulations."""
    return float(abs(left["y"] - right["y"]))


def schaffer(variables: Any) -> list[float]:
    """platypus: two objectives with a known front."""
    return [variables[0] ** 2, (variables[0] - 2) ** 2]
