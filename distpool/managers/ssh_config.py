"""What ~/.ssh/config says about a host, for the client that runs in this process (layer 8).

    spec, sshflags --> text (flags, user's file, system's file; `Include` expanded) --> paramiko's parser --> Target

paramiko reads the format and knows `Host` and `Match`, but does not follow `Include`, and its client ignores what it
has read; so the first is done here and the second by `ssh_paramiko`. The OpenSSH program reads its own.
"""

from __future__ import annotations

import fnmatch
import getpass
import glob
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from distpool.managers.specs import Spec

_DEPTH = 16  # includes within includes, as OpenSSH has it
_WITH_VALUE = "BbcDEeFIiJLlmOoPpQRSWw"
_HARMLESS = "4aCkqTtvxX"  # flags without a value that mean nothing here
_SETTING = re.compile(r"(\w+)(?:\s*=\s*|\s+)(.+)")


@dataclass
class Target:
    """How to log in to one host. `name` is what the user called it; a path may not exist."""

    name: str
    host: str
    port: int
    user: str
    identity_files: list[str] = field(default_factory=list)
    use_agent: bool = True
    agent_socket: str | None = None
    proxy_command: str | None = None
    proxy_jump: str | None = None
    known_hosts: list[str] = field(default_factory=list)
    system_known_hosts: list[str] = field(default_factory=list)
    key_alias: str | None = None
    accept_unknown: bool = False
    accept_changed: bool = False
    connect_timeout: float | None = None
    compress: bool = False


class Config:
    """The configuration as it was when this was made. ValueError, OSError: flags or a file that cannot be used."""

    def __init__(self, sshflags: Iterable[str] = ()) -> None:
        options, file = parse_flags(list(sshflags))
        self._head = ["Host *", *(f"{name} {value}" for name, value in options)] if options else []
        self._file = file

    def target(self, spec: Spec) -> Target:
        """How to log in to the host of a machine spec; what the spec says comes first."""
        found = self._lookup(spec.host)
        port = spec.port or int(found.get("port", 22))
        user = spec.user or found.get("user") or _own_name()
        host = found.get("hostname", spec.host)
        strict = found.get("stricthostkeychecking", "ask").lower()
        agent = found.get("identityagent")
        timeout = found.get("connecttimeout")
        return Target(
            name=spec.host,
            host=host,
            port=port,
            user=user,
            identity_files=[_path(name) for name in found.get("identityfile", []) if name.lower() != "none"],
            use_agent=found.get("identitiesonly", "no").lower() != "yes" and (agent or "").lower() != "none",
            agent_socket=_agent(agent),
            proxy_command=found.get("proxycommand"),
            proxy_jump=_none(found.get("proxyjump")),
            known_hosts=_paths(found.get("userknownhostsfile", "~/.ssh/known_hosts ~/.ssh/known_hosts2")),
            system_known_hosts=_paths(found.get("globalknownhostsfile", "/etc/ssh/ssh_known_hosts")),
            key_alias=found.get("hostkeyalias"),
            accept_unknown=strict in ("no", "off", "accept-new"),
            accept_changed=strict in ("no", "off"),
            connect_timeout=float(timeout) if timeout and timeout.isdigit() else None,
            compress=found.get("compression", "no").lower() == "yes",
        )

    def _lookup(self, host: str) -> dict[str, Any]:
        import paramiko

        lines = [*self._head, *self._lines(host)]
        try:
            config = paramiko.SSHConfig.from_text("\n".join(lines))
            found: dict[str, Any] = dict(config.lookup(host))
        except Exception as error:  # ConfigParseError; ImportError where `Match exec` needs a library
            _own_name()  # paramiko asks for it in any case
            raise ValueError(
                f"the ssh configuration for {host} cannot be read by paramiko ({error}): "
                'use the OpenSSH program, ssh="ssh"'
            ) from error
        return found

    def _lines(self, host: str) -> Iterator[str]:
        if self._file is not None:
            if self._file.lower() != "none":
                yield from _expand(self._file, host, os.path.expanduser("~/.ssh"), required=True)
            return
        yield from _expand(os.path.expanduser("~/.ssh/config"), host, os.path.expanduser("~/.ssh"))
        yield "Host *"
        yield from _expand("/etc/ssh/ssh_config", host, "/etc/ssh")


