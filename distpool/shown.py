"""A worker process as `ProcessPoolExecutor._processes` and `Pool._pool` show it to libraries that look (layer 10)."""

from __future__ import annotations

import signal
import threading
from typing import Any

from distpool.crew import end
from distpool.node.group import State


class ShownProcess:
    """What can be done to one of them there: the part of `multiprocessing.Process` that concerns a running process."""

    def __init__(self, member: Any) -> None:
        self._member = member
        self.pid = member.ospid

    def is_alive(self) -> bool:
        """Whether the process is still there."""
        process = self._member.process
        return self._member.state is not State.GONE if process is None else not process.exited

    def terminate(self) -> None:
        """Send SIGTERM."""
        end(self._member, signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self._member.kill()

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end of the process."""
        ended = threading.Event()
        group = self._member.group
        if self._member.process is not None:
            self._member.process.add_exit_callback(lambda code: ended.set())
        else:  # there is none that we could watch: its end is the end of its connection
            group.node.loop.call_soon(lambda: self._watch(ended))
        with group.node.loop.following():
            ended.wait(timeout)

    def _watch(self, ended: threading.Event) -> None:
        def gone(member: Any) -> None:
            if member is self._member:
                ended.set()
                self._member.group.gone_watchers.remove(gone)

        self._member.group.gone_watchers.append(gone)
        if self._member.state is State.GONE:
            gone(self._member)

    @property
    def exitcode(self) -> int | None:
        """Exit status (negative: signal), `None` while it lives."""
        code: int | None = self._member.exitcode
        return code


__all__ = ["ShownProcess"]
