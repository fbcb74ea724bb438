"""Membership: starting processes through a manager and making members of them (layer 9).

launch thread:  manager.launch(params) -> WorkerConfig --call_soon--> leader: Group.add, Member.start
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distpool import config
from distpool.managers.base import ClusterManager, WorkerConfig
from distpool.managers.launch import Launcher
from distpool.node import group as groups
from distpool.node.group import Member
from distpool.node.node import Node


def launcher(node: Node) -> Launcher:
    """The launcher of local processes of this node, made on first use."""
    if node.launcher is None:
        node.launcher = Launcher(node.loop)
        node.on_fork.append(node.launcher.forget_after_fork)
    return node.launcher  # type: ignore[no-any-return]


def start_workers(
    node: Node,
    manager: ClusterManager,
    params: dict[str, Any],
    prepare: Callable[[Member], None],
    finished: Callable[[int, BaseException | None], None],
) -> None:
    """Launch on a library thread. `prepare(member)` (leader) sets the member's callbacks before it is started;
    `finished(count, error)` (leader) says how many processes were launched, and what went wrong after those.
    """
    full = {**manager.default_addprocs_params(), **params, "cookie": node.cookie, "launcher": launcher(node)}
    timeout = full.get("timeout")
    seconds = config.worker_timeout() if timeout is None else float(timeout)

    def work() -> None:
        count = 0
        error: BaseException | None = None
        try:
            for worker in manager.launch(full):
                count += 1
                node.loop.call_soon(lambda worker=worker: begin(worker))  # type: ignore[misc]
        except Exception as caught:
            error = caught
        node.loop.call_soon(lambda: finished(count, error))

    def begin(worker: WorkerConfig) -> None:
        member = groups.of(node).add(worker.process, address_of(worker))
        prepare(member)
        member.start(seconds)

    node.deliver(work)


def address_of(worker: WorkerConfig) -> tuple[Any, ...]:
    """Where the worker listens, as `("unix", path)` or `("tcp", host, port)`."""
    host = worker.host or "127.0.0.1"
    if host.startswith("unix:"):
        return "unix", host[len("unix:") :]
    return "tcp", host, worker.port
