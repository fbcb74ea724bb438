"""Elements of a `pmap` that go to a worker in one message, each for itself all the same (layer 7).

    asker   Batch: each element serialised alone    --REQUEST-->  run_batch: each decoded alone, when its turn comes
    worker  element k begins  -> board              (memory that both have mapped)
            element k ended   -> board, and the answer that follows the last one
                              -> or a part of the answer, in the kernel before the next one begins: what is large or has
                                 references in it; everything where there is no board (other hosts)
    asker   REPLYs (leader) -> `ends`               the worker died -> board -> what had ended, what was running

So whatever an element does, up to the death of its process, happens to it alone: what had ended keeps its outcome, and
what had surely not begun may run elsewhere, without ever running twice. Without a board the first element that no part
has come for counts as running, since those behind it begin when the kernel has its part.

A board is a `Journal` (which says why one may rely on it after a death) with a writer at a time: the thread that runs
the batch. It numbers elements on, and begins each batch empty. Boards are made for a worker when there is none that no
batch uses, and last as long as the worker. (Tried: one for each map. Making and mapping it costs as much as running 30
tiny elements.)

Scalars go as they are: they can neither fail nor share anything.
"""

from __future__ import annotations

import itertools
import pickle
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from distpool.errors import DistpoolError, traceback_of
from distpool.node import node as nodes
from distpool.node.node import Node
from distpool.node.served import RAISED, RETURNED, name_of
from distpool.refs import gc
from distpool.refs.ahead import settle_puts
from distpool.refs.lent import Lent, parcel
from distpool.refs.refs import LOCAL_VALUE, RAISED_HERE, Outcome
from distpool.refs.serving import serving
from distpool.replies import note_traceback
from distpool.transport.journal import STARTED, Journal
from distpool.wire import codec
from distpool.wire.codec import SCALARS
from distpool.wire.failures import encode_exception
from distpool.wire.messages import ERROR, RESULT, UNSENDABLE, VALUE
from distpool.wire.records import result_records

_BOARD_SIZE = 1 << 16
_LARGE = _BOARD_SIZE // 2  # bytes: such results are sent at once
_FEW = 32  # of so many scalars a list or tuple may be to be looked through
_NEWS = 2.0  # seconds in which pid 1 says that a process whose link is lost is gone

#: Where the worker reports to: a number for parts of the answer; number, path and size of the board (0: there is none);
#: the first element's number on it.
Report = tuple[int, int, str, int, int]


# -- the asker's side ------------------------------------------------------------------------------------------------


