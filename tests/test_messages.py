"""Control messages: each one travels and comes back equal; what does not fit is a ProtocolError and nothing else."""

from __future__ import annotations

import json
import types
import typing
from typing import Any

import pytest

from distpool.errors import ProtocolError
from distpool.wire import messages, pieces, structs
from distpool.wire.frames import Kind
from distpool.wire.messages import Message

MESSAGES = {**messages.MESSAGES, **pieces.MESSAGES}
KINDS = [MESSAGES[number] for number in sorted(MESSAGES)]


def sample_of(kind: Any) -> Any:
    """A value of the annotated type, as JSON gives it back."""
    if kind is Any:
        return [1, "x", None]
    arguments = typing.get_args(kind)
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return sample_of(arguments[0])
    if origin is list:
        return [sample_of(arguments[0])] * 2
    if origin is dict:
        return {"key": sample_of(arguments[1])}
    return {int: 2**40, str: "text ä", bool: True, float: 0.5}[kind]


def sample(cls: type[Message]) -> Message:
    hints = typing.get_type_hints(cls, localns={"Any": Any, "ClassVar": typing.ClassVar})  # not those of `hints`
    return cls(**{name: sample_of(hints[name]) for name in cls.FIELDS})


@pytest.mark.parametrize("cls", KINDS, ids=lambda cls: cls.__name__)
def test_round_trip(cls: type[Message]) -> None:
    message = sample(cls)
    assert cls.unpack(message.pack()) == message


@pytest.mark.parametrize("cls", KINDS, ids=lambda cls: cls.__name__)
def test_what_does_not_fit(cls: type[Message]) -> None:
    good = json.loads(sample(cls).pack())
    too_many = json.dumps([*good, 1, 2, 3]).encode()
    for bad in (b"", b"{", b"\xff\xfe", b"5", b"null", too_many, b'"' + b"x" * 50 + b'"'):
        with pytest.raises(ProtocolError):
            cls.unpack(bad)
    if good:
        required = [name for name in cls.FIELDS if not hasattr(cls, name)]
        if required:
            with pytest.raises(ProtocolError):
                cls.unpack(b"[]")


def test_fields_and_defaults() -> None:
    message = messages.Joined(["1"], 5, host="here", shares_memory=True)
    assert (message.versions, message.ospid, message.host, message.problem) == (["1"], 5, "here", "")
    assert message == messages.Joined(["1"], 5, "here", True, "") != messages.Joined(["1"], 6, "here", True)
    assert repr(messages.Blocked(1)) == "Blocked(change=1)"
    for values, named in [((), {}), ((1, 2), {}), ((1,), {"change": 2}), ((), {"other": 1})]:
        with pytest.raises(TypeError):
            messages.Blocked(*values, **named)


def test_one_kind_one_message() -> None:
    known = {**MESSAGES, **structs.MESSAGES}
    assert len(known) == len(set(known.values())) == len(MESSAGES) + len(structs.MESSAGES)
    for number, cls in known.items():
        assert cls.kind == Kind(number)
    names = {**vars(messages), **vars(pieces), **vars(structs)}
    classes = [value for value in names.values() if isinstance(value, type)]
    defined = {cls for cls in classes if issubclass(cls, Message) and cls not in (Message, structs.Packed)}
    assert defined == set(known.values()), "every message is in the table"
