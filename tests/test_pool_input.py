"""The input of `imap` on its way to the workers: who takes it, how far ahead, and how it ends."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fakes import PATIENCE, FakeWorker, Office, fresh, nobody_takes
from wires import until

from distpool.lazymap import open_entry
from distpool.mapruns import MapRun
from distpool.pool_input import Feed, Inputs


class Executor:
    def __init__(self) -> None:
        self.shut: list[bool] = []

    def shutdown(self, wait: bool = True) -> None:
        self.shut.append(wait)


class Bench:
    """Feeds over one scheduler with fake workers."""

    def __init__(self) -> None:
        self.office = Office()
        self.executor = Executor()
        self.inputs = Inputs(self.executor)  # type: ignore[arg-type]

    def feed(self, source: Any, ahead: int = 4, plain: bool = False, ordered: bool = True, **options: Any) -> Feed:
        chunked = options.get("chunk") is not None
        run = self.office.run([], fresh(), ordered, chunked)
        options = {"chunk": None, **options}
        made = Feed(run, iter(source), self.inputs, look_ahead=lambda: ahead, plain=plain, **options)
        self.inputs.add(made)
        return made


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.office.close()


def fed(feed: Feed, count: int) -> None:
    """Wait until so many have been fed and nobody takes any more."""
    until(lambda: feed.run.fed >= count and nobody_takes(feed), f"{count} fed")
    assert feed.run.fed == count


def deliver(feed: Feed, worker: FakeWorker, office: Office) -> Any:
    """The consumer gets the next result."""
    worker.wait(lambda: worker.inbox, "an element")
    office.finish(worker)
    value = open_entry(feed.run.results.pop(feed.delivered))
    feed.delivered += 1
    return value


# -- how far ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [False, True])
def test_no_more_than_the_look_ahead(bench: Bench, plain: bool) -> None:
    taken: list[int] = []
    feed = bench.feed((taken.append(n) or n for n in itertools.count()), plain=plain)
    feed.go_on()
    fed(feed, 4)
    feed.go_on()
    fed(feed, 4)
    worker = bench.office.worker(2)
    assert deliver(feed, worker, bench.office) == 0
    feed.go_on()
    fed(feed, 4)  # half a look-ahead at a time
    assert deliver(feed, worker, bench.office) == 1
    feed.go_on()
    fed(feed, 6)
    assert len(taken) == 6 and not feed.ended


def test_who_takes(bench: Bench) -> None:
    """A generator may block, so a library thread takes it; a container may not, so the consumer's does."""
    threads: list[threading.Thread] = []

    def source() -> Iterator[int]:
        threads.append(threading.current_thread())
        yield 1

    for plain in (True, False):
        feed = bench.feed(source(), plain=plain)
        feed.go_on()
        until(lambda: feed.ended, "the end")
    assert threads[0] is threading.current_thread() and threads[1] is not threads[0]


def test_a_generator_is_fed_one_by_one(bench: Bench) -> None:
    """An element that was held back might be the one that somebody waits for before giving the next."""
    go = threading.Semaphore(0)

    def source() -> Iterator[int]:
        for number in range(3):
            yield number
            assert go.acquire(timeout=PATIENCE)

    feed = bench.feed(source())
    feed.go_on()
    for number in range(3):
        until(lambda: feed.run.fed == number + 1, "the element")
        go.release()
    until(lambda: feed.ended, "the end")


def test_only_one_takes(bench: Bench) -> None:
    entered, release = threading.Event(), threading.Event()

    def source() -> Iterator[int]:
        entered.set()
        assert release.wait(PATIENCE)
        yield from range(3)

    feed = bench.feed(source())
    feed.go_on()
    assert entered.wait(PATIENCE)
    feed.go_on()  # returns: nobody waits for whoever takes, and a generator is not entered twice
    release.set()
    until(lambda: feed.ended, "the end")
    assert feed.run.fed == 3 and feed.error is None