class Batch:
    """One message with elements for process `pid`. `ends`: the outcome of each, as far as it is known.

    Made, sent and ended by one library thread after the other; parts of the answer come on the leader in between.
    """

    def __init__(self, node: Node, pid: int, single: bool, arguments: list[Any]) -> None:
        self.ends: list[Outcome | None] = [None] * len(arguments)
        self._node = node
        self._pid = pid
        self._single = single
        self._places: Sequence[int] = range(len(arguments))  # of what is sent, in `ends`
        self._entries = arguments
        self._seen: list[Any] = []  # references in the elements
        self._lent: list[Any] = []  # those of a message that is being sent
        self._number = 0  # for parts of the answer
        self._board: _Board | None = None
        self._first = 0
        self._without = False  # the worker could not map the board
        if pid != node.pid:  # to oneself nothing is copied
            self._encode(arguments)

    @property
    def empty(self) -> bool:
        """Whether nothing is left to be sent, since no element can be serialised."""
        return not self._entries

    def _encode(self, arguments: list[Any]) -> None:
        self._places, self._entries = places, entries = [], []
        for place, argument in enumerate(arguments):
            try:
                entries.append(self._entry(argument))
            except Exception as error:
                # Frames in a circle with their error would hold the elements until the cycle collector runs.
                traceback.clear_frames(error.__traceback__)
                self.ends[place] = Outcome(RAISED_HERE, error.with_traceback(None), (), 0)
            else:
                places.append(place)

    def _entry(self, argument: Any) -> Any:
        """A scalar, or a tuple of scalars for several iterables; else [pickle of the arguments, its buffers], or the
        parcel of that."""
        kind = type(argument)
        if not self._single:
            if SCALARS.issuperset(map(type, argument)):
                return argument
        elif kind in SCALARS:
            return argument
        else:
            argument = (argument,)
            if (
                (kind is list or kind is tuple)
                and len(argument[0]) <= _FEW
                and SCALARS.issuperset(map(type, argument[0]))
            ):
                return [pickle.dumps(argument, codec.PROTOCOL), ()]  # nor can this go wrong, and it takes a quarter
        seen: list[Any] = []
        data, buffers = codec.encode_args(argument, {}, self._pid, seen)
        parts = [pickle.PickleBuffer(part) for part in buffers]
        if not seen:
            return [data, parts]
        self._seen += seen
        return parcel(VALUE, data, parts, self._node.pid)

    def message(self, function: Callable[..., Any]) -> tuple[Any, ...]:
        """The arguments of `run_batch`, to be sent at once; else `withdraw`."""
        node, pid, entries = self._node, self._pid, self._entries
        if pid == node.pid:
            return function, self._single, entries, pid
        self._entries = []
        self._number = node.peers.requests.several(pid, self._came)
        report: Report = (self._number, 0, "", 0, 0)
        if len(entries) > 1:
            board = self._board = boards(node).take(pid)
            if board is not None:
                self._first, board.next = board.next, board.next + len(entries)
                report = (self._number, board.number, board.journal.path, board.journal.size, self._first)
        seen, self._seen = self._seen, []
        if seen:
            refs = gc.of(node)
            refs.reach_owners(seen, pid)
            refs.lend(seen, pid)
            self._lent = seen
        return function, self._single, entries, node.pid, report

    def withdraw(self) -> None:
        """It was not sent after all."""
        if self._lent:
            gc.of(self._node).lend(self._lent, self._pid, -1)
        self._finish(True)

    def _came(self, status: int, data: Any, buffers: Any) -> None:
        """Leader: a part of the answer. Nothing in it is the user's: his values are bytes in there."""
        part = codec.decode(data, buffers)
        if not part:
            self._without = True
        for place, outcome in part:
            self._note(place, outcome if isinstance(outcome, Outcome) else Outcome(*outcome))

    def _note(self, place: int, outcome: Outcome) -> None:
        place = self._places[place]
        if self.ends[place] is None:
            self.ends[place] = outcome

    def answered(self, rest: list[tuple[int, int, Any]]) -> None:
        """The answer has come: with what no part has brought."""
        ends, places, pid = self.ends, self._places, self._pid
        for place, status, data in rest:
            ends[places[place]] = Outcome(status, data, (), pid)
        if len(rest) < len(ends):
            self._fail(DistpoolError("a worker has not said what became of an element"), len(ends))
        if self._board is not None and not self._without:
            self._board.journal.attached()
        self._finish(True)

    def broken(self, error: BaseException) -> None:
        """The function could not be loaded there, say: what has not ended will not run."""
        self._read_board()
        self._fail(error, len(self.ends))
        self._finish(True)

    def lost(self, error: BaseException, dead: bool) -> list[int]:
        """No answer will come. Returns the places of what had surely not begun; the rest has ended now.

        `dead`: the process is gone for good. Else it may be at it still, and everything counts as begun.
        """
        stop = len(self.ends)
        if dead:
            self._read_board()
            # At least one has had to do with it: a function that kills each process which loads it would get them all.
            running = next((place for place in self._places if self.ends[place] is None), stop)
            if self._board is not None and not self._without:
                begun = self._board.journal.started - self._first
                if 0 <= begun < len(self._places):
                    running = max(running, self._places[begun])
            stop = running + 1
        self._fail(error, stop)
        self._finish(False)
        return [place for place, outcome in enumerate(self.ends) if outcome is None]

    def _read_board(self) -> None:
        """What had ended. Nobody writes there any more."""
        if self._board is None or self._without:
            return
        for number, _, status, data, _ in result_records(self._board.journal.pending()):
            if 0 <= number - self._first < len(self._places):  # else of a batch before, which has been answered
                self._note(number - self._first, Outcome(status, data, (), self._pid))

    def _fail(self, error: BaseException, stop: int) -> None:
        """Nothing is known of those before `stop` which have not ended."""
        for place in range(min(stop, len(self.ends))):
            if self.ends[place] is None:
                self.ends[place] = Outcome(RAISED_HERE, error, (), 0)

    def _finish(self, lives: bool) -> None:
        self._node.peers.requests.forget(self._number)
        board, self._board, self._lent = self._board, None, []
        if board is not None:
            boards(self._node).put(self._pid, board, lives, self._without)


