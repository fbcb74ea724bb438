"""The queue behind a `WorkerPool`: who gets which worker, who has it, and what becomes of both when a process dies."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import PATIENCE

from distpool.poolqueue import EMPTY, WorkerQueue, is_alive
from distpool.refs.refs import LOCAL_VALUE, RAISED_HERE, Outcome
from distpool.wire import codec
from distpool.wire.messages import VALUE


class Group:
    """The node of a master with these members, as far as the queue asks it."""

    def __init__(self, *pids: int) -> None:
        self.members = {pid: SimpleNamespace(listed=True) for pid in pids}
        self.node: Any = SimpleNamespace(
            pid=1, is_master=True, peers=SimpleNamespace(dead={}), group=SimpleNamespace(members=self.members)
        )

    def dies(self, pid: int) -> None:
        self.node.peers.dead[pid] = OSError(pid)


@pytest.fixture
def group() -> Group:
    return Group(2, 3, 4)


def later(queue: WorkerQueue, op: str = "take", pid: int = 0) -> list[Any]:
    """Ask; the list gets the answer when it comes: a pid, or an error."""
    box: list[Any] = []
    queue.request(op, lambda outcome: box.append(outcome.data), pid)
    return box


def test_the_one_that_has_been_free_for_longest(group: Group) -> None:
    queue = WorkerQueue(group.node, [3, 2, 4])
    assert [queue.take() for _ in range(3)] == [3, 2, 4]
    for pid in (4, 3, 2):
        queue.give(pid)
    assert [queue.take() for _ in range(3)] == [4, 3, 2]


def test_waiters_are_served_in_their_order(group: Group) -> None:
    queue = WorkerQueue(group.node, [2, 3])
    assert {queue.take(), queue.take()} == {2, 3}
    first, second = later(queue), later(queue)
    assert not first and not second and not queue.isready()
    queue.give(3)
    queue.give(2)
    assert (first, second) == ([3], [2])


def test_a_blocked_take_is_woken(group: Group) -> None:
    queue = WorkerQueue(group.node, [2])
    queue.take()
    taken: list[int] = []
    thread = threading.Thread(target=lambda: taken.append(queue.take(timeout=PATIENCE)))
    thread.start()
    queue.give(2)
    thread.join(PATIENCE)
    assert taken == [2]


def test_what_timed_out_takes_nothing(group: Group) -> None:
    queue = WorkerQueue(group.node, [2])
    queue.take()
    with pytest.raises(TimeoutError):
        queue.take(timeout=0.01)
    queue.give(2)
    assert queue.isready() and queue.take() == 2


def test_only_what_was_taken_is_given_back(group: Group) -> None:
    queue = WorkerQueue(group.node, [2, 3])
    queue.give(2)  # free
    queue.give(9)  # no member
    assert queue.take() == 2
    queue.give(2)
    queue.give(2)
    assert [queue.take(), queue.take()] == [3, 2]
    assert not queue.isready()


def test_members_come_and_go(group: Group) -> None:
    queue = WorkerQueue(group.node, [2])
    queue.push(2)
    queue.push(4)
    assert queue.living() == [2, 4] and len(queue) == 2
    assert [queue.take(), queue.take()] == [2, 4] and queue.has(2)
    queue.push(2)  # a member, and taken: it does not become free by this
    assert not queue.isready()
    queue.remove(2)
    assert queue.living() == [4] and not queue.has(2)
    queue.give(2)
    assert not queue.isready()  # it came back to where it is no member any more
    waiting = later(queue)
    queue.push(3)
    assert waiting == [3]


def test_a_pool_without_members_lets_nobody_wait(group: Group) -> None:
    queue = WorkerQueue(group.node, [2])
    queue.take()
    takes, waits = later(queue), later(queue, "wait")
    queue.remove(2)
    for box in (takes, waits):
        (error,) = box
        assert type(error) is RuntimeError and str(error) == EMPTY
    with pytest.raises(RuntimeError, match=EMPTY):
        queue.take()
    assert not queue.isready() and queue.living() == [] == queue.everybody()


def test_the_default_pool_falls_back_to_process_1(group: Group) -> None:
    queue = WorkerQueue(group.node, [], falls_back=True)
    assert queue.isready() and queue.take() == queue.take() == 1
    assert queue.wait() is queue
    assert queue.living() == [] and queue.everybody() == [1] and not queue.has(1)
    queue.push(2)
    assert queue.everybody() == [2] and queue.take() == 2
    waiting = later(queue)
    assert not waiting
    queue.remove(2)
    assert waiting == [1]
    queue.fall_back(False)
    with pytest.raises(RuntimeError, match=EMPTY):
        queue.take()


def test_waiting_takes_nothing(group: Group) -> None:
    queue = WorkerQueue(group.node, [2])
    assert queue.wait() is queue and queue.isready()
    queue.take()
    waits, takes = later(queue, "wait"), later(queue)
    queue.give(2)
    assert takes == [2] and not waits  # it went to the taker
    queue.give(2)
    assert waits == [None] and queue.isready()


def test_the_dead_are_no_members(group: Group) -> None:
    queue = WorkerQueue(group.node, [2, 3])
    group.dies(2)
    assert queue.isready() and queue.living() == [3] and queue.take() == 3
    group.dies(3)
    with pytest.raises(RuntimeError, match=EMPTY):
        queue.take()
    queue.push(2)
    assert queue.living() == []


def test_a_waiter_hears_of_the_death_of_the_last_member(group: Group) -> None:
    queue = WorkerQueue(group.node, [2])
    queue.take()
    waiting = later(queue)
    group.dies(2)
    queue.forget_client(2)  # whom the death of any process is told to
    assert type(waiting[0]) is RuntimeError


def test_what_a_process_had_taken_is_free_again(group: Group) -> None:
    queue = WorkerQueue(group.node, [2, 3, 4])
    assert later(queue, pid=4) == [2] and later(queue, pid=3) == [3]
    assert queue.take() == 4
    waits_of_it, waits = later(queue, pid=4), later(queue)
    queue.forget_client(4)
    assert waits == [2] and not waits_of_it
    assert not queue.isready()  # those of others stay taken


@pytest.mark.parametrize("encoded", [False, True])
def test_a_worker_for_somebody_who_has_given_up(group: Group, encoded: bool) -> None:
    queue = WorkerQueue(group.node, [2])
    pid = queue.take()
    item = Outcome(VALUE, codec.encode(pid)[0], (), 1) if encoded else Outcome(LOCAL_VALUE, pid, (), 1)
    queue.restore(item)
    assert queue.take() == 2


def test_callbacks_run_outside_of_the_lock(group: Group) -> None:
    queue = WorkerQueue(group.node, [2])
    queue.take()
    seen: list[Any] = []
    queue.request("take", lambda outcome: seen.append((outcome.data, queue.living(), queue.has(2))))
    queue.give(2)
    assert seen == [(2, [2], True)]


def test_it_stays_where_it_is(group: Group) -> None:
    with pytest.raises(TypeError, match="send the WorkerPool"):
        pickle.dumps(WorkerQueue(group.node, []))


def test_errors_are_new_each_time(group: Group) -> None:
    queue = WorkerQueue(group.node, [])
    (one,), (other,) = later(queue), later(queue)
    assert one is not other  # each is raised, and gets a traceback of its own


def test_many_threads_share_a_few(group: Group) -> None:
    queue = WorkerQueue(group.node, [2, 3])
    busy: dict[int, int] = {2: 0, 3: 0}
    wrong: list[int] = []

    def work() -> None:
        for _ in range(100):
            pid = queue.take(timeout=PATIENCE)
            busy[pid] += 1
            if busy[pid] != 1:
                wrong.append(pid)
            busy[pid] -= 1
            queue.give(pid)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not wrong and queue.isready() and len(queue) == 2
    assert sorted([queue.take(), queue.take()]) == [2, 3]


def kill(group: Group) -> None:
    group.dies(2)


def unlist(group: Group) -> None:
    group.members[2].listed = False


def drop(group: Group) -> None:
    del group.members[2]


def no_group(group: Group) -> None:
    group.node.group = None


@pytest.mark.parametrize("how", [kill, unlist, drop, no_group])
def test_who_lives_as_the_master_knows(group: Group, how: Callable[[Group], None]) -> None:
    assert is_alive(group.node, 2) and is_alive(group.node, 1)
    how(group)
    assert not is_alive(group.node, 2) and is_alive(group.node, 1)


def test_who_lives_as_a_worker_knows(group: Group) -> None:
    group.node.pid, group.node.is_master, group.node.group = 3, False, None
    assert is_alive(group.node, 3) and is_alive(group.node, 77) and is_alive(group.node, 1)
    group.dies(77)
    assert not is_alive(group.node, 77)


def test_errors_are_of_this_process(group: Group) -> None:
    found: list[Outcome] = []
    WorkerQueue(group.node, []).request("take", found.append)
    assert [outcome.status for outcome in found] == [RAISED_HERE]
