"""Links to the other processes of the group, made when they are needed (layer 3).

    send(pid, frame)   link there -> sent;  else the frame waits in order while the link is made
    worker A -> B      A asks pid 1 (WHERE), which knows who can dial whom (`reach`): A gets the ADDRESS, or B is told
                       to DIAL; who fails says so, then the other one tries. Dialler: Handshake, PEER; listener: takes
                       the link on PEER
    custom transports  the address is ["manager", connect_at]: the manager given to `init_worker` makes the streams
    no link allowed    topology: calls fail with TopologyError; small control frames go through pid 1 (RELAY)

State of a peer: a link in `_links`, or frames in `_waiting` while a link is made, or an entry in `dead`. Tables are
changed on the leader; other threads read them and hand work over with `call_soon`. A thread that finds a link may send
on it at once: frames of one thread to one peer stay in order because a link, once there, stays, and waiting frames are
flushed before it is published.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Container

from distpool import config, errors
from distpool.errors import AuthenticationError, ProtocolError, TopologyError, UnreachableError
from distpool.hints import TYPE_CHECKING, Any
from distpool.node.ready import Ready
from distpool.node.requests import Requests
from distpool.transport.link import Link
from distpool.transport.segments import Segments
from distpool.transport.stream import Adopted, Stream, dial
from distpool.wire import messages, structs
from distpool.wire.frames import Frame, Kind
from distpool.wire.protocol import Handshake, Role

if TYPE_CHECKING:
    from distpool.node.node import Node
    from distpool.transport.ioloop import Timer

_TRY_AGAIN = 1.0  # seconds after a failure during which calls fail at once, with the same error
_NEWS = 0.5  # seconds in which pid 1 mostly says of a process whose link is lost that it is gone, and how
_LAST_WORDS = 10_000  # characters of what it printed last that go with that news
_DOUBT = 2.0  # seconds that a link has to show that it lives, when the other side wants a new one
#: A REVOKE of nothing: it changes nothing there, and is answered.
_QUESTION = structs.Revoke(0, 0, 0, 0).pack()
_Parts = tuple[Kind, bytes, Any, list[Any]]
#: `failed(text, denied)`: why the link was not made; `denied`: the two have different cookies.
_Failed = Callable[[str, bool], object]


#: What goes from and to pid 1 only; kinds below PEER are of that sort, too.
_OF_PID_1 = frozenset(
    {
        Kind.WHERE,
        Kind.ADDRESS,
        Kind.DIAL,
        Kind.UNDIALLED,
        Kind.IDENTITY,
        Kind.DEAD,
        Kind.RELAY,
        Kind.FORWARD,
        Kind.WANTED,
    }
)


class Peers:
    """The other members as this process reaches them."""

    def __init__(self, node: Node) -> None:
        self.requests = Requests()
        self.dead: dict[int, Callable[[], BaseException]] = {}  # pid -> makes the error of whoever asks for it
        self.parting: set[int] = set()  # pid 1: workers that are being removed: they take no new calls
        self.on_lost: list[Callable[[int], object]] = []  # leader: upper layers forget a pid
        self.on_unlinked: list[Callable[[int], object]] = []  # leader: the link to a worker is lost; it may live
        self.opened = 0  # links between workers that this process has made or taken
        self._node = node
        self._links: dict[int, Link] = {}
        self._waiting: dict[int, list[_Parts]] = {}  # leader
        # pids that a link is being made to, and who wants to hear of a failure; leader
        self._dialling: dict[int, list[_Failed]] = {}
        self._doubted: dict[int, Callable[[], None]] = {}  # pid -> makes a new link if the one we have is dead; leader
        self._problems: dict[int, Callable[[], BaseException]] = {}  # pid -> why no link can be made; leader
        self._ready: dict[int, Ready] = {}  # pid -> set when `ensure` may look again
        self._late: dict[int, Timer] = {}  # pid -> ends the attempt to reach it that is under way; leader
        #: Links that a manager has made, and whom to tell which pid the other side has. Leader.
        self._unproved: dict[Link, Callable[[int], object]] = {}
        #: `f(pid, connect_at) -> streams`: user code, on a library thread; set where a transport has a manager.
        self.connect_by_manager: Callable[[int, str], Adopted] = _no_manager

    # -- sending (any thread) ----------------------------------------------------------------------------------

    def link(self, pid: int) -> Link | None:
        """The link to `pid` if there is one."""
        return self._links.get(pid)

    def send(self, pid: int, kind: Kind, control: bytes, body: Any = b"", buffers: Any = ()) -> None:
        """Send a frame, now or when the link has been made; to a dead process: nowhere (its requests have failed)."""
        link = self._links.get(pid)
        if link is not None:
            link.send(kind, control, body, [link.segments.stage(buffer) for buffer in buffers] if buffers else ())
        elif pid not in self.dead:
            self._node.loop.call_soon(lambda: self._send_later(pid, (kind, control, body, list(buffers))))

    def known(self) -> list[int]:
        """Pids that this process has links to (pid 1: all members), and its own."""
        return sorted({*self._links, self._node.pid})

    def ask_workers(self) -> list[int]:
        """On a worker: what pid 1 says. Not on the leader."""
        return self.members_asked(self._node)

    #: Set by the layer that can make remote calls.
    members_asked: Callable[[Node], list[int]] = staticmethod(lambda node: [])

    def ensure(self, pid: int) -> None:
        """Wait until there is a link to `pid`. Not on the leader.

        ValueError: no such process. ProcessExitedException: it is gone. TopologyError: not connected by design.
        """
        if pid in self._links and pid not in self.parting:
            return
        self.check(pid)
        self._node.loop.check_wait()
        event = self._ready.setdefault(pid, Ready())
        self._node.loop.call_soon(lambda: self._open(pid))
        loop = self._node.loop
        if not loop.lead(event.is_set):
            event.wait(loop)
        if event.problem is not None:
            raise event.problem()
        self.check(pid)
        if pid not in self._links:
            raise UnreachableError(f"no connection to process {pid}")

    def check(self, pid: int) -> None:
        """Raise what is known to be wrong with `pid`."""
        dead = self.dead.get(pid)
        if dead is not None:
            raise _unstarted(dead())
        if pid in self.parting:
            raise errors.ProcessExitedException(pid, None, False, "", "it is being removed")
        problem = self._problems.get(pid)
        if problem is not None:
            raise problem()
        if self._node.is_master and pid not in self._links:
            group = self._node.group
            if group is None or pid not in group.members:
                raise ValueError(f"no process with id {pid} exists")

    # -- links (leader) ----------------------------------------------------------------------------------------

    def add(self, pid: int, link: Link) -> None:
        """The link to `pid` is there: send what waited, then let everybody use it."""
        for kind, control, body, buffers in self._waiting.pop(pid, ()):
            staged = [link.segments.stage(buffer) for buffer in buffers] if buffers else ()
            link.send(kind, control, body, staged)
        self._links[pid] = link
        self._announce(pid)

    def _announce(self, pid: int, problem: Callable[[], BaseException] | None = None) -> None:
        late = self._late.pop(pid, None)
        if late is not None:
            late.cancel()
        event = self._ready.pop(pid, None)
        if event is not None:
            event.problem = problem
            event.set()

    def _send_later(self, pid: int, parts: _Parts) -> None:
        link = self._links.get(pid)
        if link is not None:
            self.send(pid, *parts)
        elif pid in self._problems and parts[0] is Kind.CLIENTS:
            relay = messages.Relay(pid, int(parts[0]))
            self.send(1, Kind.RELAY, relay.pack(), parts[1])
        elif pid in self._problems:  # whoever uses a reference has not asked `check`
            self.requests.fail(pid, self._problems[pid])
        elif pid not in self.dead:
            self._waiting.setdefault(pid, []).append(parts)
            self._open(pid)

    def _open(self, pid: int) -> None:
        if pid in self._links or pid in self.dead or pid in self._problems or pid == self._node.pid:
            self._announce(pid)
        elif self._node.master_link is not None:
            self._node.master_link.send(Kind.WHERE, messages.Where(pid).pack())
            if pid not in self._late:
                self._late[pid] = self._node.loop.call_later(config.worker_timeout(), lambda: self._too_late(pid))
        elif self._node.group is None or pid not in self._node.group.members:
            self._waiting.pop(pid, None)
            self._announce(pid)
        # else: a member that has not joined yet: `add` will come

    def _too_late(self, pid: int) -> None:
        seconds = config.worker_timeout()
        self._give_up(
            pid, lambda: UnreachableError(f"no connection to process {pid} within {seconds:g} seconds"), False
        )

    def _give_up(self, pid: int, make_error: Callable[[], BaseException], for_good: bool = True) -> None:
        """No link will come (for now): whoever waits hears why."""
        self._problems[pid] = make_error
        if not for_good:
            self._node.loop.call_later(_TRY_AGAIN, lambda: self._problems.pop(pid, None))
        waiting = self._waiting.pop(pid, ())
        self.requests.fail(pid, make_error)
        for parts in waiting:
            if parts[0] is Kind.CLIENTS:
                self._send_later(pid, parts)
        self._announce(pid, make_error)

    def on_address(self, link: Link, frame: Frame) -> None:
        """Worker: pid 1 says where a process listens, or why there will be no link."""
        message = messages.Address.unpack(frame.control)
        pid = message.pid
        if message.problem == "":
            self._dial(pid, message.address, message.shares_memory, lambda *why: self._not_reached(pid, message, *why))
        elif message.problem == "topology":
            self._give_up(pid, lambda: TopologyError(message.detail))
        elif message.problem == "unreachable":
            self._give_up(pid, lambda: UnreachableError(message.detail), for_good=False)
        elif message.problem == "denied":
            self._give_up(pid, lambda: AuthenticationError(message.detail), for_good=False)
        elif message.problem == "unknown":
            self._give_up(pid, lambda: ValueError(f"no process with id {pid} exists"))
            self._node.loop.call_soon(lambda: self._problems.pop(pid, None))  # it may come to exist

    def _not_reached(self, pid: int, told: messages.Address, text: str, denied: bool) -> None:
        """We cannot dial it: perhaps it can dial us, if it has not tried already, and has our cookie."""
        if denied:
            self._give_up(pid, lambda: AuthenticationError(text), for_good=False)
        elif told.detail:
            head = f"process {self._node.pid} and process {pid} cannot be connected"
            both = f"{head}: {text}, and {told.detail}. Calls through process 1 go on."
            self._give_up(pid, lambda: UnreachableError(both), for_good=False)
        elif self._node.master_link is not None:
            self._node.master_link.send(Kind.WHERE, messages.Where(pid, text).pack())

    def on_dial(self, link: Link, frame: Frame) -> None:
        """Worker: another one needs a link to us, and we are to make it."""
        message = messages.Dial.unpack(frame.control)

        def failed(text: str, denied: bool) -> None:
            link.send(Kind.UNDIALLED, messages.Undialled(message.pid, text, message.detail, denied).pack())

        def make() -> None:
            self._dial(message.pid, message.address, message.shares_memory, failed)

        old = self._links.get(message.pid)
        if old is None:
            make()
        else:
            self._doubt(message.pid, old, make)

    def _doubt(self, pid: int, link: Link, make: Callable[[], None]) -> None:
        """The other side wants a link although we have one. Either it is so young that it has not heard of it, or it
        has lost it and we have not noticed: then what we send there is refused, or nobody acknowledges it.

        Tried: waiting whether something comes. Those who both need a link ask for it both, one of the orders may be
        late, and who waits for the answer to a long call sends nothing.
        """
        self._doubted[pid] = make
        before = link.bytes_in
        link.send(Kind.REVOKE, _QUESTION)

        def look() -> None:
            if self._doubted.get(pid) is make and self._links.get(pid) is link:
                del self._doubted[pid]
                if link.bytes_in == before and not link.acknowledged:
                    link.close(TimeoutError("the other side has lost it"))
                    make()

        # Of a manager's streams no kernel tells: a process that is stopped, or holds the GIL, shall not be cut off.
        seconds = _DOUBT if link.adopted is None else max(_DOUBT, config.silent_seconds())
        self._node.loop.call_later(seconds, look)

    def on_identity(self, link: Link, frame: Frame) -> None:
        """Worker: the cluster's certificate and key, for the encrypted link that is needed next."""
        if link is self._node.master_link:
            message = messages.IdentityIs.unpack(frame.control)
            self._node.identity = importlib.import_module("distpool.transport.tls").Identity(
                message.certificate, message.key
            )

    def _dial(self, pid: int, address: list[Any], shares_memory: bool, failed: _Failed) -> None:
        """Connect, on a library thread because it may take long; `failed` follows on the leader, or a link."""
        if pid in self._links or pid in self.dead:
            return
        # Both sides may need the link at the same moment; two of them would mean frames that overtake.
        self._dialling.setdefault(pid, []).append(failed)
        if len(self._dialling[pid]) > 1:
            return
        call_soon, identity = self._node.loop.call_soon, self._node.identity

        def work() -> None:
            adopted: Adopted | None = None
            try:
                if address[0] == "manager":
                    adopted = self.connect_by_manager(pid, address[1])
                    stream: Stream = adopted.stream
                else:
                    stream = dial(tuple(address), min(config.silent_seconds(), config.worker_timeout()), identity)
            except BaseException as error:  # whatever the manager's `connect` raises: it is why there is no link
                text = f"process {self._node.pid} cannot connect to process {pid} at {_spell(address)}: {error}"
                call_soon(lambda: self._not_dialled(pid, text))
            else:
                call_soon(lambda: self._greet(pid, stream, shares_memory, adopted))

        self._node.deliver(work)

    def _not_dialled(self, pid: int, text: str, denied: bool = False) -> None:
        for failed in self._dialling.pop(pid, ()):
            failed(text, denied)

    def _greet(self, pid: int, stream: Stream, shares_memory: bool, adopted: Adopted | None) -> None:
        """There is a connection that we have made: authenticate, and say who we are."""
        node = self._node
        if pid in self._links or pid in self.dead:
            self._dialling.pop(pid, None)
            stream.close()
            if adopted is not None:
                adopted.end()
            return

        def ready(link: Link) -> None:
            link.shares_memory = shares_memory
            link.send(Kind.PEER, messages.Peer(node.pid, shares_memory).pack())
            if adopted is None:
                reached(pid)
            else:
                self._unproved[link] = reached

        def reached(who: int) -> None:
            timer.cancel()
            if who == pid:
                self._dialling.pop(pid, None)
                self._adopt(pid, link)
            else:  # a manager's streams may lead anywhere
                link.close(ConnectionError(f"the manager connected to process {who}, not to process {pid}"))

        handshake = Handshake(Role.CONNECTOR, node.cookie)

        def closed(link: Link, reason: BaseException | None) -> None:
            timer.cancel()
            if adopted is not None:
                adopted.end()
                self._unproved.pop(link, None)
            if link.segments is None:  # it had not come up
                text = f"the connection of process {node.pid} to process {pid} ended: {reason or 'it may be ending'}"
                self._not_dialled(pid, text, isinstance(reason, AuthenticationError))
            self._closed(pid, link, reason)

        link = Link(node.loop, stream, handshake, ready, self.on_frame, closed)
        link.peer, link.adopted = pid, adopted
        late = TimeoutError("it did not answer the handshake")
        timer = node.loop.call_later(config.worker_timeout(), lambda: link.close(late))
        if adopted is not None:
            adopted.watch(node.loop, lambda: link.close(None))
        link.open()

    def _adopt(self, pid: int, link: Link) -> None:
        link.peer = pid
        link.segments = Segments(link, self._node.segments)
        self._node.links.add(link)
        self.opened += 1
        self.add(pid, link)

    def on_frame(self, link: Link, frame: Frame) -> None:
        """A frame on a link between workers."""
        if frame.kind == Kind.PEER:
            # Also if there is a link: its end has not been noticed here yet, and the dialler uses this one.
            message = messages.Peer.unpack(frame.control)
            if link in self._unproved:
                self._unproved.pop(link)(message.pid)
                return
            if link.peer is not None or message.pid in (0, 1, self._node.pid) or message.pid in self.dead:
                link.close(ProtocolError(f"a process that cannot be process {message.pid} says it is"))
                return
            link.shares_memory = message.shares_memory
            self._adopt(message.pid, link)
        elif frame.kind == Kind.SEGMENTS_FREE and link.segments is not None:
            link.segments.on_free(messages.SegmentsFree.unpack(frame.control).segments)
        elif link.peer is not None:
            if frame.kind < Kind.PEER or frame.kind in _OF_PID_1:
                link.close(ProtocolError(f"process {link.peer} sent what only process 1 may send"))
                return
            self._node.dispatch(link, frame)

    def on_closed(self, link: Link, reason: BaseException | None) -> bool:
        """A link between workers has ended; False if it was none."""
        if link.peer is None or self._links.get(link.peer) is not link:
            return False
        self._closed(link.peer, link, reason)
        return True

    def _closed(self, pid: int, link: Link, reason: BaseException | None = None) -> None:
        """The peer is dying, or the connection is broken: pid 1 will say which; until then a new link may be tried.

        What waits for an answer fails with pid 1's news, which tells exit code and last words, or a moment later
        without: there is no answer on a new link to what was asked on this one.
        """
        self._node.links.discard(link)
        if link.segments is not None:
            link.segments.close()
        if self._links.get(pid) is link:
            del self._links[pid]
            text = f"its connection to process {self._node.pid} was lost" + (f": {reason}" if reason else "")
            asked = self.requests.pending(pid)

            def fail() -> None:
                self.requests.fail(pid, lambda: errors.ProcessExitedException(pid, None, True, "", text), asked)

            if asked:
                self._node.loop.call_later(_NEWS, fail)
            for callback in self.on_unlinked:
                callback(pid)
            make = self._doubted.pop(pid, None)
            if make is not None:
                make()

    # -- pid 1 (leader) ----------------------------------------------------------------------------------------

    def on_relay(self, link: Link, frame: Frame) -> None:
        """Pid 1: pass a control frame on."""
        message = messages.Relay.unpack(frame.control)
        if message.pid == self._node.pid:
            self._node.dispatch(link, Frame(message.relayed, bytes(frame.body), b"", []))
        else:
            self.send(message.pid, Kind(message.relayed), bytes(frame.body))

    # -- deaths (leader) ---------------------------------------------------------------------------------------

    def on_dead(self, link: Link, frame: Frame) -> None:
        """Worker: pid 1 says that a process is gone."""
        if link is not self._node.master_link:
            return  # who has workers of his own may tell them, and nobody else
        message = messages.Dead.unpack(frame.control)
        pid, code, output, reason = message.pid, message.exitcode, message.output, message.reason
        self.mark_dead(pid, lambda: errors.ProcessExitedException(pid, code, True, output, reason))

    def mark_dead(self, pid: int, make_error: Callable[[], BaseException]) -> None:
        """The process is gone for good: idempotent."""
        if pid in self.dead:
            return
        self.dead[pid] = make_error
        self.parting.discard(pid)
        link = self._links.get(pid)
        if link is not None and link is not self._node.master_link and not self._node.is_master:
            link.read_rest()  # pid 1 may be quicker than its last words, among them items that it has put ahead
        link = self._links.pop(pid, None)
        if link is not None and link is not self._node.master_link and not self._node.is_master:
            with contextlib.suppress(OSError):
                link.close(None)
        self._waiting.pop(pid, None)
        self.requests.fail(pid, make_error)
        for callback in list(self.on_lost):  # some of them leave
            callback(pid)
        self._announce(pid)

    def obituary(self, pid: int) -> bytes:
        """Pid 1: what it tells of a dead process."""
        error: Any = self.dead[pid]()
        return messages.Dead(pid, error.exitcode, error.reason, error.output[-_LAST_WORDS:]).pack()

    def broadcast_dead(self, pid: int, members: Container[int]) -> None:
        """Pid 1: tell every worker. (In a task that has an executor: its own `members`.)"""
        packed = self.obituary(pid)
        for other, link in list(self._links.items()):
            if other != pid and other in members:
                link.send(Kind.DEAD, packed)


def _unstarted(error: BaseException) -> BaseException:
    """The error of a call that was never sent."""
    if isinstance(error, errors.ProcessExitedException):
        error.maybe_ran = False
        error.args = (*error.args[:2], False, *error.args[3:])
    return error


def _no_manager(pid: int, connect_at: str) -> Adopted:
    raise ConnectionError("it is behind a custom transport, and `init_worker` was given no manager to connect by")


def _spell(address: list[Any]) -> str:
    """An address, for people."""
    if address[0] == "manager":
        return "the place that its manager knows"
    return ":".join(str(part) for part in address[1:])
