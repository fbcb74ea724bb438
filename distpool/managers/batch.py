"""The hosts of the surrounding batch job, as its scheduler tells them (layer 8): `hosts="env"`.

    Slurm     SLURM_JOB_NODELIST "n[1-3,7],m2" with SLURM_TASKS_PER_NODE "2(x3),1"
    PBS       PBS_NODEFILE: a file with one line for each slot
    SGE       PE_HOSTFILE: a file with "host slots queue processors" lines
    LSF       LSB_MCPU_HOSTS "host slots host slots", or LSB_HOSTS with one word for each slot

The first of these that is set is taken, in this order. Pure functions of the variables and files.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from distpool.managers.specs import load_machine_file

VARIABLES = ("SLURM_JOB_NODELIST", "PBS_NODEFILE", "PE_HOSTFILE", "LSB_MCPU_HOSTS", "LSB_HOSTS")

_MOST = 100_000  # hosts of one list, repetitions of one number: more is a mistake, and must not fill the memory


def machines_of_job(environ: Mapping[str, str]) -> list[tuple[str, int]]:
    """`(host, slots)` for each host of the job, in its order, each host once.

    ValueError: this is no batch job, or its variables make no sense; OSError: its file cannot be read.

    Example: `machines_of_job({"LSB_HOSTS": "a a b"})` is `[("a", 2), ("b", 1)]`.
    """
    for name in VARIABLES:
        value = environ.get(name, "").strip()
        if value:
            machines = _READERS[name](value, environ)
            if not machines:
                raise ValueError(f"hosts='env': {name}={value!r} names no host")
            return machines
    raise ValueError(f"hosts='env': this is no batch job, none of {', '.join(VARIABLES)} is set")


def expand_nodes(text: str) -> list[str]:
    """The names behind Slurm's short form. ValueError: it is none.

    Example: `expand_nodes("n[08-10],m2")` is `["n08", "n09", "n10", "m2"]`.
    """
    names: list[str] = []
    for part in _split(text):
        pieces = re.split(r"\[([^\[\]]*)\]", part)  # outside, inside, outside, ...
        if any("[" in piece or "]" in piece for piece in pieces) or not part:
            raise ValueError(f"not a list of nodes: {text!r}")
        choices = [_numbers(piece, text) if index % 2 else [piece] for index, piece in enumerate(pieces)]
        count = 1
        for choice in choices:
            count *= len(choice)
        if len(names) + count > _MOST:
            raise ValueError(f"not a list of nodes: {text!r} (more than {_MOST})")
        names += map("".join, itertools.product(*choices))
    return names


def _split(text: str) -> list[str]:
    """At the commas outside of brackets."""
    return re.split(r",(?![^\[]*\])", text.strip())


def _numbers(text: str, whole: str) -> list[str]:
    """The names between two brackets: "1-3,007"; leading zeros are kept."""
    found: list[str] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part, re.ASCII)
        if match is None:
            raise ValueError(f"not a list of nodes: {whole!r} ({part!r} in brackets)")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < first + _MOST:
            raise ValueError(f"not a list of nodes: {whole!r} ({part!r} in brackets)")
        found += [str(number).zfill(len(match[1])) for number in range(first, last + 1)]
    return found


def tasks_per_node(text: str) -> list[int]:
    """The numbers behind Slurm's short form. ValueError: it is none.

    Example: `tasks_per_node("2(x3),1")` is `[2, 2, 2, 1]`.
    """
    counts: list[int] = []
    for part in text.strip().split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip(), re.ASCII)
        if match is None or int(match[2] or 1) > _MOST:
            raise ValueError(f"not a list of numbers of tasks: {text!r}")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _slurm(nodes: str, environ: Mapping[str, str]) -> list[tuple[str, int]]:
    names = expand_nodes(nodes)
    text = environ.get("SLURM_TASKS_PER_NODE", "").strip()
    counts = tasks_per_node(text) if text else [1] * len(names)
    if len(counts) != len(names):
        raise ValueError(f"SLURM_JOB_NODELIST={nodes!r} and SLURM_TASKS_PER_NODE={text!r} do not fit: "
                         f"{len(names)} nodes, {len(counts)} numbers")  # fmt: skip
    return [(name, count) for name, count in zip(names, counts, strict=True) if count]


def _file(path: str, environ: Mapping[str, str]) -> list[tuple[str, int]]:
    return _merged(
        (entry, 1) if isinstance(entry, str) else (entry[0], int(entry[1])) for entry in load_machine_file(path)
    )


def _pairs(text: str, environ: Mapping[str, str]) -> list[tuple[str, int]]:
    words = text.split()
    if len(words) % 2 or not all(word.isascii() and word.isdigit() for word in words[1::2]):
        raise ValueError(f"LSB_MCPU_HOSTS={text!r} is not 'host slots host slots ...'")
    return _merged(zip(words[::2], map(int, words[1::2]), strict=True))


def _words(text: str, environ: Mapping[str, str]) -> list[tuple[str, int]]:
    return _merged((word, 1) for word in text.split())


def _merged(machines: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    counts: Counter[str] = Counter()
    for host, count in machines:
        counts[host] += count
    return [(host, count) for host, count in counts.items() if count]


_READERS = {
    "SLURM_JOB_NODELIST": _slurm,
    "PBS_NODEFILE": _file,
    "PE_HOSTFILE": _file,
    "LSB_MCPU_HOSTS": _pairs,
    "LSB_HOSTS": _words,
}

__all__ = ["VARIABLES", "expand_nodes", "machines_of_job", "tasks_per_node"]
