"""Handles of executors: what a task sends, what comes back, and the owner's side (whole stories: `faults`)."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from wires import PATIENCE, until

from distpool import nested
from distpool.errors import SerializationError
from distpool.nested import ExecutorHandle, policy_fields
from distpool.node import node as nodes
from distpool.refs.refs import Future
from distpool.transport.ioloop import IoLoop
from distpool.wire import codec, messages
from distpool.wire.failures import encode_exception
from distpool.wire.frames import Frame, Kind
from distpool.wire.functions import FunctionEncoder, decode_function
from distpool.work import Policy


class Task:
    """A worker whose task has a handle; the test is the owner."""

    def __init__(self) -> None:
        self.sent: list[Frame] = []
        self.given = 0
        self.loop = IoLoop("nested")
        self.loop.start()
        self.node: Any = SimpleNamespace(
            pid=2,
            loop=self.loop,
            requests=None,
            exports=None,
            handlers={},
            encoder=FunctionEncoder(),
            master_link=SimpleNamespace(send=self.send),
            runner=SimpleNamespace(segments=SimpleNamespace(stage=lambda buffer: buffer, open=lambda buffer: buffer)),
            deliver=lambda function: threading.Thread(target=function).start(),
            given_away=self.given_away,
        )

    def send(self, kind: Kind, control: bytes, body: bytes = b"", buffers: Any = ()) -> bool:
        self.sent.append(Frame(kind, control, body, list(buffers)))
        return True

    @contextlib.contextmanager
    def given_away(self) -> Iterator[None]:
        self.given += 1
        yield

    def wait_for(self, count: int) -> None:
        until(lambda: len(self.sent) >= count, "sent")

    def submitted(self, index: int) -> tuple[Any, Any, Any, Any]:
        """Message, function and arguments of what was sent."""
        frame = self.sent[index]
        assert frame.kind is Kind.SUBMIT
        message = messages.Submit.unpack(frame.control)
        function = decode_function(frame.body[: message.function_bytes], frame.buffers[: message.function_buffers])
        rest = frame.body[message.function_bytes :]
        return message, function, *codec.decode_args(rest, frame.buffers[message.function_buffers :])

    def answer(self, request: int, value: Any) -> None:
        if isinstance(value, BaseException):
            status, data = messages.ERROR, encode_exception(value)
        else:
            status, data = messages.VALUE, codec.encode(value)[0]
        frame = Frame(Kind.OUTCOME, messages.Outcome(request, status).pack(), data, [])
        self.on_leader(lambda: self.node.handlers[Kind.OUTCOME](None, frame))

    def cancelled(self, request: int, done: bool) -> None:
        frame = Frame(Kind.CANCELLED, messages.Cancelled(request, done).pack(), b"", [])
        self.on_leader(lambda: self.node.handlers[Kind.CANCELLED](None, frame))

    def on_leader(self, function: Callable[[], object]) -> None:
        done = threading.Event()
        self.loop.call_soon(lambda: (function(), done.set()))
        with self.loop.following():
            assert done.wait(PATIENCE)


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Iterator[Task]:
    made = Task()
    monkeypatch.setattr(nodes, "current", lambda: made.node)
    monkeypatch.setattr(nested, "settle_puts", lambda pid=None: None)
    yield made
    made.loop.stop()


@pytest.fixture
def handle(task: Task) -> ExecutorHandle:
    return ExecutorHandle("key", 3, None)


# -- the task's side -----------------------------------------------------------------------------------------------


def test_a_call_travels_and_its_value_comes_back(task: Task, handle: ExecutorHandle) -> None:
    futures = [handle.submit(lambda x, y=0: x + y, number, y=1) for number in range(2)]
    message, function, args, kwargs = task.submitted(1)
    assert (message.executor, message.options) == ("key", None) and function(*args, **kwargs) == 2
    assert futures[1].running() and not futures[1].done()
    first = task.submitted(0)[0].request
    assert message.request != first
    task.answer(message.request, "late")
    task.answer(first, KeyError("x"))
    assert futures[1].result(PATIENCE) == "late"
    with pytest.raises(KeyError):
        futures[0].result(PATIENCE)
    assert not task.node.requests.futures


def test_what_cannot_be_sent_is_the_futures_error(task: Task, handle: ExecutorHandle) -> None:
    future = handle.submit(len, threading.Lock())
    assert isinstance(future.exception(0), SerializationError) and not task.sent
    assert not task.node.requests.futures


def test_who_waits_has_given_its_slot_away(task: Task, handle: ExecutorHandle) -> None:
    future = handle.submit(abs, -1)
    thread = threading.Thread(target=future.result, args=(PATIENCE,))
    thread.start()
    until(lambda: task.given, "given")
    task.answer(task.submitted(0)[0].request, 1)
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_callbacks_run_beside_the_leader(task: Task, handle: ExecutorHandle) -> None:
    seen: list[bool] = []
    done = threading.Event()
    handle.submit(abs, -1).add_done_callback(lambda future: (seen.append(task.loop.leads), done.set()))
    task.answer(task.submitted(0)[0].request, 1)
    assert done.wait(PATIENCE) and seen == [False]


def test_an_outcome_that_nobody_waits_for_is_not_opened(
    task: Task, handle: ExecutorHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert handle is not None
    taken: list[Any] = []
    monkeypatch.setattr(nested, "received", lambda *outcome: taken.append(outcome[0]))
    task.answer(99, 1)
    assert taken == [messages.VALUE], "its references go back"


def test_maps_over_a_handle(task: Task, handle: ExecutorHandle) -> None:
    found = handle.map(pow, [2, 3], [3, 2])
    for index in range(2):
        message, function, args, _ = task.submitted(index)
        task.answer(message.request, function(*args))
    assert list(found) == [8, 9]
    with pytest.raises(ValueError):
        handle.map(pow, [2], [3], chunksize=0)


def test_unordered_results_look_only_so_far_ahead(
    task: Task, handle: ExecutorHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nested, "_CANCEL_PATIENCE", 0.01)  # what nobody wants any more is cancelled
    found = handle.imap_unordered(abs, itertools.count(), buffersize=2)
    thread_found: list[int] = []
    thread = threading.Thread(target=lambda: thread_found.append(next(found)))
    thread.start()
    task.wait_for(2)
    task.answer(task.submitted(1)[0].request, 1)
    thread.join(PATIENCE)
    assert thread_found == [1] and len(task.sent) <= 3


# -- cancelling ----------------------------------------------------------------------------------------------------


def cancel_in_threads(task: Task, future: Future[Any], count: int) -> tuple[list[threading.Thread], list[bool]]:
    answers: list[bool] = []
    threads = [threading.Thread(target=lambda: answers.append(future.cancel())) for _ in range(count)]
    for thread in threads:
        thread.start()
    task.wait_for(1 + count)
    return threads, answers


@pytest.mark.parametrize("done", [True, False])
def test_the_owner_is_asked(task: Task, handle: ExecutorHandle, done: bool) -> None:
    future = handle.submit(abs, -1)
    request = task.submitted(0)[0].request
    [thread], answers = cancel_in_threads(task, future, 1)
    assert messages.Cancel.unpack(task.sent[1].control).request == request
    task.cancelled(request, done)
    thread.join(PATIENCE)
    assert answers == [done] == [future.cancelled()] and not task.node.requests.cancels
    task.answer(request, 1)  # sent before the owner heard of it
    if done:
        with pytest.raises(CancelledError):
            future.result(0)
    else:
        assert future.result(PATIENCE) == 1


def test_several_threads_cancel_one_call(task: Task, handle: ExecutorHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first answer is for all: none of them waits for one that another one got."""
    monkeypatch.setattr(nested, "_CANCEL_PATIENCE", 1000.0)
    future = handle.submit(abs, -1)
    request = task.submitted(0)[0].request
    threads, answers = cancel_in_threads(task, future, 3)
    task.cancelled(request, True)
    for thread in threads:
        thread.join(PATIENCE)
    assert answers == [True] * 3
    task.cancelled(request, True)  # to the others' questions


