"""This process as a node: one, made on first use, alone after a fork."""

from __future__ import annotations

import os
import threading

import pytest

from distpool.node import node as nodes

PATIENCE = 30.0


def test_there_is_one_node() -> None:
    found: list[nodes.Node] = []
    barrier = threading.Barrier(8)

    def look() -> None:
        barrier.wait(PATIENCE)
        found.append(nodes.current())

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(set(map(id, found))) == 1
    node = nodes.current()
    assert nodes.existing() is node and node.pid == 1 and node.is_master and node.ospid == os.getpid()


def test_cookies_are_random_text() -> None:
    cookie = nodes.current().cookie
    assert cookie.isascii() and 16 <= len(cookie) <= 64


def test_deliver_runs_beside_the_loop() -> None:
    node = nodes.current()
    seen: list[bool] = []
    done = threading.Event()
    node.deliver(lambda: (seen.append(node.loop.leads), done.set()))
    assert done.wait(PATIENCE) and seen == [False]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_is_alone() -> None:
    node = nodes.current()
    told: list[int] = []
    callback = lambda: told.append(os.getpid())
    node.on_fork.append(callback)
    try:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                if nodes.existing() is None and told == [os.getpid()]:
                    fresh = nodes.current()
                    done = threading.Event()
                    fresh.loop.call_soon(done.set)
                    if fresh is not node and done.wait(PATIENCE):
                        code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        node.on_fork.remove(callback)
    done = threading.Event()
    node.loop.call_soon(done.set)
    with node.loop.following():
        assert done.wait(PATIENCE), "the parent's loop goes on"
    assert told == []
