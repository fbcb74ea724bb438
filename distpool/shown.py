"""A worker process as `ProcessPoolExecutor._processes` and `Pool._pool` show it to libraries that look (layer 10)."""

from __future__ import annotations

import signal
import threading
from typing import Any

from distpool.crew import Crew, end
from distpool.node.group import State


class ShownProcess:
    """What can be done to one of them there: the part of `multiprocessing.Process` that concerns a running process."""

    def __init__(self, member: Any) -> None:
        self._member = member
        self.pid = member.ospid
        self.name = f"distpool-worker-{member.pid}"

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


class StartingProcess:
    """A worker that may not have been started yet: its `pid` and `name`, and what is done to it, wait until it is.

    They are None, and nothing is done, if no worker comes any more.
    """

    def __init__(self, crew: Crew, index: int) -> None:
        self._crew = crew
        self._index = index  # it is the one behind so many others
        self._found: ShownProcess | None = None

    def _process(self) -> ShownProcess | None:
        if self._found is None:
            self._crew.wait_for_members(self._index + 1)
            members = list(self._crew.members.values())[self._index :]
            self._found = ShownProcess(members[0]) if members else None
        return self._found

    @property
    def pid(self) -> int | None:
        """Its process id."""
        process = self._process()
        return None if process is None else process.pid

    @property
    def name(self) -> str | None:
        """What it is called."""
        process = self._process()
        return None if process is None else process.name

    @property
    def exitcode(self) -> int | None:
        """Exit status (negative: signal), `None` while it lives or comes up. Does not wait."""
        return None if self._found is None else self._found.exitcode

    def is_alive(self) -> bool:
        """Whether it has not ended. Does not wait."""
        return self._found is None or self._found.is_alive()

    def terminate(self) -> None:
        """Send SIGTERM."""
        process = self._process()
        if process is not None:
            process.terminate()

    def kill(self) -> None:
        """Send SIGKILL."""
        process = self._process()
        if process is not None:
            process.kill()

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end of the process."""
        process = self._process()
        if process is not None:
            process.join(timeout)


__all__ = ["ShownProcess", "StartingProcess"]
