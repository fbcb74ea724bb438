"""Channels by callbacks: what is put, what those who ask are told, and who serves them for other processes."""

from __future__ import annotations

from typing import Any

from distpool import Channel
from distpool.node import node as nodes
from distpool.refs.channelcore import Waiter
from distpool.refs.refs import LOCAL_VALUE, Outcome
from distpool.wire.frames import Kind


def item(value: Any) -> Outcome:
    return Outcome(LOCAL_VALUE, value, (), 0)


class Told:
    """What a callback was told."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []

    def __call__(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)

    @property
    def values(self) -> list[Any]:
        return [outcome.data for outcome in self.outcomes]


def put(channel: Channel, value: Any, pid: int = 0) -> tuple[Waiter, Told]:
    told = Told()
    return channel.offer(item(value), told, pid), told


def ask(channel: Channel, kind: str = "take", pid: int = 0) -> tuple[Waiter, Told]:
    told = Told()
    return channel.request(kind, told, pid), told


def requests() -> Any:
    """The server of channels of the process that this runs in."""
    handler: Any = nodes.current().handlers[Kind.CHANNEL]
    return handler.__self__
