"""Row F25 for everything at once: what threads do with a group that is being harmed. See `turmoil.py`."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest

from .helpers import PATIENCE

HERE = os.path.dirname(os.path.abspath(__file__))


@pytest.mark.slow
@pytest.mark.time_limit(200)
def test_threads_that_do_everything_at_once() -> None:
    """Another time each time: the seed is in the output of a failure."""
    seed = random.SystemRandom().randrange(1 << 32)
    program = [sys.executable, os.path.join(HERE, "turmoil.py"), str(seed), "8"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=160 + PATIENCE / 2)
    assert done.returncode == 0 and "ok: " in done.stdout, done.stdout[-5000:] + done.stderr[-20000:]
