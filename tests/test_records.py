"""Records of the hot path: they come back as they were sent, and truncated ones are a ProtocolError."""

from __future__ import annotations

import random

import pytest

from distpool.errors import ProtocolError
from distpool.wire import messages, records
from distpool.wire.records import CALL, RESULT, call_records, result_records


def call(number: int, elements: int, payload: bytes, buffers: int = 0, flags: int = records.ONE) -> bytes:
    return CALL.pack(number, elements, len(payload), buffers, flags) + payload


def result(sequence: int, payload: bytes, status: int = records.VALUE, buffers: int = 0) -> bytes:
    return RESULT.pack(sequence, 1, len(payload), buffers, status) + payload


def test_calls_take_as_many_numbers_as_they_have_elements() -> None:
    body = call(1, 1, b"a") + call(2, 10, b"", flags=records.SPAN) + call(3, 1, b"ccc", buffers=2)
    assert list(call_records(body, 100, 3)) == [
        (100, 1, 1, records.ONE, b"a", 0),
        (101, 2, 10, records.SPAN, b"", 0),
        (111, 3, 1, records.ONE, b"ccc", 2),
    ]
    assert list(call_records(b"", 5, 0)) == []


def test_results() -> None:
    body = result(5, b"five") + result(6, b"", records.ERROR) + result(2**40, b"x", records.UNSENDABLE, 3)
    for form in (body, memoryview(body), bytearray(body)):
        found = [(s, e, status, bytes(p), b) for s, e, status, p, b in result_records(form)]
        assert found == [
            (5, 1, records.VALUE, b"five", 0),
            (6, 1, records.ERROR, b"", 0),
            (2**40, 1, records.UNSENDABLE, b"x", 3),
        ]


def test_truncated_records() -> None:
    calls, results = call(1, 1, b"payload") * 2, result(1, b"payload") * 2
    for cut in range(1, len(calls)):
        with pytest.raises(ProtocolError):
            list(call_records(calls[:cut], 1, 2))
    for cut in range(1, len(results)):
        if cut == len(results) // 2:
            continue
        with pytest.raises(ProtocolError):
            list(result_records(results[:cut]))


def test_noise() -> None:
    chance = random.Random(2)
    for _ in range(2000):
        noise = chance.randbytes(chance.randint(0, 100))
        for found in (call_records(noise, 1, 3), result_records(noise)):
            try:
                list(found)
            except ProtocolError:
                pass


def test_flags_and_states_are_distinct() -> None:
    flags = [records.ONE, records.SPAN, records.SPAN_OF_SCALARS, records.CHUNK, records.CHUNK_OF_SCALARS]
    assert len({*flags, records.ONE_FRESH}) == 6
    assert len({records.VALUE, records.ERROR, records.VALUES, records.UNSENDABLE}) == 4


def test_sizes_on_the_wire() -> None:
    """Other builds of the same protocol version read them: a field more is a new version."""
    structs = (records.CALLS, records.CALL, records.RESULTS, records.RESULT, records.SEQUENCE, records.TIMED)
    assert [struct.size for struct in structs] == [12, 19, 20, 23, 8, 33]
    assert all(struct.format.startswith("<") for struct in structs), "no padding, the same on every machine"


def test_a_record_that_claims_more_than_there_is() -> None:
    """Lengths come from the other side: nothing is allocated for them."""
    with pytest.raises(ProtocolError):
        list(call_records(CALL.pack(1, 1, 1 << 60, 0, records.ONE), 1, 1))
    with pytest.raises(ProtocolError):
        list(result_records(RESULT.pack(1, 1, 1 << 60, 0, records.VALUE)))
    with pytest.raises(ProtocolError):
        list(call_records(b"", 1, 1 << 30))


def test_messages_offer_the_same_records() -> None:
    assert messages.call_records is call_records and messages.CALL is CALL and messages.RESULT is RESULT
