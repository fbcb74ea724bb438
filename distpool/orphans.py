"""What a worker prints when the worker that started it (`siblings`) has gone (layer 11).

    stdout+stderr -> pipe -> the one that started it --> its stdout              as long as it lives
                         '-> thread here --call--> pid 1: `show` -> sys.stdout   from its end on: `take_over`

Both hold the reading end of the pipe, so that no print ever finds it broken: user code must not fail because another
worker has gone. A second pipe, whose writing end only the starter has, tells of its end.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import threading
from typing import IO

from distpool.calls import remotecall_fetch
from distpool.node import node as nodes
from distpool.node.output import show

VARIABLE = "DISTPOOL_STARTED_BY"
"""Tells a worker the numbers of its two descriptors: `OUTPUT,LIFELINE`."""

_CHUNK = 65536


def take_over(numbers: str) -> None:
    """Wait, on a thread, for the end of the process that reads our output; from then on we do. `numbers`: what
    `VARIABLE` says; nothing happens if it is not true (the command may have closed them)."""
    try:
        output, lifeline = map(int, numbers.split(","))
        if not all(stat.S_ISFIFO(os.fstat(number).st_mode) for number in (output, lifeline)):
            return
    except (ValueError, OverflowError, OSError):
        return
    for number in (output, lifeline):
        os.set_inheritable(number, False)
    threading.Thread(target=_take_over, args=(output, lifeline), name="distpool-output", daemon=True).start()


def _take_over(output: int, lifeline: int) -> None:
    with open(lifeline, "rb", 0) as end:
        end.read(1)
    with open(output, "rb", 0) as stream:
        _relay(stream)


def _relay(stream: IO[bytes]) -> None:
    rest = b""
    while data := stream.read(_CHUNK):
        *lines, rest = (rest + data).split(b"\n")
        if len(rest) > _CHUNK:  # no line end in sight
            lines, rest = [*lines, rest], b""
        node = nodes.existing()
        if lines and node is not None:
            # Whatever goes wrong, at this end or that: what is printed here is read on, or who prints would wait.
            with contextlib.suppress(Exception):
                remotecall_fetch(show_lines, 1, node.pid, [line.decode("utf-8", "replace") for line in lines])


def show_lines(pid: int, lines: list[str]) -> None:
    """On pid 1: print these lines of a worker, as if they had come through its output."""
    node = nodes.existing()
    show(sys.stdout, pid, lines, node.group.output_hook if node is not None and node.group is not None else None)


__all__ = ["VARIABLE", "show_lines", "take_over"]