@pytest.mark.parametrize("leads", [True, False], ids=["while it leads", "while another one leads"])
def test_an_owner_that_does_not_answer_is_not_waited_for_for_ever(
    task: Task, handle: ExecutorHandle, monkeypatch: pytest.MonkeyPatch, leads: bool
) -> None:
    monkeypatch.setattr(nested, "_CANCEL_PATIENCE", 0.01)
    future = handle.submit(abs, -1)
    if not leads:
        monkeypatch.setattr(task.loop, "lead", lambda *arguments: False)
    assert future.cancel() is False and not future.done()
    request = task.submitted(0)[0].request
    task.cancelled(request, False)
    assert not task.node.requests.cancels
    task.answer(request, 1)
    assert future.result(PATIENCE) == 1


# -- policies and travelling ---------------------------------------------------------------------------------------


def test_options_travel_with_each_call(task: Task, handle: ExecutorHandle) -> None:
    other = handle.options(timeout=2.5, pids=[4, 3]).options(retries=1, label="x")
    other.submit(abs, -1)
    options = task.submitted(0)[0].options
    assert (options["timeout"], options["pids"], options["retries"], options["label"]) == (2.5, [3, 4], 1, "x")
    assert set(options) == {"timeout", "pids", "retries", "label"}, "the rest is the executor's own"
    with pytest.raises(ValueError, match="retry_check"):
        handle.options(retries=1, retry_check=lambda error: True)


