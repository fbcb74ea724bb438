"""What a login is told so that a bare Python can run workers (layer 8).

    command line:  python FLAGS -c LOADER distpool worker --login
    stdin:         length, PRELUDE; length, offer (JSON); length, source of `unpacking`; then the order, as ever
                   <- {"mismatch": version}             another minor version of Python: the end
                   <- {"wants": [digest, ...]}          only if something is missing there
                   length and bytes of each archive

So a host that has everything costs a few kilobytes and no round trip. What is read from stdin is always an exact number
of bytes: what follows is somebody else's.

PRELUDE runs in any Python since 2.7, to say that it is the wrong one.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distpool.managers import archive, unpacking
from distpool.managers.login_protocol import MARK

LOADER = 'import os;g=lambda n,b=b"":b if len(b)==n else g(n,b+(os.read(0,n-len(b))or os._exit(1)));exec(g(int(g(8))))'
"""Without line ends, `!`, `$`, `%` and backslashes: it stands on the command lines of three kinds of shells."""

PRELUDE = """\
import json, os, sys

def read(count):
    parts = []
    while count:
        part = os.read(0, min(count, 1 << 20))
        if not part:
            os._exit(1)
        parts.append(part)
        count -= len(part)
    return b"".join(parts)

offer = json.loads(read(int(read(8))).decode("utf-8"))
source = read(int(read(8)))
if list(sys.version_info[:2]) != offer["python"]:
    event = json.dumps({"mismatch": sys.version.split()[0], "program": sys.executable})
    os.write(1, ("\\n" + offer["mark"] + event + "\\n").encode("utf-8"))
    os._exit(1)
names = {"__name__": "distpool_unpacking"}
exec(compile(source, "<distpool>", "exec"), names)
names["boot"](offer, read, sys.argv[1:])
"""

MODES = ("auto", True, False)


@dataclass
class Parcels:
    """What a launch may have to send, by digest; made once for all of its hosts.

    `base`: digest of the archive with distpool, or None: it is not to be sent. `fetches`: workers may ask for more.
    """

    archives: dict[str, archive.Archive]
    base: str | None
    always: bool
    ship: list[str]
    fetches: bool

    def __bool__(self) -> bool:
        """Whether there is anything to do before distpool is started."""
        return bool(self.base or self.ship or self.fetches)

    def feed(self) -> bytes:
        """What the login reads first."""
        offer = {
            "python": list(sys.version_info[:2]),
            "mark": MARK.decode(),
            "base": self.base,
            "always": self.always,
            "distpool": vars(sys.modules["distpool"])["__version__"],
            "code": unpacking.code_of("distpool") if self.base and not self.always else "",
            "cloudpickle": unpacking.version_of("cloudpickle"),
            "ship": self.ship,
            "fetches": self.fetches,
        }
        source = inspect.getsource(unpacking)
        parts = [part.encode() for part in (PRELUDE, json.dumps(offer), source)]
        return b"".join(b"%08d" % len(part) + part for part in parts)

    def parcel(self, digest: str) -> bytes:
        """An archive as it is sent, when the host has asked for it. ValueError: it was not offered."""
        found = self.archives.get(str(digest))
        if found is None:
            raise ValueError(f"the host asks for something that was not offered: {digest!r}")
        return b"%012d" % len(found.data) + found.data


def check(bootstrap: Any) -> None:
    """ValueError: an argument that cannot be."""
    if bootstrap not in MODES:
        raise ValueError(f"bootstrap must be 'auto', True or False, not {bootstrap!r}")


def parcels(bootstrap: Any, sources: Sequence[archive.Source], fetches: bool) -> Parcels:
    """What these keywords of `addprocs` mean; the others are what `archive.wishes` made of `ship`. OSError: a file
    cannot be read."""
    shipped = [archive.pack(source) for source in sources]
    base = archive.own() if bootstrap else None
    found = {each.digest: each for each in [*shipped, *([base] if base else [])]}
    digests = list(dict.fromkeys(each.digest for each in shipped))
    return Parcels(found, base.digest if base else None, bootstrap is True, digests, fetches)


def arguments(own: Sequence[str]) -> list[str]:
    """What follows the interpreter, in place of `own` (`-m distpool ...`), which it ends up doing."""
    return ["-c", LOADER, *own[1:]]


__all__ = ["LOADER", "Parcels", "arguments", "check", "parcels"]
