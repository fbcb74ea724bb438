"""`ResultWriter`: what is in the journal when, what a frame says, and what waits for the kernel."""

from __future__ import annotations

import math
import os
import pickle
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from wires import PATIENCE, until

from distpool import config
from distpool.node.results import ResultWriter
from distpool.transport.journal import Journal
from distpool.wire import codec, messages
from distpool.wire.failures import decode_exception
from distpool.wire.frames import Kind


class FakeLink:
    """Keeps frames; `idle` is whether the kernel has them."""

    peer = 1

    def __init__(self) -> None:
        self.loop = SimpleNamespace(leads=False)
        self.frames: list[tuple[int, float, int, list[tuple[int, int, int, Any]], list[Any]]] = []
        self.idle = True
        self.drains = 0
        self.on_drain: Callable[[], bool] = lambda: True

    def send(self, kind: Kind, control: bytes, body: bytes, buffers: Any = ()) -> bool:
        assert kind is Kind.RESULTS
        offset, busy, ran = messages.RESULTS.unpack(control)
        found = [(s, n, status, bytes(payload)) for s, n, status, payload, _ in messages.result_records(body)]
        self.frames.append((offset, busy, ran, found, list(buffers)))
        return True

    def drain(self, timeout: float | None = None) -> bool:
        self.drains += 1
        return self.on_drain()

    def values(self) -> dict[int, Any]:
        """All values that were sent; each once."""
        seen: dict[int, Any] = {}
        for _, _, _, records, buffers in self.frames:
            for sequence, count, status, payload in records:
                assert status in (messages.VALUE, messages.VALUES)
                value = codec.decode(payload, buffers)
                new = dict(enumerate(value, sequence)) if status == messages.VALUES else {sequence: value}
                assert len(new) == count and not set(new) & set(seen)
                seen.update(new)
        return seen


def values_in(body: bytes) -> list[tuple[int, Any]]:
    """Sequence numbers and values of single records."""
    return [(sequence, pickle.loads(payload)) for sequence, _, _, payload, _ in messages.result_records(body)]


class Desk:
    def __init__(self, journal: Journal) -> None:
        self.link = FakeLink()
        self.journal = journal
        self.writer = ResultWriter(self.link, journal, SimpleNamespace(stage=self.stage))  # type: ignore[arg-type]

    @staticmethod
    def stage(buffer: Any) -> Any:
        return "staged", bytes(buffer)

    def journaled(self) -> list[int]:
        """Sequence numbers of what the master would find if this process were killed now."""
        return [record[0] for record in messages.result_records(self.journal.read_from(0))]


@pytest.fixture
def desk() -> Iterator[Desk]:
    journal = Journal.create()
    yield Desk(journal)
    journal.close()


@pytest.fixture
def remote() -> Iterator[Desk]:
    """The master sees nothing of the journal."""
    journal = Journal.private()
    yield Desk(journal)
    journal.close()


def test_a_result_is_in_the_journal_at_once_and_sent_by_a_flush(desk: Desk) -> None:
    desk.writer.succeed(5, [1, 2])
    assert desk.journaled() == [5] and desk.writer.unsent and not desk.link.frames
    desk.writer.flush()
    assert not desk.writer.unsent and desk.link.values() == {5: [1, 2]}
    assert desk.link.frames[0][0] == desk.journal.written, "so that the master knows from where on to read"
    desk.writer.flush()
    assert len(desk.link.frames) == 1, "nothing new: no frame"


def test_results_of_a_map_wait_longer_the_longer_it_runs(desk: Desk) -> None:
    desk.writer.rested = time.perf_counter()
    assert desk.writer.pause() == config.FLUSH_SECONDS, "the first ones come soon"
    desk.writer.rested = time.perf_counter() - 0.2
    assert desk.writer.pause() == pytest.approx(0.0125, rel=0.2)
    desk.writer.rested = 0.0
    assert desk.writer.pause() == config.LONG_WINDOW_SECONDS / 4


def test_consecutive_scalars_go_as_one_list(desk: Desk) -> None:
    for number, value in enumerate([1, "two", None, b"4", True, 0.5]):
        desk.writer.scalar(10 + number, value)
    assert desk.journaled() == [10, 11, 12, 13, 14, 15], "as records of their own, whatever kills this process"
    desk.writer.flush()
    [(_, _, _, records, _)] = desk.link.frames
    assert [record[:3] for record in records] == [(10, 6, messages.VALUES)]
    assert pickle.loads(records[0][3]) == [1, "two", None, b"4", True, 0.5]


NUMBERS = [
    *(0, -1, 255, -(2**63), 2**63 - 1, 2**63, -(2**63) - 1, 10**40),
    *(0.0, -0.0, 1.5, -1e300, 5e-324, math.inf, math.nan),
]


