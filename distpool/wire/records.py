"""What frames of the hot path hold: fixed records, packed by hand (layer 1).

    CALLS    control: first sequence number, how many records; body: records  CALL | payload
    RESULTS  control: journal offset, busy seconds, calls run;  body: records  RESULT | payload

Calls of one link carry consecutive sequence numbers, so that "which call had started when the worker died" is one
number. A record may stand for `count` consecutive elements of a map: then it takes as many sequence numbers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from distpool.errors import ProtocolError
from distpool.hints import Any

CALLS = struct.Struct("<QI")  # first sequence number, number of records
CALL = struct.Struct("<IIQHB")  # function number, elements, payload bytes, buffers, flags
RESULTS = struct.Struct("<QdI")  # absolute journal offset behind these records, seconds of running time, calls run
RESULT = struct.Struct("<QIQHB")  # sequence number, elements, payload bytes, buffers, status
INT_RESULT = struct.Struct("<QIQHBIqB")  # a RESULT with its payload: see INT_PICKLE
FLOAT_RESULT = struct.Struct("<QIQHBHB"), struct.Struct(">dB")  # the same; pickles have floats the other way round
SEQUENCE = struct.Struct("<Q")
TIMED = struct.Struct("<QIIqqB")  # sequence number, element of a chunk, lane, begin and duration in ns, how it ended

#: Flags of a CALL record.
ONE, SPAN = 0, 1  # one call: payload is (args, kwargs) · a list of argument tuples, one call each
SPAN_OF_SCALARS = 2  # a list of single arguments, one call each
CHUNK = 3  # a list of argument tuples that succeed or fail together (the stdlib's chunk)
CHUNK_OF_SCALARS = 4
ONE_FRESH = 5  # as ONE, with a function that captured something mutable: decoded anew for each call
SPANS = (SPAN, SPAN_OF_SCALARS)  # of which each element has a result of its own
CHUNKS = (CHUNK, CHUNK_OF_SCALARS)  # which have one result
MAPPED = (*SPANS, *CHUNKS)  # what maps send
#: Status of a RESULT record. UNSENDABLE: the call returned, but its value could not be serialised.
#: UNLOADABLE: the function or its arguments could not be rebuilt on the worker.
VALUE, ERROR, VALUES, UNSENDABLE, PLAIN_ERROR, UNLOADABLE = range(6)
#: What makes a pickle of the eight bytes of a number: length of the whole, PROTO 5, LONG1 of eight bytes (for up to 64
#: bits) or BINFLOAT, and STOP. For a number by itself the pickler takes twice as long.
INT_PICKLE = 13, 0x088A0580
FLOAT_PICKLE = 12, 0x0580, ord("G")
STOP = ord(".")
#: Added to a status: before the payload stand the references in it that third processes own (`pack_entrusted`).
ENTRUSTED = 0x80
_COUNT = struct.Struct("<I")
_ENTRUSTED = struct.Struct("<IIQ")  # owner, and the reference's identity: who made it, its number there

Rows = list[tuple[int, int, int]]


def pack_entrusted(rows: Rows) -> bytes:
    """What stands before the payload of an ENTRUSTED record."""
    return _COUNT.pack(len(rows)) + b"".join(_ENTRUSTED.pack(*row) for row in rows)


def split_entrusted(payload: Any) -> tuple[Rows, Any]:
    """The references of an ENTRUSTED record, and the payload proper."""
    if len(payload) < _COUNT.size:
        raise ProtocolError("a result is shorter than it says")
    (count,) = _COUNT.unpack_from(payload)
    stop = _COUNT.size + count * _ENTRUSTED.size
    if stop > len(payload):
        raise ProtocolError("a result is shorter than its references say")
    return list(_ENTRUSTED.iter_unpack(payload[_COUNT.size : stop])), payload[stop:]


def call_records(body: bytes, first: int, count: int) -> Iterator[tuple[int, int, int, int, bytes, int]]:
    """Yield `(sequence number, function number, elements, flags, payload, buffers)` of a CALLS body."""
    offset, sequence, end = 0, first, len(body)
    for _ in range(count):
        if end - offset < CALL.size:
            raise ProtocolError("CALLS is shorter than its records say")
        number, elements, length, buffers, flags = CALL.unpack_from(body, offset)
        offset += CALL.size
        if end - offset < length:
            raise ProtocolError("CALLS is shorter than its records say")
        yield sequence, number, elements, flags, body[offset : offset + length], buffers
        offset += length
        sequence += elements


def result_records(body: Any) -> Iterator[tuple[int, int, int, Any, int]]:
    """Yield `(sequence number, elements, status, payload, buffers)` of a RESULTS body (or of a journal)."""
    unpack, size = RESULT.unpack_from, RESULT.size
    offset, end = 0, len(body)
    while offset < end:
        if end - offset < size:
            raise ProtocolError("RESULTS is shorter than its records say")
        sequence, elements, length, buffers, status = unpack(body, offset)
        offset += size
        stop = offset + length
        if stop > end:
            raise ProtocolError("RESULTS is shorter than its records say")
        yield sequence, elements, status, body[offset:stop], buffers
        offset = stop
