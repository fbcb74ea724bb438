"""The I/O loop: one selector, its timers, and the question which thread runs it (layer 2).

    leader    the one thread that polls, reads sockets and runs handlers, under `_leading`
    I/O thread   leads whenever nobody else does (daemon; started by the first `start`)
    claimant  a thread that waits for a result takes the lead from the I/O thread and reads the answer itself:
              that saves two thread hand-overs of about 13 us (and twice that across CPUs) per lonely call

Handlers run on the leader, whichever thread that is; so handlers never run concurrently and must never run user code
or block. When a claimant leaves, the I/O thread does not take over at once (that would cost the hand-over which was
to be saved) but after `config.GRACE` seconds without a leader, or immediately if other threads wait for handlers.

Ctrl-C, and whatever the user's signal handlers raise, must not tear our handlers in the main thread: it leads only
while signals are deferred (`transport.deferral`). If SIGINT has a handler of the user's own, it does not lead. A signal
handler that runs in its poll, and waits for something, leads in there: nothing is half done, and nobody else could.
"""

from __future__ import annotations

import collections
import contextlib
import heapq
import itertools
import select
import socket
import threading
import time
from collections.abc import Callable

from distpool import config
from distpool.depth import is_deep
from distpool.hints import Any, Protocol
from distpool.logs import Log
from distpool.transport import polling
from distpool.transport.deferral import Deferral

log = Log("ioloop")
_MAX_CRASHES = 10  # of the I/O thread itself, one after another: a poller that is broken for good must not spin
#: RuntimeError of whoever would wait for ever; see `IoLoop.check_wait`.
ON_LEADER = (
    "a finalizer cannot wait here: it runs in the middle of something that has to end before anything can be received"
)
_LONGEST = 86400.0  # seconds of one poll: epoll refuses more than 24 days; waits and timers look again


class Timer:
    """A call at a later time; `cancel()` may be called from any thread, any number of times."""

    __slots__ = ("callback", "cancelled", "when")

    def __init__(self, when: float, callback: Callable[[], object]) -> None:
        self.when = when
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        """The callback will not run any more (if it has not begun)."""
        self.cancelled = True
        self.callback = _nothing  # it may be hours until its time: what it was about need not wait for that


def _nothing() -> None:
    pass


class Guard(Protocol):
    """Keeps interrupts of the user's calls out of the library: see `node.interrupts`, which is it in workers."""

    def enter(self, wake: Callable[[], object] | None) -> Any: ...
    def leave(self, inside: Any) -> None: ...