@pytest.mark.parametrize("items", [list(range(10)), [[n] for n in range(10)]])
@pytest.mark.parametrize("plain", [False, True])
def test_chunks(bench: Bench, items: list[Any], plain: bool) -> None:
    worker = bench.office.worker(2)
    feed = bench.feed(items, ahead=100, plain=plain, chunk=4)
    feed.go_on()
    until(lambda: feed.ended, "the end")
    assert feed.run.fed == 3
    assert [deliver(feed, worker, bench.office) for _ in range(3)] == [items[:4], items[4:8], items[8:]]
    assert feed.finished


# -- the end ---------------------------------------------------------------------------------------------------------


def test_finished_is_delivered_and_ended(bench: Bench) -> None:
    feed = bench.feed([1], plain=True)
    feed.go_on()
    assert feed.ended and not feed.finished
    assert deliver(feed, bench.office.worker(2), bench.office) == 1
    assert feed.finished


@pytest.mark.parametrize("plain", [False, True])
def test_an_error_of_the_input_is_kept_for_the_consumer(bench: Bench, plain: bool) -> None:
    def source() -> Iterator[int]:
        yield 1
        raise SystemExit(3)

    feed = bench.feed(source(), plain=plain)
    feed.go_on()
    until(lambda: feed.ended, "the end")
    assert type(feed.error) is SystemExit
    if not plain:
        assert feed.run.fed == 1  # it comes after the results of what was taken before it


def test_ctrl_c_in_the_consumers_thread_is_no_error_of_the_input(bench: Bench) -> None:
    class Struck:
        def __init__(self) -> None:
            self.items: Iterator[Any] = iter([KeyboardInterrupt(), 1])

        def __iter__(self) -> Iterator[int]:
            return self

        def __next__(self) -> int:
            item = next(self.items)
            if isinstance(item, BaseException):
                raise item
            return int(item)

    feed = bench.feed(Struck(), plain=True)
    with pytest.raises(KeyboardInterrupt):
        feed.go_on()
    assert not feed.ended and nobody_takes(feed)
    feed.go_on()
    assert feed.ended and feed.error is None and feed.run.fed == 1
    feed = bench.feed(Struck())  # of a generator on a library thread: nobody has pressed anything
    feed.go_on()
    until(lambda: feed.ended, "the end")
    assert type(feed.error) is KeyboardInterrupt


@pytest.mark.parametrize("struck", ["_take", "_let_go"])
def test_ctrl_c_as_taking_begins_or_ends_leaves_it_to_nobody(bench: Bench, struck: str) -> None:
    """It came between the lock and the `try` that lets go of it: whoever asked for more waited for ever."""
    feed = bench.feed([1, 2], plain=True)
    strikes = [KeyboardInterrupt()]
    before: Any = getattr(feed, struck)

    def strike() -> None:
        if strikes:
            raise strikes.pop()
        before()

    setattr(feed, struck, strike)
    with pytest.raises(KeyboardInterrupt):
        feed.go_on()
    assert nobody_takes(feed)
    feed.go_on()
    assert feed.ended and feed.run.fed == 2


def test_what_asks_for_results_while_it_is_serialised_is_given_none(bench: Bench) -> None:
    class Asks:
        def __reduce__(self) -> tuple[Any, ...]:
            feed.go_on()
            return (int, ("7",))

    feed = bench.feed([Asks(), 2], plain=True)
    feed.go_on()
    assert feed.ended and feed.run.fed == 2 and nobody_takes(feed)


def test_an_input_that_could_not_begin(bench: Bench) -> None:
    error = OSError("x")
    feed = bench.feed([1], error=error)
    feed.go_on()
    assert feed.ended and feed.finished and feed.error is error and feed.run.fed == 0


def test_stopping_wins_over_what_is_being_taken(bench: Bench) -> None:
    entered, release, error = threading.Event(), threading.Event(), OSError("terminated")

    def source() -> Iterator[int]:
        yield 0
        entered.set()
        assert release.wait(PATIENCE)
        yield 1

    feed = bench.feed(source())
    feed.go_on()
    assert entered.wait(PATIENCE)
    bench.inputs.stop(lambda: error)
    release.set()
    until(lambda: nobody_takes(feed), "nobody takes")
    assert feed.run.fed == 1 and feed.error is error and feed.ended
    feed.stop(OSError("again"))
    assert feed.error is error


