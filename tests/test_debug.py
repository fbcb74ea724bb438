"""`debug.refs`: who holds what this process owns."""

from __future__ import annotations

from typing import Any

import pytest
from wires import until

from distpool import Future, RemoteChannel, debug, finalize, remoteref_id


def test_the_table_of_this_process() -> None:
    channel = RemoteChannel()
    rrid = remoteref_id(channel)
    assert debug.refs()[rrid] == {1} and debug.refs(1)[rrid] == {1}
    finalize(channel)
    until(lambda: rrid not in debug.refs(), "given back")


def test_what_was_not_used_yet_is_unknown_to_its_owner() -> None:
    future: Any = Future(1)
    assert remoteref_id(future) not in debug.refs()
    future.put(3)
    assert future.fetch() == 3


def test_the_table_is_a_copy() -> None:
    channel = RemoteChannel()
    debug.refs()[remoteref_id(channel)].add(99)
    debug.refs().clear()
    assert debug.refs()[remoteref_id(channel)] == {1}


def test_other_processes_are_asked() -> None:
    with pytest.raises(ValueError, match="987654"):
        debug.refs(987654)