def test_a_handle_travels_on_as_itself(task: Task, handle: ExecutorHandle) -> None:
    for sent in (handle, handle.options(label="x")):
        got = codec.decode(codec.encode(sent, 3)[0])
        assert type(got) is ExecutorHandle
        assert (got._key, got._max_workers, got._options) == ("key", 3, sent._options)
    handle.shutdown(wait=True, cancel_futures=True)
    handle.submit(abs, -1)
    assert len(task.sent) == 1, "it belongs to its owner"


class Home:
    """An executor at home."""

    _policy = Policy(timeout=9.0, retries=2, retry_check=OSError)

    def _view(self, policy: Any) -> Any:
        return "view", policy


def test_one_that_comes_home_is_the_executor_itself(task: Task) -> None:
    home = Home()
    nested._exports(task.node)["key"] = home
    assert nested.arrive("key", 3, None) is home
    assert nested.arrive("key", 3, {"label": "x"}) == ("view", home._policy._replace(label="x"))
    del home
    assert type(nested.arrive("key", 3, None)) is ExecutorHandle, "it does not live for its handles"


def json_of(options: Any) -> Any:
    return json.loads(json.dumps(options))


def test_what_a_handle_does_not_change_is_the_executors(task: Task, handle: ExecutorHandle) -> None:
    """A label took the retries along, and retries=0 went unheard."""
    home = Home()
    cases: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
        ([{"label": "x"}], {"label": "x"}),
        ([{"retries": 0}], {"retries": 0}),
        ([{"timeout": math.inf}, {"pids": [3, 2]}, {"pids": None}], {"timeout": None, "pids": frozenset((2, 3))}),
        ([{"retry_delays": [1, 2, 3]}], {"retry_delays": (1.0, 2.0, 3.0)}),
        ([{"retry_delays": [1, 2, 3]}, {"label": "x"}], {"retry_delays": (1.0, 2.0, 3.0), "label": "x"}),
        ([{"retry_delays": iter([1, 2]), "retries": 1}], {"retry_delays": (1.0,), "retries": 1}),
        ([{"retry_delays": [1]}, {"retry_delays": None}], {"retry_delays": (1.0,)}),
        ([dict.fromkeys(Policy._fields)], {}),
    ]
    for steps, changes in cases:
        other = handle
        for step in steps:
            other = other.options(**step)
        found = nested._policy_of(home, json_of(other._options))
        assert found == home._policy._replace(**changes)
    plain = SimpleNamespace(_policy=None)
    given = json_of(handle.options(retry_delays=[1, 2])._options)
    assert nested._policy_of(plain, given) == Policy(retries=2, retry_delays=(1.0, 2.0))
    assert nested._policy_of(plain, json_of(handle.options(retries=0)._options)) is None


def test_a_view_travels_as_what_it_has_changed() -> None:
    own = Policy(retries=2, retry_check=OSError)
    cases = (None, own, own._replace(retries=0), own._replace(pids=frozenset((3, 2)), keep=True), Policy(label="x"))
    for policy in cases:
        fields = json_of(policy_fields(policy, own))
        assert (nested._policy_of(SimpleNamespace(_policy=own), fields) or Policy()) == (policy or Policy())
    with pytest.raises(ValueError, match="retry_check"):
        policy_fields(own, None)


class Meeting:
    """Holds whoever comes first in the middle of something until another one has come, or half a second."""

    def __init__(self) -> None:
        self._count = itertools.count()
        self._second = threading.Event()

    def __call__(self) -> None:
        if next(self._count):
            self._second.set()
        else:
            self._second.wait(0.5)


def in_two_threads(function: Callable[[], Any]) -> list[Any]:
    with ThreadPoolExecutor(2) as threads:
        return [future.result(PATIENCE) for future in [threads.submit(function) for _ in range(2)]]


