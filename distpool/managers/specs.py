"""Texts that name machines: specs and machine files (layer 8).

"[user@]host[:port] [bind_addr[:port]]"     IPv6 addresses in brackets, also around the bind address; a bind port in
                                            brackets, `[8000]`, is a hint: that one or one of the next
machine file: "[count*|auto*]spec" per line, "#" comments
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


def load_machine_file(path: str | os.PathLike[str]) -> list[str | tuple[str, int | str]]:
    """The machines of a file: specs, or `(spec, count)` with an int or `"auto"`, as `addprocs` takes them.

    OSError: it cannot be read. ValueError: a line is not `[count*|auto*]spec`.

    Example: a line `4*node7` becomes `("node7", 4)`.
    """
    machines: list[str | tuple[str, int | str]] = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            text = line.partition("#")[0].strip()
            if not text:
                continue
            try:
                machines.append(_machine(text))
            except ValueError as error:
                raise ValueError(f"{os.fspath(path)}, line {number}: {error}") from None
    return machines


def _machine(text: str) -> str | tuple[str, int | str]:
    count, star, spec = text.partition("*")
    if not star:
        split_spec(text)
        return text
    count, spec = count.strip(), spec.strip()
    split_spec(spec)
    if count == "auto":
        return spec, count
    if not count.isascii() or not count.isdigit() or int(count) == 0:
        raise ValueError(f"{count!r} is not a number of workers")
    return spec, int(count)


__all__ = ["Spec", "load_machine_file", "parse_machine", "split_spec"]