def test_numbers_are_results_like_others(desk: Desk) -> None:
    for number, value in enumerate(NUMBERS):
        desk.writer.number(10 + number, value)
        assert len(desk.journaled()) == number + 1, "at once"
    desk.writer.scalar(10 + len(NUMBERS), "and others behind them")
    desk.writer.number(11 + len(NUMBERS), 3)
    sent = [*NUMBERS, "and others behind them", 3]
    # By their texts, which tell apart what `==` does not.
    assert repr(values_in(desk.journal.read_from(0))) == repr(list(enumerate(sent, 10)))
    desk.writer.flush()
    [(_, _, _, [record], _)] = desk.link.frames
    assert record[:3] == (10, len(sent), messages.VALUES) and repr(pickle.loads(record[3])) == repr(sent)


def test_numbers_where_the_ring_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "JOURNAL_SIZE", 5_003)  # no number of records fills it
    journal = Journal.create()
    desk = Desk(journal)
    chance = random.Random(7)
    unsent: list[tuple[int, Any]] = []
    offset = 0
    for number in range(3_000):
        value = chance.choice([number, number / 2, 2**64 + number])
        frames = len(desk.link.frames)
        desk.writer.number(number, value)
        if len(desk.link.frames) > frames:  # it was full
            unsent, offset = [], desk.link.frames[-1][0]
        unsent.append((number, value))
        assert values_in(journal.read_from(offset)) == unsent
        if chance.random() < 0.02:
            desk.writer.flush()
            unsent, offset = [], journal.written
    desk.writer.flush()
    assert len(desk.link.values()) == 3_000 and journal.written > 10 * journal.capacity
    journal.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_numbers_of_a_process_that_is_killed() -> None:
    chance = random.Random()
    ended = 0
    for _ in range(100):
        journal = Journal.create()
        here, there = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                desk = Desk(Journal.attach(journal.path, journal.size))
                os.write(there, b"!")
                for number in range(1, 5_000):  # fewer than the ring holds
                    desk.journal.set_started(number)
                    desk.writer.number(number, number if number % 2 else number / 4)
                time.sleep(60)
            finally:
                os._exit(1)
        assert os.read(here, 1) == b"!"
        threading.Event().wait(chance.random() * 0.008)
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        os.close(here)
        os.close(there)
        found = values_in(journal.read_from(0))
        assert found == [(n, n if n % 2 else n / 4) for n in range(1, len(found) + 1)], "whole, and without a gap"
        assert journal.started - len(found) in (0, 1)
        ended += len(found)
        journal.close()
    assert ended > 100


def test_what_does_not_continue_the_list_sends_it(desk: Desk) -> None:
    desk.writer.scalar(1, "a")
    desk.writer.scalar(3, "b")
    assert desk.link.values() == {1: "a"}
    desk.writer.succeed(4, ["c"])
    desk.writer.fail(5, ValueError("d"))
    assert desk.link.values() == {1: "a", 3: "b"}
    desk.writer.scalar(6, "e")  # behind records that wait: the list must not overtake them
    assert [record[0] for record in desk.link.frames[-1][3]] == [4, 5]
    desk.writer.flush()
    assert desk.link.frames[-1][3][0][0] == 6


def test_time_and_number_of_calls_are_told_once(desk: Desk) -> None:
    desk.writer.busy, desk.writer.ran = 1.5, 3
    desk.writer.scalar(1, 1)
    desk.writer.flush()
    desk.writer.scalar(2, 2)
    desk.writer.flush()
    assert [frame[1:3] for frame in desk.link.frames] == [(1.5, 3), (0.0, 0)]


def test_the_journal_is_written_over_only_when_the_kernel_has_it(desk: Desk) -> None:
    desk.link.idle = False
    desk.writer.scalar(1, 1)
    desk.writer.flush()
    assert desk.journal.pending(), "it would be lost with this process"
    desk.link.idle = True
    desk.writer.scalar(2, 2)
    desk.writer.flush()
    assert not desk.journal.pending()


def test_a_full_journal_waits_for_the_kernel(desk: Desk) -> None:
    desk.link.idle = False

    def drained() -> bool:
        desk.link.idle = True
        return True

    desk.link.on_drain = drained
    size = config.JOURNAL_SIZE // 8
    for number in range(20):
        desk.writer.succeed(number, [b"x" * size])
        if not desk.link.drains:
            assert len(desk.journaled()) == number + 1, "nothing is written over"
    assert desk.link.drains
    desk.writer.flush()
    assert desk.link.values() == {number: [b"x" * size] for number in range(20)}


