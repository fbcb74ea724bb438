"""How an executor gets its workers: from its arguments to its `Crew` (layer 10).

Apart from `executor`, because it loads nearly all of distpool: see `submitter`.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from distpool import exits, joining
from distpool.crew import Crew
from distpool.hints import Any
from distpool.hosts import Plan, plan_for
from distpool.managers.zygotes import ZygoteProcess
from distpool.node import group as groups
from distpool.node import node as nodes
from distpool.node.node import Node
from distpool.wire import codec


def make_crew(
    hosts: Any,
    max_workers: int | None,
    options: dict[str, Any],
    initializer: tuple[Callable[..., object] | None, tuple[Any, ...]],
    max_tasks: int | None,
    replace: bool,
) -> Crew:
    """The crew for these arguments of an executor, not started. ValueError, TypeError, SerializationError: bad ones;
    RuntimeError: the interpreter is shutting down, or a pool has no workers."""
    plan: Plan = plan_for(hosts, max_workers, options)
    exits.check_alive()
    node = nodes.current()
    if "DISTPOOL_TOP" in os.environ:
        from distpool.top import serve_if_wanted

        serve_if_wanted(node)
    code = _initializer_code(initializer) if initializer[0] is not None else None
    if plan.borrowed is not None:
        if max_tasks is not None:
            raise ValueError("max_tasks_per_child needs workers of the executor's own, not those of a pool")
        from distpool.borrowing import BorrowedCrew

        return BorrowedCrew(node, plan.borrowed, initializer=code, replace=replace)
    group = groups.of(node)
    if plan.params.keys().isdisjoint(("topology", "lazy")):  # an executor that does not care
        group.accept_topology()
    else:
        group.claim_topology(plan.params.get("topology", "all_to_all"), plan.params.get("lazy", True))
    crew = Crew(
        node, plan.places, plan.params, plan.cap, initializer=code, max_tasks=max_tasks, replace=replace
    )  # fmt: skip
    crew.holds_topology = True
    return crew


def _initializer_code(initializer: tuple[Callable[..., object] | None, tuple[Any, ...]]) -> bytes:
    data, buffers = codec.encode(initializer, what="the initializer with its arguments")
    return codec.dump(initializer, None, None, None) if buffers else data


def register(node: Node, executor: type, view: type) -> None:
    """Have executors finished at the end of the program, and let them and their views be sent to tasks."""
    exits.register(node)
    codec.register_reducer(executor, _reduce_executor)
    codec.register_reducer(view, _reduce_view)


def _reduce_executor(executor: Any, peer: Any) -> tuple[Any, ...]:
    from distpool.nested import reduce_executor

    return reduce_executor(executor, peer)


def _reduce_view(view: Any, peer: Any) -> tuple[Any, ...]:
    from distpool.nested import reduce_view

    return reduce_view(view, peer)


def adopt(node: Node, started: ZygoteProcess) -> None:
    """Have local workers forked by a zygote that was started ahead."""
    joining.launcher(node).adopt(started)


__all__ = ["adopt", "make_crew", "register"]
