"""Julia's verbs: what each does with each sort of thing, and what goes through to the methods."""

from __future__ import annotations

import concurrent.futures
import socket
from typing import Any

import pytest
from wires import ends

from distpool import Channel, Future, RemoteChannel
from distpool.node import node as nodes
from distpool.refs.owner import RRID
from distpool.verbs import (
    channel_from_id,
    fetch,
    finalize,
    isready,
    put,
    remoteref_id,
    take,
    wait,
    worker_id_from_socket,
)


class Noting:
    """A reference of a user's own: notes how its methods are called."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)

        def method(*args: Any, **kwargs: Any) -> str:
            self.calls.append((name, args, kwargs))
            return name

        return method


def test_arguments_go_through_and_a_time_limit_only_if_there_is_one() -> None:
    """Channels of a user's own may know none."""
    ref = Noting()
    for verb, args in ((fetch, ("k",)), (put, ("k", "v")), (take, ("k",))):
        assert verb(ref, *args) == verb.__name__
        assert verb(ref, *args, timeout=0) == verb.__name__
    assert wait(ref, "k") is ref and wait(ref, "k", timeout=0) is ref
    assert isready(ref, "k") is True
    assert finalize(ref) is None
    assert ref.calls == [
        *(("fetch", ("k",), {}), ("fetch", ("k",), {"timeout": 0})),
        *(("put", ("k", "v"), {}), ("put", ("k", "v"), {"timeout": 0})),
        *(("take", ("k",), {}), ("take", ("k",), {"timeout": 0})),
        *(("wait", ("k",), {}), ("wait", ("k",), {"timeout": 0})),
        ("isready", ("k",), {}),
        ("finalize", (), {}),
    ]


@pytest.mark.parametrize("value", [None, 3, "text", [1], object])
def test_anything_else_is_its_own_value(value: Any) -> None:
    assert fetch(value) is value


@pytest.mark.parametrize("kind", [concurrent.futures.Future, Future])
def test_futures_of_both_sorts(kind: Any) -> None:
    future = kind()
    assert not isready(future)
    for verb in (fetch, wait):
        with pytest.raises(TimeoutError):
            verb(future, timeout=0)
    future.set_result(None)
    assert isready(future) is True and fetch(future) is None and wait(future) is future
    failed = kind()
    failed.set_exception(KeyError("x"))
    assert isready(failed)
    for verb in (fetch, wait):
        with pytest.raises(KeyError):
            verb(failed)


def test_a_future_is_set_once_and_never_taken_from() -> None:
    future: Future[int] = Future()
    assert put(future, 1) is future
    with pytest.raises(RuntimeError, match="only once"):
        put(future, 2)
    with pytest.raises(TypeError, match="use fetch"):
        take(future)


@pytest.mark.parametrize("kind", [Channel, RemoteChannel])
def test_channels(kind: Any) -> None:
    channel: Any = Channel(1) if kind is Channel else RemoteChannel(lambda: Channel(1))
    assert not isready(channel)
    with pytest.raises(TimeoutError):
        take(channel, timeout=0)
    assert put(channel, 5, timeout=30) is channel
    with pytest.raises(TimeoutError):
        put(channel, 6, timeout=0)
    assert isready(channel) and fetch(channel, timeout=30) == 5 and wait(channel, timeout=30) is channel
    assert take(channel) == 5 and not isready(channel)


# -- identities ----------------------------------------------------------------------------------------------------


def test_identities_are_unique_and_lead_to_the_channel() -> None:
    channel, other, future = RemoteChannel(), RemoteChannel(), Future(1)
    rrids = [remoteref_id(ref) for ref in (channel, other, future)]
    assert len(set(rrids)) == 3 and {rrid.whence for rrid in rrids} == {1}
    found = channel_from_id(rrids[0])
    put(channel, 7)
    assert isinstance(found, Channel) and found.take() == 7
    assert channel_from_id(tuple(rrids[0])) is found, "as it comes out of JSON"


def test_a_plain_future_gets_an_identity_when_it_is_asked_for() -> None:
    future: Future[int] = Future()
    assert remoteref_id(future) == remoteref_id(future) and remoteref_id(future).whence == 1


@pytest.mark.parametrize("value", [None, 5, Channel(), concurrent.futures.Future()])
def test_what_is_no_reference_has_no_identity(value: Any) -> None:
    with pytest.raises(TypeError, match=type(value).__name__):
        remoteref_id(value)


def test_there_is_no_channel_behind_these() -> None:
    future = Future(1)
    put(future, 1)
    gone = RemoteChannel()
    rrid = remoteref_id(gone)
    finalize(gone)
    for other in (remoteref_id(future), RRID(1, 10**15), RRID(7, 1)):
        with pytest.raises(LookupError, match="Local instance of remote reference not found"):
            channel_from_id(other)
    finalize(gone)  # may be called again
    with pytest.raises(RuntimeError, match="finalized"):
        put(gone, 1)
    assert rrid == remoteref_id(gone)


# -- connections ---------------------------------------------------------------------------------------------------


def test_the_process_at_the_other_end() -> None:
    links = nodes.current().links
    with ends() as (left, right):
        left.link.peer = 5
        links.update({left.link, right.link})
        try:
            assert worker_id_from_socket(left.link._sock) == 5
            assert worker_id_from_socket(right.link._sock) == -1, "it has not said who it is"
        finally:
            links.difference_update({left.link, right.link})
        assert worker_id_from_socket(left.link._sock) == -1
    for stranger in (None, 5, socket.socket(), object()):
        assert worker_id_from_socket(stranger) == -1
        if isinstance(stranger, socket.socket):
            stranger.close()
