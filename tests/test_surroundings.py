"""What a process finds around it."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from distpool.managers import surroundings


def test_routable_address(monkeypatch: pytest.MonkeyPatch) -> None:
    socket.inet_aton(surroundings.routable_address())

    class NoNetwork(socket.socket):
        def connect(self, address: Any) -> None:
            raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "socket", NoNetwork)
    assert surroundings.routable_address() == "127.0.0.1"


def test_a_current_directory_that_was_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    assert surroundings.here() == str(gone)
    gone.rmdir()
    assert surroundings.here() == os.path.expanduser("~")


def test_ignored_signals() -> None:
    """Without those that a worker needs for itself."""
    numbers = [signal.SIGUSR1, signal.SIGINT, signal.SIGTERM, signal.SIGCHLD]
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        found = surroundings.ignored()
        assert signal.SIGUSR1 in found and not {*numbers[1:], signal.SIGPIPE} & set(found)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    assert signal.SIGUSR1 not in surroundings.ignored()


def test_limits() -> None:
    import resource

    found = surroundings.limits()
    assert found["RLIMIT_NOFILE"] == list(resource.getrlimit(resource.RLIMIT_NOFILE))
    assert found["nice"] == os.getpriority(os.PRIO_PROCESS, 0)
    if hasattr(os, "sched_getaffinity"):
        assert found["affinity"] == sorted(os.sched_getaffinity(0))
    if "umask" in found:
        before = os.umask(0o31)
        try:
            assert found["umask"] == before and surroundings.limits()["umask"] == 0o31
        finally:
            os.umask(before)


def test_limits_that_cannot_be_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*args: Any) -> Any:
        raise ProcessLookupError

    monkeypatch.setattr(os, "getpriority", gone)
    found = surroundings.limits()
    assert "RLIMIT_NOFILE" in found and not {"nice", "umask"} & set(found)
