"""The cache of archives on a host, and what runs there before distpool does (layer 8).

    python -c LOADER --> bootstrap.PRELUDE --> the text of this module, executed --> boot(offer, read, arguments)
        boot: what is missing here? -> {"wants": [digest, ...]} -> archives from stdin -> Cache.store -> login.main

It is sent as text to hosts that have no distpool, so it uses nothing but the standard library. Workers use `Cache` as
well, for modules that they fetch from the master (`shipping`).

    ~/.cache/distpool/DIGEST/     one unpacked archive, complete since it has this name; modules and data as files
        .distpool-files           names and sizes; whoever uses the directory holds a shared lock on it
    ~/.cache/distpool/.new-*      being unpacked, by somebody who lives or was killed

A directory is made under another name and renamed when it is complete, so that several logins at once, a full disk or
a kill at any time leave nothing behind that could be taken for it. Cleaners of caches remove single files: therefore
all of them are looked at before use (stat only, below 1 ms).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

FILES = ".distpool-files"
KEPT = 64  # archives that stay in the cache, most recently used first; those in use stay in any case
KEPT_BYTES = 1 << 29  # ... and how large they may be together
STALE = 24 * 3600.0  # seconds after which what somebody left unfinished goes

_ATTEMPTS = 5


def digest_of(files: Iterable[tuple[str, bool, bytes]]) -> str:
    """What identifies a content: files as (name, whether it can be executed, bytes). Not that of the archive's bytes,
    which depend on the compressor."""
    total = hashlib.sha256()
    for name, executable, content in files:
        head = f"{len(name.encode())} {name} {int(executable)} {len(content)}\n"
        total.update(head.encode())
        total.update(content)
    return total.hexdigest()[:40]


# -- the cache ---------------------------------------------------------------------------------------------------


def usual_root() -> str:
    """Where the cache of this user is, if he can have one."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the standard says that others are to be ignored
        base = os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "distpool")


