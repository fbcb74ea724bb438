"""Results that came together: the scalars that consecutive calls returned, as one pickled list (layer 7).

RESULTS (leader) -> settle_values -> runs of single calls: their futures, in one go (`refs.set_values`)
                                  -> elements and spans of maps: `MapRun.settle`, `settle_many`

Settling a call by itself makes an `Outcome`, takes a lock and leaves the value to be decoded by whoever wants it:
2 us of the 5 that a tiny call then costs this process. Exact scalars run no user code when they are decoded, so the
leader may do that, for all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable
from pickle import loads
from typing import Any

from distpool.mapruns import Element
from distpool.refs.refs import LOCAL_VALUE, Outcome, set_values
from distpool.slots import Slot
from distpool.work import Call


def settle_values(
    slot: Slot, sequence: int, elements: int, data: bytes, deliver: Callable[[Any], object]
) -> tuple[Any, int]:
    """Settle `elements` calls, or elements of maps, from `sequence` on; `deliver(future)` if callbacks are left.

    Returns the timing of the last one, and how many have been settled.
    """
    values: list[Any] | None = None
    first, inflight, timing = sequence, slot.inflight, None
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
            if found is None:
                break
            entry, index, count = found
            if count == elements:
                entry.settle_many(index, count, data)
            else:
                values = loads(data) if values is None else values
                entry.settle_many(index, count, values[sequence - first : sequence - first + count])
        timing = entry.timing
        slot.done += count
        sequence += count
    return timing, sequence - first


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
            slot.stop_clock()
        if call.buffers:
            call.release()
    for index in set_values(futures, values):
        future = futures[index]
        if future._settle(Outcome(LOCAL_VALUE, values[index], (), slot.pid)):
            deliver(future)


__all__ = ["settle_values"]