def parse_flags(flags: list[str]) -> tuple[list[tuple[str, str]], str | None]:
    """The options in flags of the ssh program, and the file of `-F`. ValueError: a flag that has no meaning here."""
    options: list[tuple[str, str]] = []
    file: str | None = None
    rest = list(flags)
    while rest:
        flag = rest.pop(0)
        letter = flag[1:2]
        if not flag.startswith("-") or not letter or (letter not in _WITH_VALUE and letter not in _HARMLESS):
            raise ValueError(f'sshflags: {flag!r} is not understood without an ssh program (ssh="ssh")')
        if letter in _HARMLESS:
            rest[:0] = ["-" + flag[2:]] if flag[2:] else []
            continue
        if not flag[2:] and not rest:
            raise ValueError(f"sshflags: {flag} needs a value")
        value = flag[2:] or rest.pop(0)
        if letter == "F":
            file = os.path.expanduser(value)
        elif letter == "o":
            setting = _SETTING.fullmatch(value.strip())
            if setting is None:
                raise ValueError(f"sshflags: not an option: -o {value}")
            options.append((setting[1], setting[2]))
        elif letter in "iJpl":
            name = {"i": "IdentityFile", "J": "ProxyJump", "p": "Port", "l": "User"}[letter]
            options.append((name, value))
        elif letter not in "cmeE":  # ciphers and logs are left to paramiko
            raise ValueError(f'sshflags: {flag} is not understood without an ssh program (ssh="ssh")')
    return options, file


def _expand(path: str, host: str, home: str, required: bool = False, depth: int = 0) -> Iterator[str]:
    """The lines of a file with those of the files that it includes."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except OSError:
        if required:
            raise
        return
    block, applies = "Host *", True
    for line in lines:
        found = _SETTING.match(line.strip())
        keyword = found[1].lower() if found is not None and not line.lstrip().startswith("#") else ""
        if found is None or keyword not in ("include", "host", "match"):
            yield line
        elif keyword != "include":
            if keyword == "match" and {"final", "all"} <= set(found[2].lower().split()):
                line = "Match final"  # Fedora's system file has `Match final all`, which paramiko takes for an error
            block = line
            # A file that is included in a `Match` block is taken in any case: its own blocks decide.
            applies = keyword == "match" or _matches(found[2], host)
            yield line
        elif applies and depth < _DEPTH:
            for pattern in shlex.split(found[2]):
                place = os.path.join(home, os.path.expanduser(pattern))
                for name in sorted(glob.glob(place)):
                    yield from _expand(name, host, home, depth=depth + 1)
            yield block  # what follows belongs to this block again


def _own_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        raise ValueError("there is no user name to log in with, because this program has none: set USER") from None


def _matches(patterns: str, host: str) -> bool:
    matched = False
    for pattern in shlex.split(patterns):
        if pattern.startswith("!"):
            if fnmatch.fnmatchcase(host, pattern[1:]):
                return False
        elif fnmatch.fnmatchcase(host, pattern):
            matched = True
    return matched


def _path(name: str) -> str:
    return os.path.expanduser(name.strip('"'))


def _paths(names: str) -> list[str]:
    return [_path(name) for name in shlex.split(names) if name.lower() != "none"]


def _none(value: str | None) -> str | None:
    return None if value is None or value.lower() == "none" else value


def _agent(value: str | None) -> str | None:
    if value is None or value.lower() in ("none", "ssh_auth_sock"):
        return None
    if value.startswith("$"):
        return os.environ.get(value.strip("${}"))
    return _path(value)


__all__ = ["Config", "Target", "parse_flags"]
