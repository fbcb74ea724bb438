"""One `addprocs` from its launch to its result (layer 9).

    Launch --member--> prepare ... joined, others of its host begun (`count`), or gone with a launch error
    all settled -> custom topology: those to connect to have joined (_Idents)
                -> not lazy: links between workers (_Connecting)
                -> managers have been told -> future: pids, or CompositeException

Everything runs on the leader unless it says otherwise; each wait has the time-out of the launch as its end.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from distpool.errors import CompositeException, LaunchWorkerError
from distpool.joining import Launch
from distpool.logs import Log
from distpool.managers.base import ClusterManager
from distpool.node.group import Group, Member
from distpool.node.node import Node
from distpool.refs.refs import Future
from distpool.supply import launch_errors
from distpool.wire import messages
from distpool.wire.frames import Frame, Kind

log = Log("cluster")

_PATIENCE = 5.0  # seconds that a worker has to exit when asked


class Adding:
    """One `addprocs`: collects what comes of each worker. Methods run on the leader unless they say otherwise."""

    def __init__(self, node: Node, group: Group, manager: ClusterManager, params: dict[str, Any]) -> None:
        self.node = node
        self.future: Future[list[int]] = Future()  # ours travels: a worker may have pid 1 add some
        self.future.set_running_or_notify_cancel()  # it cannot be cancelled
        self.group = group
        self._launch = Launch(node, manager, params, self._prepare, self._launched)
        self._joined: dict[int, Member] = {}
        self._pending: set[int] = set()  # not joined yet, or not done with starting others
        self._errors: dict[int, list[BaseException]] = {}  # pid -> ; 0: of the launch itself
        self._launching = True
        self._settled = False

    def start(self) -> None:
        """Any thread."""
        self._launch.start()

    def _launched(self, count: int, error: BaseException | None) -> None:
        self._launching = False
        if error is not None:
            self._errors[0] = [error]
        self._check()

    def _prepare(self, member: Member) -> None:
        self._pending.add(member.pid)
        member.on_joined = self._on_joined
        member.on_gone = self._on_gone

    def _on_joined(self, member: Member) -> None:
        self._joined[member.pid] = member
        self.group.add_default(member.pid)

        def others_begun(count: int, errors: list[LaunchWorkerError]) -> None:
            if errors:
                self._errors.setdefault(member.pid, []).extend(errors)
            self._pending.discard(member.pid)
            self._check()

        if not self._launch.more(member, others_begun):
            others_begun(0, [])

    def _on_gone(self, member: Member, reason: BaseException | None) -> None:
        if member.pid not in self._joined:
            self._errors.setdefault(member.pid, []).append(member.launch_error())
        elif not member.removed:
            log.warning("Worker %d terminated.", member.pid)
        self._pending.discard(member.pid)
        if not self._settled:
            self._check()
        close_launcher(self.node)

    def _check(self) -> None:
        if self._launching or self._pending or self._settled:
            return
        self._settled = True
        if self.group.topology == "custom":
            _Idents(self)
        else:
            self.connect()

    def connect(self) -> None:
        """All that will join have joined: links that are not lazy, then the end."""
        asked = set(self.group.connect_all(self.living()))
        if not asked:
            self.finish()
            return
        _Connecting(self, asked)

    def living(self) -> list[int]:
        """Pids of those that joined and are still here, sorted."""
        return sorted(pid for pid, member in self._joined.items() if member.listed)

    @property
    def seconds(self) -> float:
        """The time-out of this launch."""
        return self._launch.seconds

    def finish(self, error: BaseException | None = None) -> None:
        """Settle the future, when the managers have been told of the workers."""
        self.group.release_topology()
        pids = sorted(self._joined)
        failure = error or self._failure()
        left = threading.Semaphore(0)

        def settle() -> None:
            deadline = time.monotonic() + self.seconds
            for _ in self._joined:
                left.acquire(timeout=max(0.0, deadline - time.monotonic()))
            if failure is None:
                self.future.set_result(pids)
            else:
                self.future.set_exception(failure)

        for member in self._joined.values():
            member.notices.put(left.release)
        self.node.deliver(settle)
        close_launcher(self.node)

    def _failure(self) -> BaseException | None:
        if not self._errors:
            return None
        first = self._errors.get(0)
        if (
            first is not None
            and not self._joined
            and len(self._errors) == 1
            and type(first[0]) in (ValueError, TypeError)
        ):
            return first[0]  # the arguments were bad, and nothing has been started
        found: list[Exception] = []
        for pid in sorted(self._errors, key=lambda pid: pid or len(self._errors) + max(self._errors)):
            for error in self._errors[pid]:
                found += launch_errors(error)
        return CompositeException(found)


class _Idents:
    """Custom topology: waits until all whom the new workers shall connect to have joined."""

    def __init__(self, adding: Adding) -> None:
        self._adding = adding
        self._group = adding.group
        self._timer = adding.node.loop.call_later(adding.seconds, self._too_late)
        self._group.joined_watchers.append(self._look)
        self._group.gone_watchers.append(self._look)
        self._over = False
        self._look(None)

    def _lacking(self) -> list[Member]:
        members = [self._group.members.get(pid) for pid in self._adding.living()]
        return [member for member in members if member is not None and self._group.missing_idents(member)]

    def _look(self, member: Member | None) -> None:
        if not self._over and not self._lacking():
            self._end()
            self._adding.connect()

    def _end(self) -> None:
        self._over = True
        self._timer.cancel()
        self._group.joined_watchers.remove(self._look)
        self._group.gone_watchers.remove(self._look)

    def _too_late(self) -> None:
        if self._over:
            return
        self._end()
        for member in self._lacking():
            member.remove(_PATIENCE, by_manager=False)
        text = f"peer workers did not connect within {self._adding.seconds:g} seconds"
        self._adding.finish(RuntimeError(text))


class _Connecting:
    """Waits until the workers have made their links to each other, or the time-out."""

    def __init__(self, adding: Adding, asked: set[int]) -> None:
        self._adding = adding
        self._asked = asked
        self._group = adding.group
        self._timer = adding.node.loop.call_later(adding.seconds, self._end)
        self._over = False
        self._group.connecting.append(self._answered)
        self._group.gone_watchers.append(self._gone)
        adding.node.handlers.setdefault(Kind.CONNECTED, self._on_connected)

    def _on_connected(self, link: Any, frame: Frame) -> None:
        """Whoever registered first gets the frames for all."""
        for pid, text in messages.Connected.unpack(frame.control).problems:
            log.warning("worker %d is not connected to worker %d: %s", link.peer, pid, text)
        for answered in list(self._group.connecting):
            answered(link.peer)

    def _gone(self, member: Member) -> None:
        self._answered(member.pid)

    def _answered(self, pid: int) -> None:
        self._asked.discard(pid)
        if not self._asked:
            self._end()

    def _end(self) -> None:
        if self._over:
            return
        self._over = True
        self._timer.cancel()
        self._group.connecting.remove(self._answered)
        self._group.gone_watchers.remove(self._gone)
        self._adding.finish()


def close_launcher(node: Node) -> None:
    """Nobody may need the zygotes any more: they look themselves whether workers of them live. Any thread."""
    if not node.crews and node.launcher is not None:
        node.loop.call_soon(lambda: node.crews or node.launcher.close_if_idle())


__all__ = ["Adding", "close_launcher"]
