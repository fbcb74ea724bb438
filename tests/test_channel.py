"""`Channel`: threads wait for each other and for nothing that will not come; by callbacks: `test_channelcore`."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
from told import ask, put

from distpool.errors import ChannelClosedError
from distpool.refs.channel import Channel
from distpool.refs.channelcore import Waiter
from distpool.refs.refs import Outcome
from distpool.wire import codec
from distpool.wire.messages import VALUE

PATIENCE = 30.0


# -- making --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["1", None, True, [1]])
def test_sizes_are_numbers(size: Any) -> None:
    with pytest.raises(TypeError, match="maxsize"):
        Channel(size)


def test_which_sizes_there_are() -> None:
    with pytest.raises(ValueError, match="negative"):
        Channel(-1)
    endless = Channel(float("inf"))  # type: ignore[arg-type]
    for number in range(100):
        endless.put(number, timeout=0)
    assert len(endless) == 100 and bool(Channel()), "true, whatever is in it"


# -- closing -------------------------------------------------------------------------------------------------------


def test_a_closed_channel_drains_first() -> None:
    channel = Channel(2)
    channel.put(1).put(2)
    channel.close()
    channel.close(KeyError("too late"))
    assert not channel.isopen()
    with pytest.raises(ChannelClosedError):
        channel.put(3)
    assert list(channel) == [1, 2]
    for use in (channel.take, channel.fetch, channel.wait):
        with pytest.raises(ChannelClosedError):
            use()


def test_closing_wakes_everybody() -> None:
    channel = Channel(1)
    told = [ask(channel, kind)[1] for kind in ("take", "wait", "fetch")]
    channel.close()
    assert all(isinstance(each.values[0], ChannelClosedError) for each in told)
    full = Channel(1)
    full.put("a")
    _, putter = put(full, "b")
    full.close()
    assert isinstance(putter.values[0], ChannelClosedError) and full.take() == "a"


def test_an_error_is_what_they_get() -> None:
    channel = Channel(1)
    _, taker = ask(channel)
    channel.close(KeyError("why"))
    assert isinstance(taker.values[0], KeyError)
    with pytest.raises(KeyError, match="why"):
        channel.take()
    with pytest.raises(KeyError, match="why"):
        list(channel)


def test_each_gets_an_error_of_its_own() -> None:
    """Raised again and again, one object would collect the tracebacks, and the frames, of all."""
    channel = Channel(1)
    channel.close()
    errors = [ask(channel)[1].values[0] for _ in range(2)]
    assert errors[0] is not errors[1]


# -- by threads ----------------------------------------------------------------------------------------------------


def in_thread(function: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(function())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, found


def test_threads_wait_for_each_other() -> None:
    channel = Channel()
    thread, found = in_thread(lambda: [channel.take(timeout=PATIENCE) for _ in range(3)])
    for value in range(3):
        assert channel.put(value, timeout=PATIENCE) is channel
    thread.join(PATIENCE)
    assert found == [[0, 1, 2]]


@pytest.mark.parametrize("size", [0, 1])
def test_time_limits(size: int) -> None:
    channel = Channel(size)
    for use in (channel.take, channel.wait, *((channel.fetch,) if size else ())):
        with pytest.raises(TimeoutError):
            use(timeout=0.001)
    if size:
        channel.put("a")
    with pytest.raises(TimeoutError):
        channel.put("lost", timeout=0.001)
    assert len(channel) == size and channel.isready() is bool(size), "what timed out does not arrive"


def test_no_item_is_lost_between_a_time_limit_and_a_put() -> None:
    channel = Channel(1)
    taken: list[int] = []

    def take() -> None:
        while not taken or taken[-1] is not None:
            try:
                taken.append(channel.take(timeout=0.0001))
            except TimeoutError:
                pass

    thread, _ = in_thread(take)
    for number in (*range(300), None):
        channel.put(number, timeout=PATIENCE)
    thread.join(PATIENCE)
    assert taken == [*range(300), None]


def test_types_are_checked_before_anything_happens() -> None:
    channel = Channel(2, int)
    for wrong in ("1", 1.0, None):
        with pytest.raises(TypeError, match="this channel takes int, not"):
            channel.put(wrong)
    assert channel.put(True).take() is True and len(channel) == 0


def test_what_came_from_elsewhere_is_opened_by_its_taker() -> None:
    channel = Channel(3)
    for value in ([1], fails, [2]):
        data, buffers = codec.encode(value() if callable(value) else value)
        channel.arrive(5, [Outcome(VALUE, data, buffers, 5)], lambda taken: None)
    assert channel.take() == [1]
    with pytest.raises(KeyError, match="not here"):
        channel.take()
    assert channel.fetch() == [2] and channel.take() == [2], "the one behind it is not hurt"


def fails() -> Any:
    return Fails()


class Fails:
    def __reduce__(self) -> Any:
        return _fail, ()


def _fail() -> None:
    raise KeyError("not here")


# -- copies and classes of one's own -------------------------------------------------------------------------------


def test_a_copy_has_the_items_and_its_own_life() -> None:
    channel = Channel(3, int)
    channel.put(1).put(2)
    copy = pickle.loads(pickle.dumps(channel))
    assert (copy.maxsize, copy.type, len(copy)) == (3, int, 2)
    assert [copy.take(), copy.take()] == [1, 2] and len(channel) == 2
    channel.close()
    assert list(pickle.loads(pickle.dumps(channel))) == [1, 2]


def test_a_subclass_goes_by_its_own_methods() -> None:
    class Noting(Channel):
        seen: list[str] = []

        def offer(self, *arguments: Any, **more: Any) -> Waiter:
            self.seen.append("offer")
            return super().offer(*arguments, **more)

        def request(self, *arguments: Any, **more: Any) -> Waiter:
            self.seen.append("request")
            return super().request(*arguments, **more)

    channel = Noting(1)
    channel.put(1)
    assert channel.take() == 1 and channel.seen == ["offer", "request"]
    told: list[tuple[int, int]] = []
    channel.reserve(5, lambda *question: None, lambda *credit: told.append(credit))
    assert told == [(0, 0)], "nothing is put ahead into it"


@pytest.mark.parametrize("kind", [(int, str), int | str])
def test_one_of_several_types(kind: Any) -> None:
    channel = Channel(2, kind)
    channel.put(1).put("a")
    with pytest.raises(TypeError, match="this channel takes int .* str, not float"):
        channel.put(1.5)


@pytest.mark.parametrize("wrong", [5, "int", None])
def test_what_no_item_can_be_an_instance_of(wrong: Any) -> None:
    with pytest.raises(TypeError, match="type must be what isinstance"):
        Channel(1, wrong)


@pytest.mark.parametrize("wrong", [-1, float("nan"), 1.5])
def test_room_for_so_many(wrong: float) -> None:
    with pytest.raises(ValueError, match="maxsize"):
        Channel(wrong)