def test_stopping_wakes_the_consumer(bench: Bench) -> None:
    feed = bench.feed([], plain=True)
    looked = threading.Event()
    consumer = threading.Thread(target=lambda: feed.run.wait_until(lambda: looked.set() or feed.finished))
    consumer.start()
    assert looked.wait(PATIENCE)
    feed.stop(OSError())
    consumer.join(PATIENCE)
    assert not consumer.is_alive()


# -- nobody reads ----------------------------------------------------------------------------------------------------


def test_an_iterator_that_was_left_half_way_takes_no_more(bench: Bench) -> None:
    feed = bench.feed(itertools.count())
    feed.go_on()
    fed(feed, 4)
    feed.consumed = True
    feed.abandon()
    assert feed.ended and feed.run.closed and feed not in bench.inputs._feeds


def test_one_that_was_never_asked_runs_to_its_end_if_the_pool_is_joined(bench: Bench) -> None:
    worker, stop = bench.office.worker(2), threading.Event()
    seen: list[int] = []

    def work() -> None:
        while not stop.is_set():
            with worker.arrived:
                worker.arrived.wait_for(lambda: worker.inbox or stop.is_set(), PATIENCE)
            if worker.inbox:
                seen.append(bench.office.finish(worker))

    thread = threading.Thread(target=work)
    thread.start()
    for ordered in (True, False):
        seen.clear()
        feed = bench.feed(iter(range(30)), ordered=ordered)
        feed.go_on()
        feed.abandon()
        assert not feed.ended and feed in bench.inputs._feeds
        bench.inputs.take_rest()
        assert feed.finished
        until(lambda: len(seen) == 30, "the worker has noted the last one")
        assert sorted(seen) == list(range(30))
        assert not any(feed.run.results.values())
    stop.set()
    with worker.arrived:
        worker.arrived.notify_all()
    thread.join(PATIENCE)


def test_join_takes_the_rest_whatever_the_look_ahead_says(bench: Bench) -> None:
    for plain in (True, False):
        feed = bench.feed(iter(range(100)), plain=plain)
        feed.go_on()
        fed(feed, 4)
        bench.inputs.take_rest()
        assert feed.ended and feed.run.fed == 100


# -- all inputs of a pool --------------------------------------------------------------------------------------------


def test_a_closed_pool_lets_its_workers_go_behind_its_last_input(bench: Bench) -> None:
    one, other = bench.feed([1], plain=True), bench.feed([2], plain=True)
    one.go_on()
    bench.inputs.close()
    assert not bench.executor.shut
    other.go_on()
    assert bench.executor.shut == [False]


@pytest.mark.parametrize("end", [Feed.abandon, lambda feed: feed.stop(OSError())])
def test_the_last_one_may_end_in_any_way(bench: Bench, end: Callable[[Feed], None]) -> None:
    feed = bench.feed(itertools.count())
    feed.consumed = True
    bench.inputs.close()
    end(feed)
    assert bench.executor.shut == [False]


def test_a_pool_without_inputs_lets_them_go_at_once(bench: Bench) -> None:
    bench.inputs.close()
    assert bench.executor.shut == [False]
    bench.feed([1])
    bench.inputs.forget()
    assert not bench.inputs._feeds


def test_taking_it_all_lets_them_go_too(bench: Bench) -> None:
    bench.feed(range(10), plain=True)
    bench.inputs.close()
    bench.inputs.take_rest()
    assert bench.executor.shut and not bench.inputs._feeds


def test_a_run_of_nothing(bench: Bench) -> None:
    feed = bench.feed(())
    assert isinstance(feed.run, MapRun)
    feed.go_on()
    until(lambda: feed.finished, "the end")
    assert feed.error is None and feed.run.fed == 0
