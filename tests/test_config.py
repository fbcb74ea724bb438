"""Limits and environment variables: read at each use, and a wrong value is an error that names it."""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from typing import Any

import numpy as np
import pytest

from distpool import config


def test_worker_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISTPOOL_WORKER_TIMEOUT", raising=False)
    assert config.worker_timeout() == 60.0
    for text, value in (("5", 5.0), ("0.25", 0.25), ("", 60.0), (" 7 ", 7.0)):
        monkeypatch.setenv("DISTPOOL_WORKER_TIMEOUT", text)
        assert config.worker_timeout() == value


def test_deadlines() -> None:
    for endless in (None, math.inf, 1e300, 10**400):
        assert config.deadline_after(endless) is None
    begin = time.monotonic()
    for seconds in (5, 0.5, -1, config.LONGEST / 2):
        found = config.deadline_after(seconds)
        assert found is not None and 0 <= found - begin - seconds < 5
    with pytest.raises(ValueError, match="NaN"):
        config.deadline_after(math.nan)
    with pytest.raises(TypeError):
        config.deadline_after("1")  # type: ignore[arg-type]


def test_infinity_is_a_time_that_every_wait_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTPOOL_WORKER_TIMEOUT", "inf")
    monkeypatch.setenv("DISTPOOL_SILENT_SECONDS", "1e300")
    longest = config.worker_timeout()
    assert longest == config.silent_seconds() == config.launch_timeout(None) == config.launch_timeout(float("inf"))
    assert config.launch_timeout(10**400) == longest and config.launch_timeout(7) == 7.0
    assert int(longest * 1000) < 2**31  # milliseconds, as polls and sockets take them
    with socket.socket() as sock:
        sock.settimeout(longest)
    assert longest <= threading.TIMEOUT_MAX


@pytest.mark.parametrize("text", ["soon", "1h", "1,5", "nan", "-1", "0"])
def test_worker_timeout_must_be_a_number(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("DISTPOOL_WORKER_TIMEOUT", text)
    with pytest.raises(ValueError, match="DISTPOOL_WORKER_TIMEOUT"):
        config.worker_timeout()


@pytest.mark.parametrize(
    "name, function, allowed",
    [
        ("DISTPOOL_LAUNCH", config.launch_method, {"fork", "exec"}),
        ("DISTPOOL_TRANSPORT", config.local_transport, {"unix", "tcp"}),
    ],
)
def test_choices(monkeypatch: pytest.MonkeyPatch, name: str, function: object, allowed: set[str]) -> None:
    assert callable(function)
    monkeypatch.delenv(name, raising=False)
    default = function()
    assert default in allowed
    monkeypatch.setenv(name, "")
    assert function() == default
    for value in allowed:
        monkeypatch.setenv(name, value)
        assert function() == value
    for value in ("nonsense", "FORK", " unix"):
        monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=f"{name} must be one of .*{value.strip()}"):
            function()


def test_defaults_follow_what_the_system_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISTPOOL_LAUNCH", raising=False)
    monkeypatch.delenv("DISTPOOL_TRANSPORT", raising=False)
    assert config.launch_method() == ("fork" if hasattr(os, "fork") else "exec")
    assert config.local_transport() == ("unix" if hasattr(socket, "AF_UNIX") else "tcp")
    monkeypatch.delattr(os, "fork", raising=False)
    monkeypatch.delattr(socket, "AF_UNIX", raising=False)
    assert (config.launch_method(), config.local_transport()) == ("exec", "tcp")


def test_limits_are_in_order() -> None:
    assert 0 < config.MAX_BEFORE_AUTH < config.READ_SIZE < config.MAX_CONTROL < config.MAX_BODY
    assert 0 < config.GRACE < 1 and 0 < config.WINDOW_SECONDS < 1 and 0 < config.FLUSH_SECONDS < 1
    assert config.OUT_OF_BAND > 0 and config.JOURNAL_SIZE % 4096 == 0


class Index:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __index__(self) -> Any:
        return self.value


ARRAY = Index(None)


@pytest.mark.parametrize(
    ("given", "expected"),
    [(3, 3), (True, True), ("3", "3"), (None, None), (2.0, 2.0), (Index(4), 4), (ARRAY, ARRAY), ([1], [1])],
)
def test_what_says_that_it_is_an_int(given: Any, expected: Any) -> None:
    """numpy's integers do, and so, in vain, do its arrays."""
    found = config.as_int(given)
    assert found == expected and type(found) is type(expected)


def test_bools() -> None:
    assert config.as_bool(np.True_) is True and config.as_bool(np.False_) is False and config.as_bool(True) is True
    assert [config.as_flag("x", on) for on in (True, 1, np.True_)] == [True] * 3
    assert [config.as_flag("x", off) for off in (False, 0, np.False_)] == [False] * 3
    assert config.as_bool("bool") == "bool" and config.as_bool(np.int8(1)) is not True


@pytest.mark.parametrize("cookie", ["a", "x" * 64, "with spaces !", "  ", " a\t", "\x01\x7f"])
def test_cookies(cookie: str) -> None:
    config.check_cookie(cookie)


@pytest.mark.parametrize("cookie", ["", "x" * 65, "\N{LATIN SMALL LETTER E WITH ACUTE}", b"bytes", None, 5])
def test_what_is_no_cookie(cookie: Any) -> None:
    with pytest.raises(ValueError, match="1 to 64 ASCII"):
        config.check_cookie(cookie)


@pytest.mark.parametrize("cookie", ["a\n", "\n", "a\rb", "\0"])
def test_what_is_no_line(cookie: str) -> None:
    with pytest.raises(ValueError, match="must not contain a newline, carriage return or NUL"):
        config.check_cookie(cookie)
