"""The command line that a login runs, quoted for the shell that it meets there (layer 8).

    posix, csh:  exec env NAME=VALUE... PYTHON FLAGS -m distpool worker --login
    wincmd:      set "NAME=VALUE"&& PYTHON FLAGS -m distpool worker --login

`exec env` is understood by every Unix shell, where `NAME=VALUE command`, `export` and `2>` are not. Only what the
interpreter (or `bootstrap`) needs at its start stands there; directory, cookie and the other variables go through
stdin, where no other user sees them and nothing has to be quoted.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from distpool.managers.login_protocol import LOGIN_ARGUMENTS

SHELLS = ("posix", "csh", "wincmd")

_STARTUP_NAMES = ("PATH", "LANG", "TZDIR", "GLIBC_TUNABLES", "HOME", "XDG_CACHE_HOME", "TMPDIR")
_STARTUP_PREFIXES = ("PYTHON", "LC_", "LD_", "DYLD_", "MALLOC_")

_SEARCH = (
    'for python in "$0" python%d.%d python3 python; do '
    'command -v "$python" >/dev/null 2>&1 && exec "$python" "$@"; done; '
    'echo "distpool: no Python found: neither $0 nor python%d.%d, python3 or python in PATH=$PATH" >&2; exit 127'
)


def words(value: Any, name: str) -> list[str]:
    """A command or flags as given by the user: one text is one word. TypeError."""
    if value is None:
        return []
    if isinstance(value, str | os.PathLike):
        return [os.fspath(value)] if os.fspath(value) else []
    try:
        found = [os.fspath(part) for part in value]
    except TypeError:
        raise TypeError(f"{name} must be a str or a list of str, not {value!r}") from None
    return found


def interpreter(exename: Any) -> list[str]:
    """The command of the interpreter. None: this one's path if it is there, else the Python that is found in PATH."""
    if exename is not None:
        found = words(exename, "exename")
        if not found:
            raise ValueError("exename must name a program")
        return found
    major, minor = sys.version_info[:2]
    return ["sh", "-c", _SEARCH % (major, minor, major, minor), sys.executable or "python3"]


def startup_variables(env: Mapping[str, str]) -> dict[str, str]:
    """Those of the variables that are read before a program of ours runs."""
    return {name: value for name, value in env.items() if name in _STARTUP_NAMES or name.startswith(_STARTUP_PREFIXES)}


def command_line(
    shell: str, exename: Any, exeflags: Any, env: Mapping[str, str], arguments: Sequence[str] = LOGIN_ARGUMENTS
) -> str:
    """The text that the remote shell gets. ValueError: it cannot be said in that shell."""
    at_start = startup_variables(env)
    if shell == "wincmd":
        argv = [*(words(exename, "exename") or ["python"]), *words(exeflags, "exeflags"), *arguments]
        settings = "".join(f'set "{name}={_caret(value)}"&& ' for name, value in at_start.items())
        return settings + " ".join(quote_wincmd(word) for word in argv)
    argv = [*interpreter(exename), *words(exeflags, "exeflags"), *arguments]
    quote = quote_csh if shell == "csh" else shlex.quote
    return " ".join(["exec", "env", *(quote(f"{name}={value}") for name, value in at_start.items()), *map(quote, argv)])


def quote_csh(word: str) -> str:
    """A word for csh and tcsh, where `!` and line ends are special even between single quotes."""
    return shlex.quote(word).replace("!", "\\!").replace("\n", "\\\n")


def quote_wincmd(word: str) -> str:
    """A word for cmd.exe and the C library's splitting. ValueError: a line end cannot be said there."""
    if word and not set(word) & set(' \t\n\r"&|<>^()%!,;='):
        return word
    text, backslashes = "", 0
    for letter in word:  # backslashes count double only before a quote
        if letter == '"':
            text += "\\" * backslashes + '\\"'
        else:
            text += letter
        backslashes = backslashes + 1 if letter == "\\" else 0
    return _caret('"' + text + "\\" * backslashes + '"')


def _caret(text: str) -> str:
    if any(letter in text for letter in "\r\n\0"):
        raise ValueError(f"a line end cannot be passed through cmd.exe: {text!r}")
    return "".join("^" + letter if letter in '"&|<>^()%!' else letter for letter in text)


__all__ = ["SHELLS", "command_line", "interpreter", "quote_csh", "quote_wincmd", "startup_variables", "words"]
