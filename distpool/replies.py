"""One call to one process, without waiting: what maps and executors over pools are built of (layer 6).

    request(f, pid, args) -> REQUEST "fetch" --> REPLY --> Future: the value, or the call's own exception

Unlike `remotecall`, the value comes along with the answer, no reference is made, and errors are the original ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distpool import errors
from distpool.calls import _node, _Reply, _run_here, _send
from distpool.refs import gc
from distpool.refs.ahead import settle_puts
from distpool.refs.lent import received
from distpool.refs.owner import RRID
from distpool.refs.refs import LOCAL_VALUE, RAISED_HERE, Future, Outcome
from distpool.refs.remote import _Waiting
from distpool.wire.failures import traceback_text


def request(
    f: Callable[..., Any],
    pid: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    remote: bool = False,
) -> Future[Any]:
    """Start `f(*args)` on process `pid`. Raises at once as `remotecall` does; what `f` raises is the future's error,
    with `remote` inside a `RemoteException`. Callbacks of the future run on library threads.
    """
    node = _node()
    future: Future[Any] = _Reply() if remote else Future()
    future._call = _Waiting(gc.of(node))

    def settle(outcome: Outcome) -> None:
        if future._settle(outcome):
            node.deliver(future._run_callbacks)

    if pid == node.pid:
        node.deliver(lambda: (_run_here if remote else _run)(f, args, kwargs or {}, settle))
        return future
    node.peers.ensure(pid)
    requests = node.peers.requests
    number = requests.new(
        pid,
        lambda status, data, buffers: settle(received(status, data, buffers, pid)),
        lambda error: settle(Outcome(RAISED_HERE, error, (), pid)),
    )
    try:
        _send(node, pid, "fetch", RRID(0, 0), f, args, kwargs or {}, number)
    except BaseException:
        requests.forget(number)
        raise
    if pid in node.peers.dead:  # died between the two looks: nobody else will say so
        requests.fail(pid, node.peers.dead[pid])
    return future


def _run(
    f: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], settle: Callable[[Outcome], object]
) -> None:
    """On a library thread, as `_run_here`, with the error itself."""
    node = _node()
    try:
        outcome = Outcome(LOCAL_VALUE, node.call(f, args, kwargs), (), node.pid)
    except BaseException as error:  # as on any other process: it is the call's outcome
        if node.drops(error):
            return
        note_traceback(error)
        outcome = Outcome(RAISED_HERE, error, (), node.pid)
    finally:
        settle_puts()
    settle(outcome)


def note_traceback(error: BaseException) -> None:
    """Give an error of this process the text of its traceback as `__cause__`, as errors from elsewhere have it; never
    raises."""
    if errors.cause_of(error) is None:
        text = f'\n"""\n{traceback_text(error)}"""'
        errors.set_cause(error, errors.remote_traceback(text))


__all__ = ["note_traceback", "request"]