def test_two_threads_get_their_first_handles_at_once(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """They had a table each, and the calls of one of them no answer."""
    meet = Meeting()

    class Slow(nested._Requests):
        def __init__(self, node: Any) -> None:
            meet()
            super().__init__(node)

    monkeypatch.setattr(nested, "_Requests", Slow)

    def first_call() -> Any:
        made = ExecutorHandle("key", 3, None)
        return made.submit(abs, -1), task.node.requests

    (one, table), (two, other) = in_two_threads(first_call)
    assert table is other
    task.wait_for(2)
    for index in range(2):
        request = task.submitted(index)[0].request
        task.answer(request, request)
    assert {one.result(PATIENCE), two.result(PATIENCE)} == {1, 2}


def test_two_threads_send_an_executor_for_the_first_time(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them sent a key that nobody knew yet."""
    meet = Meeting()
    export = nested._export

    def slow(executor: Any, key: str) -> None:
        meet()
        export(executor, key)

    monkeypatch.setattr(nested, "_export", slow)
    home = Home()
    home._key, home._max_workers, home._crew = None, 3, SimpleNamespace(node=task.node)  # type: ignore[attr-defined]

    def send() -> bool:
        _, (key, _, _) = nested.reduce_executor(home, 2)
        return nested._exports(task.node).get(key) is home

    assert in_two_threads(send) == [True, True]


# -- the owner's side ----------------------------------------------------------------------------------------------


class Asker:
    """The owner's slot of a worker that has a handle."""

    pid = 5

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.arrived = threading.Event()
        self.forwarded: dict[int, Any] = {}
        self.member = SimpleNamespace(link=self, segments=SimpleNamespace(stage=lambda buffer: buffer))

    def send(self, kind: Kind, control: bytes, body: bytes = b"", buffers: Any = ()) -> bool:
        self.answers.append(messages.MESSAGES[kind].unpack(control))
        self.body = body
        self.arrived.set()
        return True

    def open(self, buffers: list[Any]) -> list[Any]:
        return buffers


def submit_frame(key: str) -> Frame:
    return Frame(Kind.SUBMIT, messages.Submit(7, key, "f", 0, 0, True, None).pack(), b"", [])


@pytest.mark.parametrize("ended", ["gone", "finished", "broken"])
def test_an_executor_that_takes_no_calls_says_so(task: Task, ended: str) -> None:
    crew = SimpleNamespace(finished=threading.Event(), broken="why" if ended == "broken" else None)
    home = Home()
    home._crew = crew  # type: ignore[attr-defined]
    if ended != "gone":
        nested._exports(task.node)["key"] = home
    if ended == "finished":
        crew.finished.set()
    asker = Asker()
    nested._on_submit(task.node, asker, submit_frame("key"))  # type: ignore[arg-type]
    assert asker.arrived.wait(PATIENCE)
    assert (asker.answers[0].request, asker.answers[0].status) == (7, messages.ERROR)
    text = "does not exist any more" if ended == "gone" else "after shutdown"
    assert text in asker.body.decode("utf-8", "replace")


@pytest.mark.parametrize("known", [True, False])
def test_a_cancel_is_answered_always(task: Task, known: bool) -> None:
    asker = Asker()
    future: Future[Any] = Future()
    if known:
        asker.forwarded[7] = future
    nested._on_cancel(asker, Frame(Kind.CANCEL, messages.Cancel(7).pack(), b"", []))  # type: ignore[arg-type]
    assert asker.arrived.wait(PATIENCE)
    assert asker.answers == [messages.Cancelled(7, known)] and future.cancelled() is known


def test_a_call_that_its_owner_cancels_is_cancelled_for_the_task(task: Task, handle: ExecutorHandle) -> None:
    ended = threading.Event()
    future = handle.submit(abs, -1)
    future.add_done_callback(lambda future: ended.set())

    def wait() -> None:
        with pytest.raises(CancelledError):
            future.result(PATIENCE)

    thread = threading.Thread(target=wait)
    thread.start()
    until(lambda: task.given, "given")
    request = task.submitted(0)[0].request
    task.cancelled(request, True)
    assert ended.wait(PATIENCE) and future.cancelled() and not task.node.requests.futures
    thread.join(PATIENCE)
    assert not thread.is_alive()
    task.cancelled(request, True)  # once more, to somebody's question


def test_the_owner_says_that_it_has_cancelled_a_call(task: Task) -> None:
    asker = Asker()
    forward = nested._Forward(asker, 7)  # type: ignore[arg-type]
    assert forward.cancel() and asker.answers == [messages.Cancelled(7, True)]
    asker.member.link = None
    assert nested._Forward(asker, 8).cancel() and len(asker.answers) == 1  # type: ignore[arg-type]
