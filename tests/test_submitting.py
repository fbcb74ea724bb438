"""How calls and maps of an executor go to its scheduler: by which way, with which policy, and what is refused."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import PATIENCE, FakeWorker, Office, fresh

from distpool import submitting
from distpool.errors import SerializationError
from distpool.kept import KeptFuture
from distpool.mapruns import LOOK_AHEAD
from distpool.refs.refs import RAISED_HERE, Future, Outcome
from distpool.submitter import Submitter
from distpool.wire.failures import encode_exception
from distpool.wire.messages import ERROR, UNSENDABLE, VALUE
from distpool.work import Policy


class Owner(Submitter):
    """An executor, or a view of one, over fake workers."""

    def __init__(self, office: Office, policy: Policy | None = None, replace: bool = True) -> None:
        self.broken: list[BaseException] = []
        self._crew: Any = SimpleNamespace(
            node=office.node, scheduler=office.scheduler, size=2, break_here=self._break_here
        )
        self._policy = policy
        self._progress: Any = None
        self._ways = submitting
        self._future_class = submitting.future_class(self._crew, replace)
        self.usable = True

    def _break_here(self, error: BaseException) -> BaseException:
        self.broken.append(error)
        return RuntimeError("broken by a result")

    def _check_usable(self) -> None:
        if not self.usable:
            raise RuntimeError("after shutdown")


@pytest.fixture
def office() -> Iterator[Office]:
    made = Office()
    yield made
    made.close()


@pytest.fixture
def robot(office: Office) -> Iterator[FakeWorker]:
    """A worker that gives back what it gets, by itself."""
    worker, stop = office.worker(2), threading.Event()

    def work() -> None:
        while True:
            with worker.arrived:
                worker.arrived.wait_for(lambda: worker.inbox or stop.is_set(), PATIENCE)
                if stop.is_set():
                    return
            office.finish(worker)

    thread = threading.Thread(target=work)
    thread.start()
    yield worker
    stop.set()
    with worker.arrived:
        worker.arrived.notify_all()
    thread.join(PATIENCE)


# -- submit ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [(1,), ([1],), ("x" * 5000,)])
def test_what_is_submitted_comes_back(office: Office, robot: FakeWorker, args: tuple[Any, ...]) -> None:
    assert Owner(office).submit(fresh(), *args).result(PATIENCE) == args[0]


def test_only_plain_arguments_wait_unserialised(office: Office) -> None:
    def call(*args: Any, policy: Policy | None = None, **kwargs: Any) -> Any:
        return Owner(office, policy).submit(abs, *args, **kwargs)._call

    assert call(-1).arguments == (-1,) and call(-1).record == b""
    for other in (call([1]), call(x=1), call(-1, policy=Policy(label="a"))):
        assert other.arguments is None and other.record


def test_later_changes_of_arguments_do_not_matter(office: Office) -> None:
    items = [1]
    future = Owner(office).submit(fresh(), items)
    items.append(2)
    office.finish(office.worker(2))
    assert future.result(PATIENCE) == [1]


def test_the_policy_goes_with_the_call(office: Office) -> None:
    policy = Policy(label="a")
    call: Any = Owner(office, policy).submit(abs, 1)._call
    assert call.policy is policy


def test_what_cannot_be_serialised_is_the_error_of_that_future(office: Office, robot: FakeWorker) -> None:
    owner = Owner(office)
    for future in (owner.submit(abs, threading.Lock()), owner.submit(threading.Lock().acquire)):
        error = future.exception()
        assert future.done() and isinstance(error, SerializationError) and isinstance(error, TypeError)
    assert owner.submit(fresh(), 1).result(PATIENCE) == 1


def test_an_interrupt_while_serialising_leaves(office: Office) -> None:
    class Interrupts:
        def __reduce__(self) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Owner(office).submit(abs, Interrupts())


def test_nothing_is_submitted_to_what_is_not_usable(office: Office) -> None:
    owner = Owner(office)
    owner.usable = False
    for use in (owner.submit, owner.map, owner.imap_unordered):
        with pytest.raises(RuntimeError, match="after shutdown"):
            use(abs, [1])
    assert not office.scheduler.waiting


def test_a_value_that_stays_there(office: Office) -> None:
    assert type(Owner(office, Policy(keep=True)).submit(abs, 1)) is KeptFuture


def test_futures_of_the_standard_librarys_rule(office: Office) -> None:
    lenient, strict = Owner(office), Owner(office, replace=False)
    assert lenient._future_class is Future
    garbage = Outcome(VALUE, b"no pickle", (), 2)
    future: Future[Any] = strict._future_class()
    future._settle(garbage)
    with pytest.raises(RuntimeError, match="broken by a result"):
        future.result()
    assert len(strict.broken) == 1
    for status, error, kind in (
        (ERROR, KeyError("x"), KeyError),  # what the call raised breaks nothing
        (UNSENDABLE, SerializationError("it cannot be serialised: SystemExit: 3"), SystemExit),
        (UNSENDABLE, SerializationError("it cannot be serialised: TypeError: 3"), SerializationError),
    ):
        future = strict._future_class()
        future._settle(Outcome(status, encode_exception(error), (), 2))
        assert type(future.exception()) is kind
    future = strict._future_class()
    future._settle(Outcome(RAISED_HERE, OSError("x"), (), 2))
    assert type(future.exception()) is OSError and len(strict.broken) == 1


# -- maps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffersize", [None, 1, 5])
@pytest.mark.parametrize("chunksize", [1, 3])
@pytest.mark.parametrize("policy", [None, Policy(label="plain"), Policy(retries=1)])
@pytest.mark.parametrize("source", [range(10), [[n] for n in range(10)], dict.fromkeys(range(10), 0)])
def test_maps_in_order(
    office: Office, robot: FakeWorker, source: Any, policy: Policy | None, chunksize: int, buffersize: int | None
) -> None:
    if policy is not None and not policy.plain:
        chunksize = 1  # else it is a call of `OfChunks`, and the fake worker runs no function
    owner = Owner(office, policy)
    assert list(owner.map(fresh(), source, chunksize=chunksize, buffersize=buffersize)) == list(source)


def test_no_iterable_at_all(office: Office) -> None:
    assert list(Owner(office).map(abs)) == []


def test_the_shortest_of_several_iterables_ends_it(office: Office, robot: FakeWorker) -> None:
    assert list(Owner(office).map(fresh(), [1, 2, 3], itertools.count())) == [1, 2, 3]
    assert list(Owner(office).imap_unordered(fresh(), itertools.count(), [1, 2])) == [0, 1]


def test_the_input_is_taken_at_the_call(office: Office) -> None:
    taken: list[int] = []
    source = (taken.append(n) or n for n in range(20))
    Owner(office).map(abs, source)
    assert len(taken) == 20
    taken.clear()
    Owner(office).map(abs, (taken.append(n) or n for n in range(20)), buffersize=3)
    assert len(taken) == 3

    def failing() -> Iterator[int]:
        yield 1
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Owner(office).map(abs, failing())


def test_a_submit_of_the_users_own_is_used(office: Office, robot: FakeWorker) -> None:
    owner = Owner(office)
    submit, seen = owner.submit, []

    def count(fn: Callable[..., Any], /, *args: Any) -> Future[Any]:
        seen.append(args)
        return submit(fn, *args)

    owner.submit = count  # type: ignore[method-assign]
    assert list(owner.map(fresh(), [1, 2])) == [1, 2] and seen == [(1,), (2,)]


@pytest.mark.parametrize("chunksize, buffersize", [(0, None), (1, 0)])
def test_bad_sizes_are_refused_before_anything_is_taken(office: Office, chunksize: int, buffersize: Any) -> None:
    source = iter([1, 2])
    with pytest.raises(ValueError):
        Owner(office).map(abs, source, chunksize=chunksize, buffersize=buffersize)
    assert list(source) == [1, 2]


# -- as they come ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [None, Policy(retries=1)])
@pytest.mark.parametrize("source", [range(20), [[n] for n in range(20)]])
def test_unordered(office: Office, robot: FakeWorker, source: Any, policy: Policy | None) -> None:
    assert sorted(Owner(office, policy).imap_unordered(fresh(), source)) == list(source)


@pytest.mark.parametrize("policy", [None, Policy(retries=1)])
@pytest.mark.parametrize("buffersize, most", [(3, 3), (None, LOOK_AHEAD * 2)])
def test_unordered_is_lazy(office: Office, policy: Policy | None, buffersize: int | None, most: int) -> None:
    taken: list[int] = []
    source = (taken.append(n) or n for n in itertools.count())
    results = Owner(office, policy).imap_unordered(fresh(), source, buffersize=buffersize, timeout=0.01)
    assert not taken
    with pytest.raises(TimeoutError):
        next(results)
    assert 1 <= len(taken) <= most


@pytest.mark.parametrize(
    ("buffersize", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("3", TypeError)]
)
def test_unordered_sizes(office: Office, buffersize: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="buffersize must be"):
        Owner(office).imap_unordered(abs, [1], buffersize=buffersize)


# -- progress --------------------------------------------------------------------------------------------------------


class Bar:
    def __init__(self, total: int | None) -> None:
        self.total, self.count, self.closed = total, 0, 0

    def update(self, count: int) -> None:
        self.count += count

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize(
    ("how", "total"),
    [
        ({}, 6),
        ({"chunksize": 4}, 6),
        ({"buffersize": 2}, None),
        ({"unordered": True}, None),
    ],
)
def test_progress(office: Office, robot: FakeWorker, how: dict[str, Any], total: int | None) -> None:
    bars: list[Bar] = []
    owner = Owner(office)
    owner._progress = lambda total: bars.append(Bar(total)) or bars[-1]
    run = owner.imap_unordered if how.pop("unordered", False) else owner.map
    assert sorted(run(fresh(), iter(range(6)), **how)) == list(range(6))
    assert [(bar.total, bar.count, bar.closed) for bar in bars] == [(total, 6, 1)]
