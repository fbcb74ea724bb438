"""Launches, executors, deaths, references and calls in any order: see `sequences.py`, which can run more of them."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest

from .transports import HERE


@pytest.mark.time_limit(150)
@pytest.mark.parametrize("seed", [1, 2, 3, pytest.param(None, id="new")])
def test_any_sequence(seed: int | None) -> None:
    """The new one is another one each time: its number is in the output of a failure."""
    number = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    program = [sys.executable, os.path.join(HERE, "sequences.py"), str(number), "40"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=140)
    assert done.returncode == 0 and done.stdout.startswith("ok: "), done.stdout + done.stderr
