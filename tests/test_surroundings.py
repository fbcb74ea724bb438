"""What a process finds around it."""

from __future__ import annotations

import os
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