def test_a_large_result_is_out_before_the_next_call(desk: Desk) -> None:
    desk.writer.scalar(1, 1)
    desk.writer.succeed(2, [b"x" * (config.JOURNAL_SIZE // 4)])
    assert list(desk.link.values()) == [1, 2] and desk.link.drains == 1, "in order"
    offsets = [frame[0] for frame in desk.link.frames]
    assert offsets[0] == offsets[1] == desk.journal.written, "it is not in the journal"
    assert desk.link.frames[1][1:3] == (0.0, 0)


def test_a_large_scalar_is_a_result_like_any_other(desk: Desk) -> None:
    desk.writer.scalar(1, "x" * (config.JOURNAL_SIZE // 4))
    assert list(desk.link.values()) == [1] and desk.journaled() == []


def test_buffers_are_staged_and_sent_at_once(desk: Desk) -> None:
    desk.writer.succeed(1, pickle.PickleBuffer(bytearray(b"y" * (1 << 21))))
    [(_, _, _, [(sequence, _, status, _)], buffers)] = desk.link.frames
    assert (sequence, status) == (1, messages.VALUE) and buffers == [("staged", b"y" * (1 << 21))]
    assert desk.link.drains == 1


def test_where_nobody_sees_the_journal_each_result_is_out_at_once(remote: Desk) -> None:
    remote.writer.scalar(1, 1)
    remote.writer.succeed(2, [2])
    remote.writer.number(3, 3)
    assert remote.link.values() == {1: 1, 2: [2], 3: 3} and remote.link.drains == 3


def failure(desk: Desk) -> tuple[int, BaseException]:
    desk.writer.flush()
    [(_, _, status, payload)] = desk.link.frames[-1][3]
    return status, decode_exception(payload, 2)


def test_errors_have_their_status(desk: Desk) -> None:
    desk.writer.fail(1, KeyError("x"))
    status, error = failure(desk)
    assert status == messages.ERROR and type(error) is KeyError and error.args == ("x",)
    desk.writer.fail(2, ValueError("y"), messages.UNLOADABLE)
    assert failure(desk)[0] == messages.UNLOADABLE


class Stubborn:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("no"), SystemExit(4), KeyboardInterrupt()], ids=repr)
def test_a_value_that_cannot_be_sent_is_an_error_of_its_own_kind(desk: Desk, error: BaseException) -> None:
    desk.writer.succeed(1, Stubborn(error))
    status, _ = failure(desk)
    assert status == messages.UNSENDABLE
    desk.writer.scalar(2, 2)
    desk.writer.flush()
    assert desk.link.frames[-1][3][0][0] == 2, "the next one is not hurt"


def test_the_interrupt_of_a_process_that_is_removed_is_no_outcome(desk: Desk) -> None:
    desk.writer.fail(1, KeyboardInterrupt())
    desk.writer.ousted = True
    desk.writer.fail(2, KeyboardInterrupt())
    desk.writer.fail(3, ValueError())
    desk.writer.succeed(4, "saved")
    assert desk.journaled() == [1, 3, 4], "that of the user is one, and so is what a call makes of the interrupt"


def test_a_value_that_cannot_be_sent_is_named(desk: Desk) -> None:
    desk.writer.pid = 7
    text = "the result of math.sqrt on worker 7, an object of type _thread.lock, cannot be serialised: TypeError"
    desk.writer.succeed(1, threading.Lock(), math.sqrt)
    assert str(failure(desk)[1]).startswith(text)
    desk.writer.succeed(2, [1, threading.Lock()], math.sqrt, many=True)
    assert str(failure(desk)[1]).startswith(text), "it is one of several results"


def test_a_memory_error_says_which_limit_it_met(desk: Desk) -> None:
    desk.writer.memory_limit, desk.writer.pid = 1 << 20, 7
    desk.writer.fail(1, MemoryError("array"))
    error = failure(desk)[1]
    assert type(error) is MemoryError and "memory_limit=1048576" in str(error) and "worker 7" in str(error)
    assert "array" in str(error)
    desk.writer.fail(2, ValueError("array"))
    assert failure(desk)[1].args == ("array",)


def test_without_a_limit_a_memory_error_is_left_alone(desk: Desk) -> None:
    desk.writer.fail(1, MemoryError("array"))
    assert failure(desk)[1].args == ("array",)


def test_threads_lose_nothing_and_send_nothing_twice(desk: Desk) -> None:
    """Helpers, the main thread, and the I/O thread's flushes."""
    over = threading.Event()

    def produce(first: int) -> None:
        for number in range(first, first + 500):
            if number % 7 == 3:
                desk.writer.succeed(number, [number])
            elif number % 7 == 5:
                desk.writer.scalar(number, number)
            else:
                desk.writer.number(number, number)

    def flush() -> None:
        while not over.is_set():
            desk.writer.flush()

    producers = [threading.Thread(target=produce, args=(first,)) for first in (0, 1000, 2000)]
    flusher = threading.Thread(target=flush)
    for thread in (*producers, flusher):
        thread.start()
    for thread in producers:
        thread.join(PATIENCE)
    over.set()
    flusher.join(PATIENCE)
    desk.writer.flush()
    values = desk.link.values()
    assert set(values) == {first + number for first in (0, 1000, 2000) for number in range(500)}
    assert all(value in (number, [number]) for number, value in values.items())
    ends = [frame[0] for frame in desk.link.frames]
    assert ends == sorted(ends), "in the order of the journal"
    until(lambda: not desk.writer.unsent, "all sent")
