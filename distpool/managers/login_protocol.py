"""What the two ends of a login say to each other: `ssh host python -m distpool worker --login` (layer 8).

    master --stdin-->  whatever `bootstrap` needs, then one line of JSON: LoginSettings; later {"kill": n, "signal": s},
                       {"start": n}: so many more workers
    master <-stdout--  banners of the shell, then `distpool_login:{json}`, from there on events:
                         {"wants": [digest, ..]}, {"mismatch": version}       before distpool runs there: `bootstrap`
                         {"worker": n, "ospid": .., "host": .., "port": .., "tls": ..}
                         {"output": n, "size": b} and b bytes                 it printed these
                         {"exited": n, "status": code or -signal}
                         {"problem": text}                                    one worker less: why

stdin stays open as the lifeline: its end means that the login or the master is lost, and everything on that host goes.
Keys that one side does not know are ignored, so that either side may be the newer one. Nothing is pickled.

What a start-up file of the shell left in the background may print in between: lines that are no events are passed over,
and each event begins a line of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from distpool.fields import Fields

MARK = b"distpool_login:"
"""Begins the first line that comes from us and not from the shell."""

LOGIN_ARGUMENTS = ("-m", "distpool", "worker", "--login")
"""What follows the interpreter and its flags on the remote command line."""

MAX_LINE = 1 << 20
"""Bytes of one line of JSON: more is garbage."""


class LoginSettings(Fields):
    """The order that a login gets on its stdin, as one line of JSON.

    `cookie`: None if it stands on the command line. `count`: workers to start, or "auto": one per CPU there. `bind`:
    the address to listen on, None: the one by which the login reached the host. `port`: 0 for any; the workers after
    the first take the next free ones, and so does the first with `port_is_hint`. `loopback`: reached through the
    login only. `cwd`: where they work; if it is missing there, the home directory, unless `strict_cwd`. `env`: over
    the environment of the login. `tls`: None, or `{"certificate": PEM, "key": PEM}` of the cluster: listeners that can
    be reached from other hosts take encrypted links only; with `always_tls` so do those on loopback. `fetch`:
    workers ask the master for modules that they miss. `hold`: stay without workers until stdin ends, more may be
    wanted. `site`: the host as the user named it. `timeout`: seconds, for the start and the master.
    """

    cookie: str | None = None
    count: Any = 1
    bind: str | None = None
    port: int = 0
    port_is_hint: bool = False
    loopback: bool = False
    cwd: str = ""
    strict_cwd: bool = False
    env: dict[str, str] | None = None
    enable_threaded_blas: bool = False
    memory_limit: int | None = None
    tls: dict[str, Any] | None = None
    always_tls: bool = False
    fetch: bool = False
    hold: bool = False
    site: str = ""
    timeout: float = 60.0

    def to_line(self) -> bytes:
        """The line, with its end."""
        return json.dumps({name: getattr(self, name) for name in self.FIELDS}).encode() + b"\n"

    def secrets(self) -> list[str]:
        """What of it nobody may see, as pieces that stand in the line as they are."""
        key = str(self.tls.get("key", "")) if self.tls else ""
        lines = [line for line in key.splitlines() if not line.startswith("-----")]
        return [piece for piece in (self.cookie, *lines) if piece and len(piece) >= 8]  # others would blot out words

    @classmethod
    def from_line(cls, line: bytes) -> LoginSettings:
        """The settings in a line; ValueError: it is none. Unknown keys are dropped."""
        found = json.loads(line)
        if not isinstance(found, dict):
            raise ValueError("the settings of a login must be a JSON object")
        return cls(**{name: value for name, value in found.items() if name in cls.FIELDS})


def pack_event(payload: bytes = b"", **event: Any) -> bytes:
    """An event as bytes; `payload` follows its line."""
    if payload:
        event["size"] = len(payload)
    return json.dumps(event).encode() + b"\n" + payload


class EventReader:
    """Bytes in, events out. `before`: what the shell printed (the last of it); `begun`: the mark came.

    `feed` raises ValueError if what stands behind the mark is no event: somebody repeats what we have sent there.
    """

    KEPT = 16384  # bytes of what the shell printed that are kept

    def __init__(self) -> None:
        self.begun = False
        self.before = b""
        self.seen = 0  # bytes before the mark
        self._spoken = False  # there was an event
        self._lines = 0  # lines before the mark that are not in `_data` any more
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[dict[str, Any], bytes]]:
        """The events that are complete now, each with its payload; the first one is what stands behind the mark."""
        self._data += data
        if not self.begun and not self._find_mark(len(data)):
            return
        while True:
            end = self._data.find(b"\n")
            if end < 0:
                if len(self._data) > MAX_LINE:
                    raise ValueError("a line without end")
                return
            line = bytes(self._data[:end]).removeprefix(MARK)
            if not line.strip():  # whoever begins to speak ends a line that may have been left open
                del self._data[: end + 1]
                continue
            event = self._event(line)
            if event is None:
                self.before = (self.before + line + b"\n")[-self.KEPT :]
                del self._data[: end + 1]
                continue
            size = int(event.get("size", 0))
            if len(self._data) < end + 1 + size:
                return
            payload = bytes(self._data[end + 1 : end + 1 + size])
            del self._data[: end + 1 + size]
            self._spoken = True
            yield event, payload

    def _event(self, line: bytes) -> dict[str, Any] | None:
        """The event in a line; None: it is noise."""
        try:
            event = json.loads(line)
            if isinstance(event, dict):
                return event
            raise ValueError(f"not an event: {event!r}")
        except ValueError:
            if not self._spoken:
                raise
            return None

    def _find_mark(self, fresh: int) -> bool:
        place = self._data.find(MARK)
        if place >= 0:
            self.before = (self.before + bytes(self._data[:place]))[-self.KEPT :]
            del self._data[: place + len(MARK)]
            self.begun = True
            return True
        self.seen += fresh
        keep = len(MARK) - 1
        if len(self._data) > keep:
            noise = bytes(self._data[:-keep])
            self._lines += noise.count(b"\n")
            self.before = (self.before + noise)[-self.KEPT :]
            del self._data[:-keep]
        return False

    @property
    def lines(self) -> int:
        """How many lines the shell has printed, while the mark has not come."""
        return self._lines + (0 if self.begun else self._data.count(b"\n"))

    def said(self) -> bytes:
        """All that the shell printed, as far as it is kept."""
        return self.before if self.begun else self.before + bytes(self._data)


__all__ = ["LOGIN_ARGUMENTS", "MARK", "MAX_LINE", "EventReader", "LoginSettings", "pack_event"]
