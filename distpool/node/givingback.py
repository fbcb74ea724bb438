"""Which calls a worker gives back when its master asks for some (layer 3).

The leader calls these, under the runner's lock: they take calls out of the inbox and elements off running spans, and
say which, as pairs (first sequence number, how many).
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator

from distpool.node.spans import Item
from distpool.wire.messages import SPANS

Inbox = collections.deque[Item]


def listed_calls(inbox: Inbox, running: list[Item], wanted: set[int]) -> list[list[int]]:
    """Take those that have these sequence numbers."""
    taken: list[list[int]] = []
    for item in list(inbox):
        if item.flags in SPANS:
            taken.extend(_elements(item, wanted, running=False))
        elif item.sequence in wanted:
            inbox.remove(item)
            taken.append([item.sequence, item.stop])
    for item in running:
        if item.flags in SPANS:
            taken.extend(_elements(item, wanted, running=True))
    return taken


def _elements(item: Item, wanted: set[int], running: bool) -> Iterator[list[int]]:
    for sequence in sorted(wanted.intersection(range(item.sequence, item.sequence + item.stop))):
        if item.drop(sequence - item.sequence, running):
            yield [sequence, 1]


def last_calls(inbox: Inbox, running: list[Item], count: int) -> list[list[int]]:
    """Take the last `count`, those that wait first."""
    taken: list[list[int]] = []
    while count > 0 and inbox:
        item = inbox[-1]
        if item.elements > count and item.flags in SPANS:
            keep = item.stop - count
            if keep > 0:
                taken.extend(item.ranges(keep, item.stop))
                item.stop = keep
                return taken
        inbox.pop()
        taken.extend(item.ranges(0, item.stop))
        count -= item.stop
    for item in running:
        if count <= 0:
            break
        before = item.stop
        if item.elements > 1 and item.flags in SPANS:
            keep = item.cut(max(0, before - count))
            if keep < before:
                taken.extend(item.ranges(keep, before))
                count -= before - keep
    return taken


def give_up(inbox: Inbox, running: Iterable[Item]) -> None:
    """This process is to end: let nothing begin any more. The master is not told: it finds out when we are gone."""
    inbox.clear()
    for item in running:
        if item.flags in SPANS:
            item.cut(0)


__all__ = ["give_up", "last_calls", "listed_calls"]
