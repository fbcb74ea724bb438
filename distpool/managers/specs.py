"""Texts that name machines: specs and machine files (layer 8).

"[user@]host[:port] [bind_addr[:port]]"     IPv6 addresses in brackets, also around the bind address; a bind port in
                                            brackets, `[8000]`, is a hint: that one or one of the next
machine file: "[count*|auto*]spec" per line, "#" comments; also the host files of MPI and of batch systems

    host slots=4 [max_slots=8]    Open MPI         host 4 queue processors    SGE (PE_HOSTFILE)
    host (once for each slot)     PBS_NODEFILE     host:4                     MPICH, only if it is asked for

MPICH's form is the same text as a host with an SSH port, which is what it means here: 4*host says the other thing.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

_HINT = re.compile(r":\[(\d+)\]$")


class Spec(NamedTuple):
    """A machine spec in parts; what it does not say is None."""

    user: str | None
    host: str
    port: int | None
    bind_addr: str | None
    bind_port: int | None
    port_is_hint: bool = False


def parse_machine(spec: str) -> tuple[str, int | None]:
    """`(host, port or None)` of a machine spec; `user@` is kept, a bind address is left out. ValueError if it is none.

    Example: `parse_machine("me@[2001:db8::1]:2222")` is `("me@2001:db8::1", 2222)`.
    """
    parts = split_spec(spec)
    return (f"{parts.user}@{parts.host}" if parts.user is not None else parts.host), parts.port


def split_spec(spec: str) -> Spec:
    """A machine spec in parts. TypeError, ValueError: it is none."""
    if not isinstance(spec, str):
        raise TypeError(f"a machine spec is a str, not {type(spec).__name__}")
    words = spec.split()
    if not 1 <= len(words) <= 2:
        raise ValueError(f"not a machine spec: {spec!r} (expected '[user@]host[:port] [bind_addr[:port]]')")
    user, at, rest = words[0].rpartition("@")
    if at and not user:
        raise ValueError(f"not a machine spec: {spec!r} (no user before '@')")
    host, port = _host_port(rest, spec)
    bind, hint = _HINT.subn(r":\1", words[1]) if len(words) == 2 else ("", 0)
    bind_addr, bind_port = _host_port(bind, spec) if bind else (None, None)
    return Spec(user if at else None, host, port, bind_addr, bind_port, bool(hint))


def _host_port(text: str, spec: str) -> tuple[str, int | None]:
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise ValueError(f"not a machine spec: {spec!r} (brackets)")
    else:
        host, colon, rest = text.partition(":")
        rest = colon + rest
    if not host or any(letter in host for letter in "[]@"):
        raise ValueError(f"not a machine spec: {spec!r} (no host)")
    return host, _port(rest[1:], spec) if rest else None


def _port(text: str, spec: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 65535:
        raise ValueError(f"not a machine spec: {spec!r} (the port must be 1 to 65535)")
    return int(text)


def load_machine_file(path: str | os.PathLike[str], *, mpich: bool = False) -> list[str | tuple[str, int | str]]:
    """The machines of a file: specs, or `(spec, count)` with an int or `"auto"`, as `addprocs` takes them.

    Lines are `[count*|auto*]spec`; those of MPI host files (`host slots=4`) and of batch systems (`host 4 queue ...`,
    a host once for each slot) are understood as well. `host:4` is a host and the port of its SSH server; with `mpich`
    it is a host and a number of workers.

    OSError: it cannot be read. ValueError: a line is none of that.

    Example: a line `4*node7` becomes `("node7", 4)`.
    """
    machines: list[str | tuple[str, int | str]] = []
    with open(path, encoding="utf-8-sig") as file:  # some editors begin a file with a mark
        try:
            lines = list(file)
        except UnicodeDecodeError as error:
            raise ValueError(f"{os.fspath(path)}: this file is no UTF-8 text: {error}") from None
        for number, line in enumerate(lines, 1):
            text = line.partition("#")[0].strip()
            if not text:
                continue
            try:
                machines.append(_mpich(text) if mpich else machine_of(text))
            except ValueError as error:
                raise ValueError(f"{os.fspath(path)}, line {number}: {error}") from None
    return machines


def machine_of(text: str) -> str | tuple[str, int | str]:
    """One line of a machine file. ValueError: it is none."""
    count, star, spec = text.partition("*")
    if not star:
        spec, *more = text.split() or [""]
        if more and _SLOTS.fullmatch(more[0]):
            return _with_slots(spec, more)
        if more and more[0].isascii() and more[0].isdigit():  # not a bind address, which has dots or colons
            split_spec(spec)
            return spec, _count(more[0])
        split_spec(text)
        return text
    count, spec = count.strip(), spec.strip()
    split_spec(spec)
    return (spec, count) if count == "auto" else (spec, _count(count))


_SLOTS = re.compile(r"(slots|max[_-]slots|cpu|count)=(\S*)")


def _with_slots(spec: str, words: list[str]) -> str | tuple[str, int | str]:
    """`host slots=4 max_slots=8`: what MPI would start there, and no more than what it may."""
    split_spec(spec)
    found: dict[str, int] = {}
    for word in words:
        match = _SLOTS.fullmatch(word)
        if match is None:
            raise ValueError(f"not slots=N or max_slots=N: {word!r}")
        found["most" if match[1].startswith("max") else "slots"] = _count(match[2])
    most = found.get("most")
    slots = found.get("slots", 1)
    return spec, slots if most is None else min(slots, most)


def _mpich(text: str) -> str | tuple[str, int | str]:
    """`host[:count]`, and whatever MPICH wants to know besides."""
    host, colon, count = text.split()[0].partition(":")
    split_spec(host)
    return (host, _count(count)) if colon else host


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise ValueError(f"{text!r} is not a number of workers")
    return int(text)


__all__ = ["Spec", "load_machine_file", "machine_of", "parse_machine", "split_spec"]