def when_known(node: Node, pid: int, then: Callable[[bool], object]) -> None:
    """The link to `pid` is lost: `then(dead)` on a library thread, when pid 1 has said whether it is gone. (In pid 1
    itself a link ends with the process.)"""
    peers = node.peers
    if node.is_master or pid in peers.dead:
        then(True)
        return

    def look() -> None:
        if pid in peers.dead:
            node.deliver(lambda: then(True))
            return

        def lost(who: int) -> None:
            if who == pid:
                timer.cancel()
                end(True)

        def end(dead: bool) -> None:
            peers.on_lost.remove(lost)
            node.deliver(lambda: then(dead))

        peers.on_lost.append(lost)
        timer = node.loop.call_later(_NEWS, lambda: end(False))

    node.loop.call_soon(look)


# -- boards ----------------------------------------------------------------------------------------------------------


class _Board:
    """A board that this process has made; `next`: the number of the next element that goes there."""

    def __init__(self, number: int, journal: Journal) -> None:
        self.number = number
        self.journal = journal
        self.next = 1  # a new journal says that 0 has begun


class Boards:
    """The boards of one process: those for each worker that no batch uses now, and those of others that it has mapped.

    Any thread: each operation on these tables is atomic, and what was taken out of one has one owner.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self._numbers = itertools.count(1)
        self._free: dict[int, list[_Board]] = {}
        self._without: set[int] = set()  # processes that cannot map ours
        self._mapped: dict[tuple[int, int], Journal] = {}  # by maker and number
        node.peers.on_lost.append(self._on_lost)

    def take(self, pid: int) -> _Board | None:
        """A board to which process `pid` may write; None: there can be none."""
        link = self._node.peers.link(pid)
        if link is None or not link.shares_memory or pid in self._without:
            return None
        try:
            return self._free.setdefault(pid, []).pop()
        except IndexError:
            pass
        try:
            return _Board(next(self._numbers), Journal.create(capacity=_BOARD_SIZE))
        except OSError:
            return None

    def put(self, pid: int, board: _Board, lives: bool, without: bool) -> None:
        """A batch has ended. `lives`: and `pid` is not at it any more. `without`: `pid` could not map the board."""
        if without:
            self._without.add(pid)
        if not lives or without:
            board.journal.close()
            return
        self._free.setdefault(pid, []).append(board)
        if pid in self._node.peers.dead:  # perhaps since just now: nobody else would drop it
            self._on_lost(pid)

    def mapped(self, maker: int, number: int, path: str, size: int) -> Journal | None:
        """Worker: a board of process `maker`, mapped at its first batch; None if that cannot be done."""
        journal = self._mapped.get((maker, number))
        if journal is None:
            try:
                journal = Journal.attach(path, size)
            except OSError:
                return None
            self._mapped[maker, number] = journal
        return journal

    def _on_lost(self, pid: int) -> None:
        """`pid` is dead. Mappings of its boards end with the objects: a batch may still be using one."""
        free = self._free.pop(pid, None)
        while free:
            free.pop().journal.close()
        for key in list(self._mapped):
            if key[0] == pid:
                self._mapped.pop(key, None)


def boards(node: Node) -> Boards:
    """Those of `node`, made on first use."""
    if node.boards is None:
        with node.making_parts:
            node.boards = node.boards or Boards(node)
    made: Boards = node.boards
    return made


# -- on the worker ---------------------------------------------------------------------------------------------------


def run_batch(
    function: Callable[..., Any], single: bool, entries: list[Any], asker: int, report: Report = (0, 0, "", 0, 0)
) -> list[tuple[int, int, Any]]:
    """Run the elements one by one; `(place, status, data)` of those that no part of the answer has told of."""
    node = nodes.current()
    if asker == node.pid:
        return [_run_here(node, function, single, place, argument) for place, argument in enumerate(entries)]
    ends = _Ends(node, asker, report, len(entries) - 1)
    words, first = ends.words, ends.first
    served, name = node.served, name_of(function)
    for place in range(len(entries)):
        words[STARTED] = first + place  # `Journal.set_started`, without a call
        arguments: Any = None
        call = served.begin(name)
        try:
            arguments = _arguments(entries[place], single)
            entries[place] = None  # what came goes when its element has ended
            value = function(*arguments)
        except BaseException as error:  # also SystemExit and KeyboardInterrupt: they are the element's outcome
            served.end(call, RAISED)
            if node.drops(error):
                raise  # nor do the other elements begin
            ends.failed(place, error)
        else:
            served.end(call, RETURNED)
            del arguments
            if type(value) in SCALARS:
                ends.scalar(place, value)
            else:
                ends.ended(place, value)
            del value
    return ends.rest


def _run_here(
    node: Node, function: Callable[..., Any], single: bool, place: int, argument: Any
) -> tuple[int, int, Any]:
    call = node.served.begin(name_of(function))
    try:
        value = function(argument) if single else function(*argument)
    except BaseException as error:
        node.served.end(call, RAISED)
        if node.drops(error):
            raise
        note_traceback(error)
        return place, RAISED_HERE, error
    node.served.end(call, RETURNED)
    return place, LOCAL_VALUE, value


def _arguments(entry: Any, single: bool) -> Any:
    kind = type(entry)
    if kind is list:
        return codec.decode(*entry)
    if kind is Lent:
        return entry.decoded()
    if kind is Outcome:  # a parcel whose references went along by value
        return codec.decode(entry.data, entry.buffers)
    return (entry,) if single else entry


class _Ends:
    """What the asker of a batch is told, by the thread that runs it. `rest`: what is left for the answer."""

    def __init__(self, node: Node, asker: int, report: Report, last: int) -> None:
        self.rest: list[tuple[int, int, Any]] = []
        self._last = last
        self._node = node
        self._asker = asker
        self._number, number, path, size, self.first = report
        self._board = board = boards(node).mapped(asker, number, path, size) if size else None
        #: Where the element that begins is noted.
        self.words: Any = [0] if board is None else board.words
        if board is not None:
            board.mark_sent(board.written)  # the batch before has been answered
        elif size:
            self._send([], [])  # before anything begins: the board says nothing about it

    def scalar(self, place: int, value: Any) -> None:
        """As `ended`, for an exact scalar: it goes into the answer as it is."""
        data, board = pickle.dumps(value, codec.PROTOCOL), self._board
        if self._node.ahead is not None:
            settle_puts()
        if board is not None and len(data) < _LARGE:
            noted = board.append(RESULT.pack(self.first + place, 1, len(data), 0, VALUE) + data)
        else:
            noted = False
        if noted or place == self._last:
            self.rest.append((place, LOCAL_VALUE, value))
        else:
            self._note(place, VALUE, data, [], [])

    def ended(self, place: int, value: Any) -> None:
        seen: list[Any] = []
        try:
            data, buffers = codec.encode(value, self._asker, seen)
        except BaseException as error:
            self.failed(place, error, UNSENDABLE)
        else:
            self._note(place, VALUE, data, buffers, seen)

    def failed(self, place: int, error: BaseException, status: int = ERROR) -> None:
        seen: list[Any] = []
        data = encode_exception(error, self._asker, seen=seen)
        if seen:  # as above
            traceback.clear_frames(traceback_of(error))
        self._note(place, status, data, [], seen)

    def _note(self, place: int, status: int, data: bytes, buffers: list[Any], seen: list[Any]) -> None:
        settle_puts()  # as at the end of any other call: from here on its end can be seen
        if not buffers and not seen and (self._on_board(place, status, data) or place == self._last):
            self.rest.append((place, status, data))
            return
        outcome = status, data, [pickle.PickleBuffer(part) for part in buffers], self._node.pid
        self._send([(place, parcel(*outcome) if seen else outcome)], seen)

    def _on_board(self, place: int, status: int, data: bytes) -> bool:
        """False: it cannot be noted there."""
        board = self._board
        if board is None or len(data) >= _LARGE:
            return False
        record = RESULT.pack(self.first + place, 1, len(data), 0, status) + data
        if board.append(record):
            return True
        # It is full: what stands there is sent.
        self._send([(place, (status, data, [], self._node.pid)) for place, status, data in self.rest], [])
        self.rest = []
        board.mark_sent(board.written)
        return board.append(record)

    def _send(self, part: list[tuple[int, Any]], seen: list[Any]) -> None:
        """Send it, and wait until the kernel has it: it would be lost with this process otherwise."""
        asker, office = self._asker, serving(self._node)
        data, buffers = codec.encode(part, asker)
        office.reply(asker, self._number, VALUE, data, buffers, office.near(seen, asker))
        link = self._node.peers.link(asker)
        if link is not None:
            link.drain()


__all__ = ["Batch", "run_batch", "when_known"]
