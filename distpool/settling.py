"""What RESULTS frames say becomes the outcomes of calls and elements (layer 7).

RESULTS (leader) -> settle_alone: the answer to a lonely call; what is anything else goes on
RESULTS, journal (leader) -> settle_records -> one record: Call or Element.settle(outcome)
                                            -> a list of scalars -> settle_values -> futures in one go, spans of maps

Scalars that consecutive calls returned come as one pickled list. Settling a call by itself makes an `Outcome`, takes a
lock and leaves the value to be decoded by whoever wants it: 2 us of the 5 that a tiny call then costs this process.
Exact scalars run no user code when they are decoded, so the leader may do that, for all of them at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pickle import loads

from distpool.hints import TYPE_CHECKING, Any
from distpool.mapruns import Element
from distpool.refs.lent import carries_references, received
from distpool.refs.refs import LOCAL_VALUE, RAISED_HERE, Outcome, set_values
from distpool.slots import Slot
from distpool.soon import cannot_wait, open_soon
from distpool.wire import records
from distpool.wire.frames import Frame
from distpool.wire.records import ENTRUSTED
from distpool.work import Call

if TYPE_CHECKING:
    from distpool.scheduling import Scheduler

_SIZE = records.RESULT.size


def settle_alone(slot: Slot, frame: Frame) -> Any:
    """Settle the only call of a worker if it returned a scalar: without what others need. Its timing, or None."""
    body = frame.body
    if slot.load != 1 or frame.buffers or slot.early or slot.member.tracer is not None or len(body) < _SIZE:
        return None
    sequence, elements, length, _, status = records.RESULT.unpack_from(body)
    call = slot.inflight.get(sequence)
    if status != records.VALUES or elements != 1 or len(body) != _SIZE + length or type(call) is not Call:
        return None
    if call.policy is not None or call.buffers or set_values([call.future], loads(body[_SIZE:])):
        return None  # somebody listens, so there is more to do
    del slot.inflight[sequence]
    slot.since = time.monotonic()
    slot.load -= 1  # and not 0: a submitting thread may have sent another call meanwhile
    slot.done += 1
    slot.recent = True
    return call.function


def settle_records(scheduler: Scheduler, slot: Slot, body: Any, raw_buffers: list[Any]) -> Any:
    """Settle what these records say; returns the timing of the last one."""
    pid = slot.pid
    slot.since = time.monotonic()
    if slot.member.tracer is not None:
        slot.member.tracer.answered(pid, body)
    timing = None
    buffers = slot.open(raw_buffers) if raw_buffers else []
    if slot.early:
        body = scheduler.reclaims.without_early(slot, body, buffers)
    done = 0
    for sequence, elements, status, payload, parts in records.result_records(body):
        if status == records.VALUES:
            last, count = settle_values(slot, sequence, elements, bytes(payload), scheduler.deliver)
            timing = last or timing
            done += count
            continue
        if status & ENTRUSTED:
            status, payload = status & ~ENTRUSTED, take_over(slot, payload)
        found = slot.find(sequence)
        if found is None:
            slot.stop_clock(sequence)
            received(status, bytes(payload), buffers[:parts], pid)  # nobody wants it: not opened
            del buffers[:parts]
            continue
        entry, index = found
        done += 1
        timing = entry.timing
        outcome: Any
        data = bytes(payload)
        held = status == records.VALUE and cannot_wait(data)
        if type(entry) is Call:
            outcome = received(status, data, buffers[:parts], pid)
            if status == records.UNLOADABLE and scheduler.on_unloadable is not None:
                outcome = Outcome(RAISED_HERE, scheduler.on_unloadable(outcome.data), (), pid)
            policy = entry.policy
            if policy is not None:
                slot.stop_clock(sequence)
                if status != records.VALUE and entry.attempt < policy.retries:
                    scheduler.retries.consider(entry, outcome)
                    continue
        else:
            plain = status == records.VALUE and not (parts or held) and not carries_references(data)
            outcome = data if plain else received(status, data, buffers[:parts], pid)
        del buffers[:parts]
        scheduler.settle(entry, index, open_soon(scheduler, entry, outcome) if held else outcome)
        slot.count(status)
    slot.load -= done
    slot.recent = True
    return timing


def take_over(slot: Slot, payload: Any) -> Any:
    """References in a result are ours now, and not the worker's any more. Returns the payload proper."""
    rows, payload = records.split_entrusted(payload)
    if not slot.bereft:
        slot.member.group.node.references().take_over(slot.pid, rows)
    return payload


def settle_values(
    slot: Slot, sequence: int, elements: int, data: bytes, deliver: Callable[[Any], object]
) -> tuple[Any, int]:
    """Settle `elements` calls, or elements of maps, from `sequence` on; `deliver(future)` if callbacks are left.

    Returns the timing of the last one, and how many have been settled.
    """
    values: list[Any] | None = None
    first, inflight, timing, settled = sequence, slot.inflight, None, 0
    end = sequence + elements
    while sequence < end:
        entry = inflight.get(sequence)
        if type(entry) is Call:
            values = loads(data) if values is None else values
            calls = _take_calls(inflight, sequence, end)
            _settle_calls(slot, calls, values[sequence - first : sequence - first + len(calls)], deliver)
            count = len(calls)
        elif type(entry) is Element:
            values = loads(data) if values is None else values
            del inflight[sequence]
            entry.settle(0, Outcome(LOCAL_VALUE, values[sequence - first], (), slot.pid))
            count = 1
        else:
            found = slot.find_many(sequence, end - sequence)
            if found is None:  # somebody's who has given the worker back since; those behind it may be ours
                slot.stop_clock(sequence)
                sequence += 1
                continue
            entry, index, count = found
            if count == elements:
                entry.settle_many(index, count, data)
            else:
                values = loads(data) if values is None else values
                entry.settle_many(index, count, values[sequence - first : sequence - first + count])
        timing = entry.timing
        slot.done += count
        sequence += count
        settled += count
    return timing, settled


def _take_calls(inflight: dict[int, Any], sequence: int, end: int) -> list[Call]:
    calls: list[Call] = []
    while sequence < end and type(entry := inflight.get(sequence)) is Call:
        del inflight[sequence]
        calls.append(entry)
        sequence += 1
    return calls


def _settle_calls(slot: Slot, calls: list[Call], values: list[Any], deliver: Callable[[Any], object]) -> None:
    futures = []
    for call in calls:
        futures.append(call.future)
        if call.policy is not None:
            slot.stop_clock(call.sequence)
        if call.buffers:
            call.release()
    for index in set_values(futures, values):
        future = futures[index]
        if future._settle(Outcome(LOCAL_VALUE, values[index], (), slot.pid)):
            deliver(future)


__all__ = ["settle_alone", "settle_records", "settle_values", "take_over"]
