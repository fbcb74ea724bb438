"""What the SSH manager needs of an SSH client: one login, a command that runs there, connections through it (layer 8).

    ssh_paramiko.connect, ssh_binary.connect --> Connection --run(command)--> Session (its streams)
                                                            --dial(host, port)--> socket or streams

Everything here blocks and is bounded by a deadline; it runs on threads of the manager. Both clients pass one suite.
"""

from __future__ import annotations

from typing import Any, Protocol


class LoginError(Exception):
    """Why there is no login: a text that tells what to do. `output`: what the client or the host printed."""

    def __init__(self, reason: str, output: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.output = output


class Session(Protocol):
    """A command that runs on the host. `read` and `read_errors` give b"" at the end, and are called on one thread each;
    `write` never raises: who does not read any more will be seen by its end."""

    def read(self, size: int) -> bytes: ...
    def read_errors(self, size: int) -> bytes: ...
    def write(self, data: bytes) -> None: ...
    def status(self, timeout: float) -> int | None: ...
    def close(self) -> None: ...


class Connection(Protocol):
    """One login.

    `run` may be called several times. LoginError, OSError: the host is gone. `dial`: a connected socket, or a pair
    (reader, writer), to an address as that host sees it; OSError. `close` ends everything that runs through it;
    `forget` closes descriptors in a forked child, where nothing may be said to the host.
    """

    def run(self, command: str, deadline: float) -> Session: ...
    def dial(self, host: str, port: int, deadline: float) -> Any: ...
    def explain(self, status: int | None, errors: str) -> str: ...
    def close(self) -> None: ...
    def forget(self) -> None: ...


__all__ = ["Connection", "LoginError", "Session"]
