"""Policies, and what becomes of single calls when they are put back."""

from __future__ import annotations

import collections
from typing import Any

import pytest
from fakes import FakeWorker, Office

from distpool.slots import Slot
from distpool.transport.journal import Journal
from distpool.wire import codec, messages
from distpool.work import Call, Policy, is_plain, plain_record, release_all


@pytest.mark.parametrize(
    "check, error, expected",
    [
        (None, ValueError(), True),
        (None, SystemExit(), False),
        (None, KeyboardInterrupt(), False),
        (OSError, FileNotFoundError(), True),
        (OSError, ValueError(), False),
        ((OSError, KeyError), KeyError(), True),
        ((), ValueError(), False),
        (lambda error: "yes" in str(error), ValueError("yes"), True),
        (lambda error: [], ValueError("yes"), False),
        (BaseException, SystemExit(), True),
    ],
)
def test_may_retry(check: Any, error: BaseException, expected: bool) -> None:
    assert Policy(retries=1, retry_check=check).may_retry(error) is expected


def test_delays_are_used_in_order_and_the_last_one_again() -> None:
    policy = Policy(retries=4, retry_delays=(0.5, 2.0))
    assert [policy.delay(attempt) for attempt in (1, 2, 3, 4)] == [0.5, 2.0, 2.0, 2.0]
    assert Policy(retries=3).delay(1) == 0.0 and Policy(retries=3, retry_delays=()).delay(1) == 0.0


def test_plain() -> None:
    assert Policy().plain and Policy(label="x").plain
    for policy in (Policy(timeout=1), Policy(retries=1), Policy(pids=frozenset([2]))):
        assert not policy.plain


class Buffer:
    def __init__(self) -> None:
        self.released = 0

    def release(self) -> None:
        self.released += 1


def test_buffers_are_given_back_once_and_not_before_the_end() -> None:
    office = Office()
    future = office.submit(1)
    call: Any = future._call
    assert isinstance(call, Call)
    buffer = Buffer()
    call.buffers = [buffer]
    queue: collections.deque[Any] = collections.deque()
    call.put_back(0, 1, queue)
    assert list(queue) == [call] and buffer.released == 0, "it will be sent again"
    call.cancelled = True
    call.put_back(0, 1, queue)
    assert len(queue) == 1 and buffer.released == 1
    call.release()
    assert buffer.released == 1
    office.close()


def test_views_of_the_user_are_not_released() -> None:
    view, buffer = memoryview(b"abc"), Buffer()
    release_all([view, buffer, b"bytes"])
    assert bytes(view) == b"abc" and buffer.released == 1


@pytest.mark.parametrize(
    "arguments, plain",
    [
        ((), True),
        ((1, 2.5, "text", b"bytes", True, None), True),
        (("x" * 1024,), True),
        (("x" * 1025,), False),
        ((b"x" * 1025,), False),
        (([],), False),
        ((Policy,), False),
        ((type("Int", (int,), {})(1),), False),
    ],
)
def test_plain_arguments(arguments: tuple[Any, ...], plain: bool) -> None:
    assert is_plain(arguments) is plain


def test_plain_calls_share_a_record() -> None:
    office = Office()
    function = office.node.encoder.encode(office.default)
    calls = [Call(office.scheduler, function, b"", [], None, None, (number, "x")) for number in range(3)]
    one, many = plain_record(calls[:1]), plain_record(calls)
    ((sequence, number, elements, flags, payload, _),) = messages.call_records(one, 5, 1)
    assert (sequence, number, elements, flags) == (5, function.number, 1, messages.ONE)
    assert codec.decode_args(payload) == ((0, "x"), {})
    ((_, _, elements, flags, payload, _),) = messages.call_records(many, 5, 1)
    assert (elements, flags) == (3, messages.SPAN) and codec.decode(payload) == [(0, "x"), (1, "x"), (2, "x")]
    office.close()


def test_a_call_whose_worker_is_gone_does_not_run() -> None:
    """It may wait for its next attempt meanwhile, and the journal of the worker is closed."""
    journal = Journal.private()
    slot: Any = Slot(FakeWorker(2, journal=False))  # type: ignore[arg-type]
    slot.member.journal = journal
    call: Any = Call(None, None, b"", [], None, None)  # type: ignore[arg-type]
    call.slot, call.sequence = slot, 1
    journal.set_started(1)
    assert call.started()
    journal.close()
    assert not call.started()
    slot.gone = True
    assert not call.started()