class Cache:
    """Unpacked archives below `root`. Methods raise OSError when the disk does not do what is asked.

    Locks are held as long as this object's process, and those forked from it, live.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self._held: list[int] = []

    def prepare(self) -> None:
        """Make the directory; OSError: it cannot be used, or others could write there."""
        os.makedirs(self.root, mode=0o700, exist_ok=True)
        found = os.stat(self.root)
        if hasattr(os, "geteuid") and found.st_uid != os.geteuid():
            raise PermissionError(f"{self.root} belongs to somebody else")
        if stat.S_IMODE(found.st_mode) & 0o077 and os.name == "posix":
            os.chmod(self.root, 0o700)

    def find(self, digest: str) -> str | None:
        """The directory of this content, locked from now on; None if it is not there, or not complete."""
        place = os.path.join(self.root, digest)
        try:
            descriptor = os.open(os.path.join(place, FILES), os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError:
            return None
        kept = False
        try:
            kept = _lock(descriptor, exclusive=False) and _is_complete(place, descriptor)
        finally:
            if kept:
                self._held.append(descriptor)
            else:
                os.close(descriptor)
        if not kept:
            return None
        with contextlib.suppress(OSError):  # somebody else's, or read-only: then nobody prunes it
            os.utime(place)
        return place

    def store(self, digest: str, data: bytes) -> str:
        """Unpack an archive; its directory, locked. ValueError: that is not what it should be."""
        import tempfile

        fresh = tempfile.mkdtemp(prefix=".new-", dir=self.root)
        try:
            unpack(data, fresh, digest)
            place = self._publish(fresh, digest)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        self.prune()
        return place

    def _publish(self, fresh: str, digest: str) -> str:
        place = os.path.join(self.root, digest)
        # Locked before anybody else can see it: who prunes at this moment must not take it for unused.
        descriptor = os.open(os.path.join(fresh, FILES), os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            _lock(descriptor, exclusive=False)
            for _ in range(_ATTEMPTS):
                try:
                    os.rename(fresh, place)
                except OSError:  # there is one already
                    found = self.find(digest)
                    if found is not None:  # of somebody who was faster
                        return found
                    self._discard(place)
                else:
                    self._held.append(descriptor)
                    descriptor = -1
                    return place
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        raise OSError(f"{place} cannot be put in its place")

    def _discard(self, place: str) -> None:
        """Remove a directory, in one step as others see it."""
        import tempfile

        aside = tempfile.mkdtemp(prefix=".old-", dir=self.root)
        with contextlib.suppress(OSError):  # somebody else did it
            os.rename(place, os.path.join(aside, "it"))
        shutil.rmtree(aside, ignore_errors=True)

    def prune(self) -> None:
        """Remove what nobody has used for longest, and what was left unfinished. Never raises OSError."""
        complete: list[tuple[float, str]] = []
        try:
            with os.scandir(self.root) as entries:
                for entry in entries:
                    changed = entry.stat(follow_symlinks=False).st_mtime
                    if not entry.name.startswith("."):
                        complete.append((changed, entry.path))
                    elif changed < time.time() - STALE:
                        shutil.rmtree(entry.path, ignore_errors=True)
            total = 0
            for number, (_, place) in enumerate(sorted(complete, reverse=True)):
                total += _size(place)
                if number >= KEPT or (number and total > KEPT_BYTES):
                    self._discard_unused(place)
        except OSError:
            pass  # others prune as well

    def _discard_unused(self, place: str) -> None:
        descriptor = -1
        try:
            descriptor = os.open(os.path.join(place, FILES), os.O_RDONLY)
            if not _lock(descriptor, exclusive=True) or not _is_at(descriptor, place):
                return
        except OSError:
            pass  # nothing that anybody could use
        try:
            self._discard(place)
        finally:
            if descriptor >= 0:
                os.close(descriptor)


def _lock(descriptor: int, exclusive: bool) -> bool:
    """False: somebody else has it. Where there are no locks (Windows, some network file systems) all is allowed that
    does no harm: using, but not removing."""
    try:
        import fcntl
    except ImportError:
        return not exclusive
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return not exclusive
    return True


def _is_at(descriptor: int, place: str) -> bool:
    """Whether the open list of files is still the one of this directory."""
    return os.path.samestat(os.fstat(descriptor), os.stat(os.path.join(place, FILES)))


def _size(place: str) -> int:
    """Bytes of an archive, by its list of files; 0 if that cannot be read."""
    try:
        with open(os.path.join(place, FILES), encoding="utf-8") as file:
            return sum(map(int, json.load(file).values()))
    except (OSError, ValueError):
        return 0


def _is_complete(place: str, descriptor: int) -> bool:
    """Whether this is what once was unpacked there. Locked before, so nobody takes it away meanwhile."""
    try:
        if not _is_at(descriptor, place):
            return False
        with open(descriptor, encoding="utf-8", closefd=False) as file:
            files = json.load(file)
        return all(os.stat(os.path.join(place, name)).st_size == size for name, size in files.items())
    except (OSError, ValueError):
        return False


def unpack(data: bytes, directory: str, digest: str) -> None:
    """The files of an archive into an empty directory. ValueError: it is not the one of this digest."""
    import zipfile

    files: list[tuple[str, bool, bytes]] = []
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for info in archive.infolist():
                files.append((info.filename, bool(info.external_attr >> 16 & 0o100), archive.read(info)))
    except zipfile.BadZipFile as error:
        raise ValueError(f"what was sent is damaged: {error}") from None
    if digest_of(files) != digest:
        raise ValueError("what was sent is damaged: its content is not the one that was announced")
    for name, executable, content in files:
        parts = name.split("/")
        if not all(parts) or os.path.isabs(name) or {".", ".."} & set(parts) or "\\" in name:
            raise ValueError(f"a file that leads elsewhere: {name!r}")
        path = os.path.join(directory, *parts)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        _write(path, content, 0o700 if executable else 0o600)
    sizes = {name: len(content) for name, _, content in files}
    _write(os.path.join(directory, FILES), json.dumps(sizes).encode(), 0o600)


def _write(path: str, content: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
    with open(descriptor, "wb") as file:
        file.write(content)


def temporary_root() -> str:
    """A directory in place of the cache, gone when this process and all that it forks have ended, however they end."""
    import tempfile

    root = tempfile.mkdtemp(prefix="distpool-")
    remove_at_end(root)
    return root


def remove_at_end(directory: str) -> None:
    """A process of its own waits for the end of a pipe which this one, and its children, keep open."""
    waiting, held = os.pipe()  # `held` stays open, without anybody knowing its number
    child = os.fork()
    if child:
        os.close(waiting)
        os.waitpid(child, 0)
        return
    try:
        import signal

        os.setsid()
        if os.fork() == 0:
            for signum in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
                signal.signal(signum, signal.SIG_IGN)
            os.close(held)
            null = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):  # the login must not wait for it
                os.dup2(null, descriptor)
            while os.read(waiting, 1):
                pass
            shutil.rmtree(directory, ignore_errors=True)
    finally:
        os._exit(0)


# -- before distpool ---------------------------------------------------------------------------------------------


def boot(offer: dict[str, Any], read: Callable[[int], bytes], arguments: list[str]) -> None:
    """Get what is missing here, then be the login. `read(n)` gives exactly n bytes of stdin.

    `offer`: `base`, the digest of an archive with distpool, or None; `always`: it is taken even if there is one here
    that fits, by `code`, the digest of its sources, and the version of `cloudpickle` (all but its patches); `ship`:
    digests of further archives;
    `fetches`: workers will want the cache. `arguments`: those of `python -m distpool`.
    """
    if sys.path and sys.path[0] == "":
        sys.path[0] = os.getcwd()  # as `-m` has it
    base = offer["base"] if offer["base"] and (offer["always"] or not _fits(offer)) else None
    wanted = [*offer["ship"], *([base] if base else [])]
    cache = _open_cache() if wanted or offer["fetches"] else None
    line = b""
    found: dict[str, str] = {}
    if cache is not None:
        there = {digest: cache.find(digest) for digest in dict.fromkeys(wanted)}
        found = {digest: place for digest, place in there.items() if place is not None}
        missing = [digest for digest, place in there.items() if place is None]
        if missing:
            line = _read_line(read)
            _say(wants=missing)
            for digest in missing:
                found[digest], cache = _take(cache, digest, read(int(read(12))))
    if base:
        sys.path.insert(0, found[base])
    login = importlib.import_module("distpool.login")
    front = list(dict.fromkeys(found[digest] for digest in wanted))
    cookies = [argument.partition("=")[2] for argument in arguments if argument.startswith("--worker=")]
    login.main(cookies[0] if cookies else None, line, front, cache.root if cache is not None else "")


def _fits(offer: dict[str, Any]) -> bool:
    """Whether there is a distpool here that is the same, with a cloudpickle that can read what the master writes."""
    if version_of("distpool") != offer["distpool"] or code_of("distpool") != offer["code"]:
        return False
    there, here = (version.split(".")[:2] for version in (version_of("cloudpickle"), str(offer["cloudpickle"])))
    return there == here


def version_of(name: str) -> str:
    """The `__version__` of a package, read and not imported; empty if there is none."""
    import re

    try:
        with open(_origin(name), encoding="utf-8") as file:
            found = re.search(r"""^__version__\s*=\s*["']([^"']+)""", file.read(), re.MULTILINE)
    except (ImportError, ValueError, OSError):
        return ""
    return found[1] if found else ""


def code_of(name: str) -> str:
    """Digest of the names and bytes of a package's Python files, wherever it lies; empty if there are none.

    Two checkouts may both call themselves 0.1.0. (10 ms for distpool.)
    """
    digest = hashlib.sha256()
    count = 0
    try:
        top = os.path.dirname(_origin(name))
        for place, directories, files in os.walk(top):
            directories.sort()
            for file in sorted(each for each in files if each.endswith(".py")):
                path = os.path.join(place, file)
                with open(path, "rb") as source:
                    data = source.read()
                digest.update(f"{os.path.relpath(path, top)}:{len(data)}:".encode() + data)
                count += 1
    except (ImportError, ValueError, OSError):
        return ""
    return digest.hexdigest() if count else ""


def _origin(name: str) -> str:
    """The file of a package's `__init__`. ImportError: there is none."""
    import importlib.util

    spec = importlib.util.find_spec(name)
    if spec is None or not spec.origin:
        raise ImportError(f"no {name} here")
    return spec.origin


def _open_cache() -> Cache:
    """The user's cache; a directory for this login alone where he cannot have one."""
    cache = Cache(usual_root())
    try:
        cache.prepare()
    except OSError:
        return Cache(temporary_root())
    return cache


def _take(cache: Cache, digest: str, data: bytes) -> tuple[str, Cache]:
    """Store an archive; where the cache cannot take it (read-only, full), in a temporary one."""
    try:
        return cache.store(digest, data), cache
    except OSError:
        other = Cache(temporary_root())
        return other.store(digest, data), other


def _read_line(read: Callable[[int], bytes]) -> bytes:
    """The order, which came before it was known that anything is missing; byte by byte: archives follow."""
    line = bytearray()
    while not line.endswith(b"\n"):
        line += read(1)
    return bytes(line)


def _say(**event: Any) -> None:
    data = b"\ndistpool_login:" + json.dumps(event).encode() + b"\n"  # login_protocol.MARK
    while data:
        data = data[os.write(1, data) :]