class IoLoop:
    """Selector, timers and the leader's lock. Every public method may be called from any thread."""

    def __init__(self, name: str = "distpool-io") -> None:
        self._name = name
        self._poller: Any = polling.Epoll() if hasattr(select, "epoll") else polling.Selector()
        self._glances = polling.Glances(self._poller)
        self._leading = threading.Lock()  # held by the leader while it polls and runs handlers
        self._handlers: dict[int, Callable[[int], None]] = {}  # descriptor -> handler; changed by any thread (atomic)
        self._soon: collections.deque[Callable[[], object]] = collections.deque()
        self._timers: list[tuple[float, int, Timer]] = []
        # Protects _timers. Reentrant: the collector may run a `__del__` inside that comes here again; what changes the
        # heap are single operations of `heapq`, which run no Python code.
        self._timer_lock: Any = threading.RLock()
        self._order = itertools.count()
        self._claims = 0  # claimants that wait for the lead; only a hint for the I/O thread
        self._claimed = False  # a claimant leads (not the I/O thread); only a hint
        self._turns = 0  # how often a claimant has led; only a hint
        self._followers = 0  # threads that wait for handlers without leading; only a hint
        #: Released: the I/O thread shall lead at once. A lock and not an Event, whose `set` takes a lock of its own: it
        #: could not be called by a `__del__` that the collector runs in the middle of another `set`.
        self._hurry = threading.Lock()
        self._hurry.acquire()
        self._thread: threading.Thread | None = None
        self._leader_id = 0
        self._stopped = False
        self._deferral = Deferral()
        self._main = threading.main_thread().ident  # compared with: `current_thread() is main_thread()` costs 0.2 us
        #: Whether the calling thread has this lock, of those that the leader may have to wait for.
        self.held: list[Callable[[], bool]] = [self._timer_lock._is_owned]  # type: ignore[attr-defined]
        self.guard: Guard | None = None  # workers: keeps interrupts of calls out of the library
        self.owns_interrupts = False  # workers: their own SIGINT handler never raises inside the library
        # Called by the I/O thread before each poll; returns how long the poll may take (workers: flush of results).
        self.on_tick: Callable[[], float | None] | None = None
        self.on_crash: Callable[[BaseException], object] | None = None
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._woken = False
        self._handlers[self._wake_reader.fileno()] = self._drain_wakes
        self._poller.add(self._wake_reader.fileno())

    # -- registration ------------------------------------------------------------------------------------------

    def register(self, source: Any, on_readable: Callable[[], None]) -> None:
        """Call `on_readable()` on the leader whenever `source` (socket or descriptor) is readable or at its end."""
        descriptor = source if isinstance(source, int) else source.fileno()
        self._handlers[descriptor] = lambda events: on_readable()
        self._poller.add(descriptor)
        self._changed()

    def register_link(self, source: Any, handler: Callable[[int], None]) -> None:
        """As `register`, but the handler gets 1 for readable, 2 for writable, 3 for both."""
        descriptor = source.fileno()
        self._handlers[descriptor] = handler
        self._poller.add(descriptor)
        self._changed()

    def want_write(self, source: Any, wanted: bool) -> None:
        """Report also when `source` can be written (or no longer)."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            self._poller.modify(source.fileno(), wanted)
        self._changed()

    def _changed(self) -> None:
        """A poll that is under way sees the change with epoll, but not with select."""
        if not self._poller.live and not self.leads:
            self.wake()

    def unregister(self, source: Any) -> None:
        """Forget `source`; call it before closing it. Unknown sources are ignored."""
        descriptor = source if isinstance(source, int) else source.fileno()
        if self._handlers.pop(descriptor, None) is not None:
            with contextlib.suppress(OSError, ValueError, KeyError):
                self._poller.remove(descriptor)

    # -- work for the leader -----------------------------------------------------------------------------------

    def call_soon(self, callback: Callable[[], object]) -> None:
        """Run `callback()` on the leader, soon."""
        self._soon.append(callback)
        self.wake()

    def call_later(self, seconds: float, callback: Callable[[], object]) -> Timer:
        """Run `callback()` on the leader after `seconds`."""
        timer = Timer(time.monotonic() + seconds, callback)
        with self._timer_lock:
            heapq.heappush(self._timers, (timer.when, next(self._order), timer))
            first = self._timers[0][2] is timer
        if first and (self._leader_id != threading.get_ident() or self._deferral.at_rest):
            self.wake()
        return timer

    def wake(self) -> None:
        """Make the leader come out of its poll."""
        if not self._woken:
            try:
                self._woken = True
                self._wake_writer.send(b"\0")
            except BlockingIOError:
                pass  # full: it will wake anyway
            except OSError:  # no memory for a byte, or closed: nobody is there
                self._woken = False
                self._wake_without_a_byte()
            except BaseException:
                # Ctrl-C in the main thread: with the flag set and no byte sent, nothing could wake the leader again.
                self._woken = False
                raise

    def _wake_without_a_byte(self) -> None:
        """There is always room to write where the leader reads wakes: it takes no memory to have that reported. (Only
        epoll sees it at once; its changes are atomic.)"""
        if self._poller.live:
            with contextlib.suppress(OSError, ValueError):
                self._poller.modify(self._wake_reader.fileno(), True)

    def _drain_wakes(self, events: int) -> None:
        if events & 2:
            with contextlib.suppress(OSError, ValueError):
                self._poller.modify(self._wake_reader.fileno(), False)
        # In this order: a `wake` between the two has its reason looked at in this round. The other way round, its byte
        # would be read here while `_woken` stays set, and no later `wake` would reach the poll.
        with contextlib.suppress(BlockingIOError):
            self._wake_reader.recv(4096)
        self._woken = False

    @property
    def leads(self) -> bool:
        """Whether the calling thread is the leader."""
        return self._leader_id == threading.get_ident()

    def check_wait(self) -> None:
        """RuntimeError if the calling thread must not wait for what the leader brings.

        The collector runs a user's `__del__` in the middle of anything. On the leader, or in a thread that has a lock
        which the leader needs, a wait would never end.
        """
        if not self.may_wait:
            raise RuntimeError(ON_LEADER)

    @property
    def may_wait(self) -> bool:
        """Whether the calling thread may wait for what the leader brings; see `check_wait`."""
        me = threading.get_ident()
        if self._leader_id == me and not (me == self._main and self._deferral.at_rest):
            return False
        return not any(held() for held in self.held)

    # -- leading -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the I/O thread (once)."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run_thread, name=self._name, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the I/O thread and close what the loop owns. Called in the process that made the loop."""
        self._stopped = True
        self.hurry()
        self._woken = False
        self.wake()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(5.0)
        self.close_descriptors()

    def forked(self) -> None:
        """In a forked child: of what was the parent's, nothing stays in its way."""
        self._deferral.forked()
        self.close_descriptors()

    def close_descriptors(self) -> None:
        """Only close, never unregister: in a forked child the selector is shared with the parent."""
        self._poller.close()
        self._wake_reader.close()
        self._wake_writer.close()

    def lead(self, until: Callable[[], bool], deadline: float | None = None, brisk: bool = False) -> bool:
        """Run the loop in this thread until `until()` holds or `deadline` (monotonic seconds) has passed.

        `brisk`: what is waited for may come so soon that it is worth a look before sleeping (`polling`).

        False: this thread may not lead now (another claimant does, it is the main thread and Ctrl-C belongs to the
        user, or it is near the recursion limit): the caller has to wait by other means, and the I/O thread will run the
        handlers. KeyboardInterrupt: it runs a call of the user's that was interrupted.
        """
        guard = self.guard
        inside = guard.enter(self.wake) if guard is not None else None
        if guard is None or inside is None:
            # A thread of a worker's that runs no call of the user's is never deep.
            return (guard is not None or not is_deep()) and self._lead_if_free(until, deadline, brisk)
        try:
            return not is_deep() and self._lead_if_free(lambda: inside.struck or until(), deadline, brisk)
        finally:
            guard.leave(inside)

    def glance(self) -> None:
        """Run the handlers of what is ready now, without waiting. For threads that are busy with something longer: the
        I/O thread would get the interpreter from them only after 5 ms. Nothing happens where this thread may not lead.
        """
        if self.may_wait:
            looked: list[None] = []
            self._soon.append(lambda: looked.append(None))  # while something is there, no poll waits
            self.lead(lambda: bool(looked))

    def _lead_if_free(self, until: Callable[[], bool], deadline: float | None, brisk: bool) -> bool:
        deferral = self._deferral if threading.get_ident() == self._main else None
        # From here on signals may only strike inside the poll: between `acquire` and `try` one would leave the lock
        # held.
        if deferral is not None and not deferral.enter(not self.owns_interrupts):
            return False
        try:
            if deferral is not None and deferral.at_rest and self._leader_id == self._main:
                return self._lead_inside(until, deadline, deferral)
            if not self._leading.acquire(blocking=False) and not self._claim(deadline):
                return False
            try:
                self._leader_id = threading.get_ident()
                self._turns += 1
                self._lead(until, deadline, brisk, deferral)
            finally:
                self._leader_id = 0
                self._leading.release()
                if self._followers:
                    self.hurry()
        finally:
            if deferral is not None:
                deferral.leave()
        return True

    def _lead_inside(self, until: Callable[[], bool], deadline: float | None, deferral: Deferral) -> bool:
        """A signal handler waits in the poll of this very thread, which leads."""
        if not self.may_wait:
            return False
        try:
            self._lead(until, deadline, False, deferral)
        finally:
            self.wake()  # the outer poll has to look again how long it may take
        return True

    def _claim(self, deadline: float | None) -> bool:
        """Take the lead from the I/O thread, which is asked to step back; False if another claimant has it."""
        if self._claims or self._leader_id == threading.get_ident() or self._claimed:
            return False
        self._claims += 1
        try:
            self.wake()
            patience = 0.25 if deadline is None else max(0.0, min(0.25, deadline - time.monotonic()))
            return self._leading.acquire(timeout=patience)
        finally:
            self._claims -= 1

    def _lead(self, until: Callable[[], bool], deadline: float | None, brisk: bool, deferral: Deferral | None) -> None:
        before, self._claimed = self._claimed, True
        rest = False
        if deferral is not None:
            rest, deferral.at_rest = deferral.at_rest, False
        poll = self._glances.poll if brisk else self._poller.poll
        try:
            while not until():
                timeout = None
                if deadline is not None:
                    timeout = deadline - time.monotonic()
                    if timeout <= 0:
                        break
                self._run_once(timeout, poll, deferral)
        finally:
            self._claimed = before
            if deferral is not None:
                deferral.at_rest = rest

    def _run_once(
        self,
        timeout: float | None,
        poll: Callable[[float | None], list[tuple[int, int]]],
        deferral: Deferral | None = None,
    ) -> None:
        timeout = self._next_timeout(timeout)
        if timeout is not None and timeout > _LONGEST:
            timeout = _LONGEST
        if deferral is not None:
            while deferral.late:  # also what comes as `deliver` returns
                deferral.deliver()
            deferral.may_raise = True  # nothing is called between the look and this
            ready = poll(timeout)
            deferral.may_raise = False
        else:
            ready = poll(timeout)
        handlers = self._handlers
        for descriptor, events in ready:
            handler = handlers.get(descriptor)
            if handler is not None:
                try:
                    handler(events)
                except BaseException as error:  # a defect of ours: everything that waits must hear of it
                    self._crashed(error)
        if self._soon or self._timers:
            self._run_due()

    def _next_timeout(self, timeout: float | None) -> float | None:
        if self._soon:
            return 0.0
        if self._timers:
            with self._timer_lock:
                while self._timers and self._timers[0][2].cancelled:
                    first = heapq.heappop(self._timers)
                    if not first[2].cancelled:  # another one came, by a `__del__`, between the look and the pop
                        heapq.heappush(self._timers, first)
                        break
                if self._timers:
                    wait = max(0.0, self._timers[0][0] - time.monotonic())
                    return wait if timeout is None else min(wait, timeout)
        return timeout

    def _run_due(self) -> None:
        soon = self._soon
        for _ in range(len(soon)):
            self._guarded(soon.popleft())
        while self._timers and self._timers[0][0] <= time.monotonic():
            with self._timer_lock:
                if not self._timers:
                    break
                timer = heapq.heappop(self._timers)[2]
            if not timer.cancelled:
                self._guarded(timer.callback)

    def _guarded(self, callback: Callable[[], object]) -> None:
        try:
            callback()
        except BaseException as error:
            self._crashed(error)

    def _crashed(self, error: BaseException) -> None:
        """A handler has not come to its end: what it had in hand is lost. (Not only by defects: a program may have an
        exception thrown into any of its threads, to end what that does.)

        Who waits hears of it first: there may be no memory to load `logging` with."""
        try:
            if self.on_crash is not None:
                self.on_crash(error)
        except Exception:  # short of memory as well; nobody else is to pay for it, whoever leads
            log.exception("not everybody could be told of an internal error in the I/O loop")
        finally:
            log.error("internal error in the I/O loop", exc_info=error)
        if not isinstance(error, Exception) and self._thread is not threading.current_thread():
            raise error  # for the one who leads

    # -- the I/O thread ----------------------------------------------------------------------------------------

    def _run_thread(self) -> None:
        crashes = 0
        while not self._stopped and crashes < _MAX_CRASHES:
            try:
                with self._leading:
                    self._leader_id = threading.get_ident()
                    try:
                        while not self._stopped and not self._claims:
                            self._run_once(self.on_tick() if self.on_tick is not None else None, self._poller.poll)
                            crashes = 0
                    finally:
                        self._leader_id = 0
                self._step_back()
            except Exception as error:  # a defect of ours, or descriptors closed under us: who waits must hear of it
                crashes += 1
                if not self._stopped:
                    with contextlib.suppress(Exception):  # of the log, say: this thread goes on
                        self._crashed(error)
            except BaseException:  # thrown in by the program, while no handler had anything in hand
                log.warning("an exception was thrown into the I/O thread", exc_info=True)

    def _step_back(self) -> None:
        """Return when this thread should lead again: nobody has led for a while, or somebody hurries us.

        Ticks only while claimants come and go; behind a claimant that stays, we block on the lock itself.
        """
        self._hurry.acquire(blocking=False)
        while not self._stopped:
            turns = self._turns
            if self._hurry.acquire(timeout=config.GRACE):
                return
            if turns == self._turns:
                return  # a sitting leader (we then wait on its lock) or none at all

    def hurry(self) -> None:
        """Let the I/O thread lead at once, if it has stepped back and nobody leads."""
        with contextlib.suppress(RuntimeError):  # it has been told already
            self._hurry.release()

    @contextlib.contextmanager
    def following(self, wake: Callable[[], object] | None = None) -> Any:
        """While this thread waits for handlers without leading, leaders that leave wake the I/O thread at once.

        `wake()` ends the wait, for calls that are interrupted: KeyboardInterrupt on leaving the context. Gives an
        object whose `struck` says so, or None.
        """
        guard = self.guard
        inside = guard.enter(wake) if guard is not None and wake is not None else None
        self._followers += 1
        self.hurry()
        try:
            yield inside
        finally:
            self._followers -= 1
            if guard is not None and inside is not None:
                guard.leave(inside)

    def enter_critical(self) -> bool:
        """Defer signals in the main thread until `leave_critical`. False: impossible here, let the leader do it."""
        if threading.get_ident() != self._main:
            return True
        return self._deferral.enter(not self.owns_interrupts)

    def leave_critical(self) -> None:
        """End of what `enter_critical` began; raises a KeyboardInterrupt that came meanwhile."""
        if threading.get_ident() == self._main:
            self._deferral.leave()
