"""`RemoteFuture`: a Future whose value lives on another process until it is fetched (layer 4).

    creator: NOTICE (no value) -> done;  result()/fetch() -> REFERENCE "fetch" -> value here, handle given back
    others:  whoever waits or asks -> REFERENCE "watch" / "fetch" / "isready"

States beyond those of `Future`: `_raw.status` REMOTE_VALUE or REMOTE_ERROR means "it has ended, the value is still at
its owner". Errors of user code are `RemoteException` here (Julia's rule), not the original exception.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import time
import weakref
from typing import TYPE_CHECKING, Any

from distpool.errors import ProcessExitedException, RemoteException, TopologyError
from distpool.node import node as nodes
from distpool.refs import gc
from distpool.refs.ahead import settle_puts
from distpool.refs.finalized import FINALIZED, refuse_state
from distpool.refs.gc import Handle, Reference, Refs
from distpool.refs.lent import received
from distpool.refs.owner import RRID
from distpool.refs.refs import LOCAL_VALUE, RAISED_HERE, REMOTE_ERROR, REMOTE_VALUE, Future, Outcome
from distpool.wire import codec, structs
from distpool.wire.failures import captured, encode_exception
from distpool.wire.frames import Kind
from distpool.wire.messages import ERROR, UNSENDABLE, VALUE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from distpool.transport.ioloop import IoLoop

SET_TWICE = "Future can be set only once"


class _Waiting:
    """The `_call` of a pending RemoteFuture: where its waiters wait."""

    brisk = True

    def __init__(self, refs: Refs) -> None:
        self._node = refs.node

    @property
    def loop(self) -> IoLoop:
        """The loop whose leader settles the future."""
        return self._node.loop

    def cancel(self) -> bool:
        """A remote call cannot be cancelled."""
        return False

    def started(self) -> bool:
        """It was sent."""
        return True

    def waiting(self) -> AbstractContextManager[object]:
        """A waiting remote call holds no slot of any executor, unless it waits inside a task."""
        if nodes.existing() is not self._node:
            raise RuntimeError(gc.FORKED)
        return self._node.given_away()


class RemoteFuture(Reference, Future[Any]):
    """A future owned by process `where`; see `distpool.Future`."""

    _told = False  # the owner will tell us when it is done
    _of_call = False  # ... of the call that was sent with it
    _transfer: Future[Any] | None = None
    _unreachable = False  # what it ended with is not the owner's answer, but that there is no way to ask it

    @classmethod
    def make(cls, refs: Refs, rrid: RRID, where: int, held: int, watched: bool = False) -> RemoteFuture:
        """The object of reference `rrid` in this process, which holds `held` counts at the owner."""
        future: RemoteFuture = object.__new__(cls)
        future._refs = refs
        future._handle = Handle(refs, rrid, where, held)
        future._call = _Waiting(refs)
        future._told = future._of_call = watched
        refs.live[rrid] = future
        return future

    # -- what Julia offers -------------------------------------------------------------------------------------

    def fetch(self, timeout: float | None = None) -> Any:
        """Wait for the value, move it here and return it; `RemoteException` if the call failed."""
        try:
            return self.result(timeout)
        finally:
            del self  # as in `Future.result`: no cycle exception -> traceback -> frame -> future

    def result(self, timeout: float | None = None) -> Any:
        """As `fetch`."""
        try:
            self._have(timeout)
            return super().result(timeout)
        finally:
            del self

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The exception of the call, or `None`; moves the value as `result` does."""
        self._have(timeout)
        return super().exception(timeout)

    def wait(self, timeout: float | None = None) -> RemoteFuture:
        """Wait until the call has ended, without moving its value; `RemoteException` if it failed."""
        try:
            self._usable()
            self._watch()
            if not self._is_over and not self._await(timeout):
                raise TimeoutError
            raw = self._raw
            failed = raw is not None and raw.status not in (VALUE, LOCAL_VALUE, REMOTE_VALUE)
            if failed or self._exception is not None:
                self.result(timeout)
            return self
        finally:
            del self

    def isready(self) -> bool:
        """Whether the value is there; asks the owner if this process does not know, and is then told of the end.
        TopologyError: this process has no link to the owner."""
        self._usable()
        if self._is_known:
            return True
        handle = self._live()
        self._watch()
        if handle.where != self._refs.node.pid and not self._is_known:
            answer = self._ask("isready")
            if codec.decode(answer.data) and not self._is_over:
                self._await(None)  # the notice is on its way, over the same link
        return self._is_over

    @property
    def _is_known(self) -> bool:
        """Whether it has ended, as far as its owner is concerned."""
        return self._is_over and not self._unreachable  # in this order: what ends it is noted first

    def put(self, value: Any) -> RemoteFuture:
        """Set the value, once; `RuntimeError` (`RemoteException` if another process was first) the second time."""
        self._put(Outcome(LOCAL_VALUE, value, (), 0))
        return self

    def _put(self, outcome: Outcome) -> None:
        """LOCAL_VALUE or RAISED_HERE, for this process and, through the owner, for all others."""
        handle = self._live()
        refs = self._refs
        if self._is_over:
            raise RuntimeError(SET_TWICE)
        if handle.where == refs.node.pid:
            settle_puts()
            if not refs.owner.settle(self._entry(), outcome):
                raise RuntimeError(SET_TWICE)
        else:
            seen: list[Any] = []
            if outcome.status == RAISED_HERE:
                answer = self._ask("fail", encode_exception(outcome.data, handle.where, seen=seen), [], seen)
            else:
                data, views = codec.encode(outcome.data, handle.where, seen)
                buffers = [bytearray(part) for part in views]  # and not bytes: arrays made of them can be written
                answer = self._ask("put", data, buffers, seen)
            if answer.status != VALUE:
                raise RemoteException(handle.where, captured(answer.failure))
            if outcome.status != RAISED_HERE and type(outcome.data) not in codec.SCALARS:
                # What was sent and not the caller's object, which he may change: all have the same value. Its
                # references are lent to us as to anyone who is sent it.
                with refs.lending(seen, refs.node.pid):
                    outcome = received(VALUE, data, buffers, handle.where)
        self._came(outcome)  # the owner's notice may have been quicker than its answer
        if outcome.status == LOCAL_VALUE:
            self._let_go()  # else when it is opened: should that fail, others have to get it from its owner

    def _set(self, result: Any, exception: BaseException | None) -> None:
        """`set_result` and `set_exception`: for whoever holds this reference, in whatever process."""
        if exception is None:
            outcome = Outcome(LOCAL_VALUE, result, (), 0)
        else:
            outcome = Outcome(RAISED_HERE, exception, (), 0)
        try:
            self._put(outcome)
        except RuntimeError as error:
            if str(error) != SET_TWICE:
                raise
            raise concurrent.futures.InvalidStateError(SET_TWICE) from None
        except RemoteException as error:
            raise concurrent.futures.InvalidStateError(str(error.captured.ex)) from None

    def cancel(self) -> bool:
        """False: a remote call cannot be cancelled. RuntimeError: a dead handle, or it was finalized."""
        self._usable()
        return super().cancel()

    def finalize(self) -> None:
        """Give the reference back now; any later use raises RuntimeError. May be called again."""
        super().finalize()
        if self._call is not None:  # pending: the owner's notice will find nobody, so who waits has to hear it here
            self._arrived(Outcome(RAISED_HERE, RuntimeError(FINALIZED), (), 0))
        refuse_state(self, FINALIZED)

    # -- settling ----------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name == "_condition" and self._call is not None:
            self._watch()  # somebody is about to wait
        return super().__getattr__(name)

    def add_done_callback(self, fn: Callable[[Future[Any]], object]) -> None:
        """Call `fn(self)` when the call has ended; the value is not moved for that."""
        self._usable()
        self._watch()
        self._refs.kept.add(self)  # whoever drops the future still wants the callback
        try:
            super().add_done_callback(fn)
        finally:  # Ctrl-C may come in the callback
            if self._is_over:
                self._refs.kept.discard(self)

    def _entry(self) -> Any:
        """The entry of a value that this process owns; from its first use on it counts this reference."""
        handle = self._live()
        self.hold(handle)
        return self._refs.owner.touch(handle.rrid)

    def hold(self, handle: Handle) -> None:
        """Be counted at the owner: a reference made by hand is known to it from its first use on. Sending it is a use:
        whoever gets it may set the value and drop it, and the value must not go with that."""
        refs = self._refs
        if handle.held:
            return
        with refs.lending((), handle.where):  # no interrupt between the two: it would give back what was not counted
            with refs._lock:
                first, handle.held = not handle.held, handle.held or 1
            if not first:
                return
            if handle.where == refs.node.pid:
                entry = refs.owner.touch(handle.rrid, handle.where)
                if self.travels_with_value and entry.outcome is None:
                    # It was read here, and the table let go of it; where it cannot be sent along, others come for it.
                    refs.owner.settle(entry, self.outcome())
            else:
                change = [handle.rrid.whence, handle.rrid.id, refs.node.pid, 1]
                refs.node.peers.send(handle.where, Kind.CLIENTS, structs.Clients([change]).pack())

    def _watch(self) -> None:
        """Let the owner tell us when the value is there (once)."""
        if self._is_over or self._handle is None or self._finalized:
            return
        self._live()
        if self._told:
            return
        self._told = True
        try:
            self._ask_to_be_told()
        except BaseException:
            self._later(self._ask_to_be_told)
            raise

    def _ask_to_be_told(self) -> None:
        handle = self._live()
        if handle.where == self._refs.node.pid:
            found = weakref.ref(self)  # weakly: the table is not to keep what nobody waits for any more

            def told(outcome: Outcome) -> None:
                future = found()
                if future is not None:
                    future._arrived(outcome)

            self._refs.owner.watch(self._entry(), told)
            return
        self.hold(handle)
        self._send("watch", self._watch_answered, b"", [])

    def _later(self, ask: Callable[[], object]) -> None:
        """Whoever was about to ask was interrupted, and the next one relies on it: the leader asks (twice is well)."""

        def again() -> None:
            with contextlib.suppress(RuntimeError):  # it was finalized
                ask()

        self._refs.node.loop.call_soon(again)

    def _watch_answered(self, status: int, data: Any, buffers: Any) -> None:
        """The owner will tell; or it cannot be reached, and nothing else would say so to who only waits."""
        if status == RAISED_HERE:
            self._unreachable = isinstance(data, TopologyError)
            self._arrived(Outcome(RAISED_HERE, data, (), self.where))

    def _arrived(self, outcome: Outcome) -> None:
        """The outcome is here (any thread that may not run user code)."""
        if self._settle(outcome):
            self._refs.node.deliver(self._run_callbacks)
        self._refs.kept.discard(self)

    def _noticed(self, ok: bool) -> None:
        """Leader: the owner says that it has ended."""
        self._arrived(Outcome(REMOTE_VALUE if ok else REMOTE_ERROR, None, (), self.where))

    def _came(self, outcome: Outcome) -> None:
        """As `_arrived`, also if this process has known, perhaps since just now, that it has ended, and only that."""
        self._arrived(outcome)
        raw = self._raw
        if raw is not None and raw.status in (REMOTE_VALUE, REMOTE_ERROR):
            self._raw = outcome

    def mark_remote(self) -> None:
        """The value is known to be at its owner. Before anybody else has this object."""
        self._raw = Outcome(REMOTE_VALUE, None, (), self.where)
        self._state = "FINISHED"

    def _owner_lost(self, make_error: Callable[[], BaseException]) -> None:
        """Leader: the owner is gone. What was fetched stays."""
        self._came(Outcome(RAISED_HERE, make_error(), (), self.where))

    def _link_lost(self) -> None:
        """Leader: the news of the end may be lost: ask once more. But if the call was, there will be none."""
        if self._is_over or not self._told or self._handle is None:
            return
        if self._of_call:
            text = f"its connection to process {self._refs.node.pid} was lost"
            error = ProcessExitedException(self.where, None, True, "", text)
            self._arrived(Outcome(RAISED_HERE, error, (), self.where))
        else:
            self._later(self._ask_to_be_told)

    # -- fetching ----------------------------------------------------------------------------------------------

    def _have(self, timeout: float | None) -> None:
        """Wait until the outcome itself is here; TimeoutError."""
        deadline = None if timeout is None else time.monotonic() + timeout
        self._bring(timeout)
        if not self._is_over and not self._await(timeout):
            raise TimeoutError
        # The notice may have been quicker than the value that was asked for.
        self._bring(None if deadline is None else max(0.0, deadline - time.monotonic()))

    def _bring(self, timeout: float | None) -> None:
        """See to it that the outcome comes here; waits only for a value that is known to be at its owner."""
        self._usable()  # what has been fetched is here, also in a forked child
        raw = self._raw
        if self._state != "FINISHED":
            self._start_transfer()
        elif raw is not None and raw.status in (REMOTE_VALUE, REMOTE_ERROR):
            transfer = self._start_transfer()
            if transfer is not None and not transfer.done() and not transfer._await(timeout):
                raise TimeoutError

    def _start_transfer(self) -> Future[Any] | None:
        handle = self._live()
        if handle.where == self._refs.node.pid:
            self._watch()
            return None
        transfer = self._transfer
        if transfer is None:
            made: Future[Any] = Future()
            made._call = self._call or _Waiting(self._refs)
            try:
                # Atomic: one asks, and no lock that a `__del__` meets.
                transfer = self.__dict__.setdefault("_transfer", made)
                if transfer is made:
                    self._ask_for_value()
            except BaseException:
                if self._transfer is made:
                    self._later(self._ask_for_value)
                raise
        return transfer

    def _ask_for_value(self) -> None:
        self.hold(self._live())
        found, where = weakref.ref(self), self.where

        def answer(status: int, data: Any, buffers: Any) -> None:
            """Who waits has this object; if nobody has, the table of requests does not keep it (the value may never
            come, and its owner would believe that somebody wants it)."""
            future = found()
            if future is not None:
                future._fetched(status, data, buffers)
            else:
                received(status, data, buffers, where)

        self._send("fetch", answer, b"", [])

    def _fetched(self, status: int, data: Any, buffers: Any) -> None:
        if status == RAISED_HERE:
            self._unreachable = isinstance(data, TopologyError)
        outcome = received(status, data, buffers, self.where)
        self._came(outcome)
        if self._transfer is not None:
            self._transfer._settle(outcome)

    def _send(
        self,
        op: str,
        answer: Callable[[int, Any, Any], object],
        body: bytes,
        buffers: list[Any],
        lent: Sequence[Any] = (),
    ) -> None:
        handle, node = self._live(), self._refs.node

        def lost(error: BaseException) -> None:
            answer(RAISED_HERE, error, ())

        dead = node.peers.dead.get(handle.where)
        if dead is not None:
            lost(dead())
            return
        settle_puts(handle.where)
        number = node.peers.requests.new(handle.where, answer, lost)
        try:
            message = structs.Reference(number, op, handle.rrid.whence, handle.rrid.id)
            with self._refs.lending(lent, handle.where) if lent else contextlib.nullcontext():
                node.peers.send(handle.where, Kind.REFERENCE, message.pack(), body, buffers)
        except BaseException:  # it would keep this future until an answer comes
            node.peers.requests.forget(number)
            raise
        if handle.where in node.peers.dead:  # died between the two looks: nobody else will say so
            node.peers.requests.fail(handle.where, node.peers.dead[handle.where])

    def _ask(self, op: str, body: bytes = b"", buffers: list[Any] | None = None, lent: Sequence[Any] = ()) -> Outcome:
        """A request that is answered at once; raises if the owner is gone."""
        reply: Future[Any] = Future()
        reply._call = _Waiting(self._refs)
        where = self.where
        self.hold(self._live())

        def came(status: int, data: Any, parts: Any) -> None:
            reply._settle(received(status, data, parts, where))

        self._send(op, came, body, buffers or [], lent)
        if not reply.done():
            reply._await(None)
        outcome = reply._raw
        assert outcome is not None
        if outcome.status == RAISED_HERE:
            raise outcome.data
        return outcome

    def _decode(self) -> None:
        super()._decode()
        if self.travels_with_value:
            self._let_go()  # the value is cached here; an error stays at its owner, for whoever this is sent to

    def _open(self, raw: Outcome) -> tuple[Any, BaseException | None]:
        if raw.status == LOCAL_VALUE:
            return raw.data, None
        if raw.status in (ERROR, UNSENDABLE):
            return None, RemoteException(raw.pid, captured(raw.failure))
        if raw.status == RAISED_HERE and type(raw.data) is RemoteException:
            # The owner's table keeps the error; raised as that object it would get a traceback, whose frames keep this
            # future, which keeps the table's entry: for ever.
            return None, RemoteException(raw.data.pid, raw.data.captured)
        return super()._open(raw)


def stable(buffers: list[Any]) -> list[Any]:
    """Copies of out-of-band buffers: what is sent must not change with the caller's arrays."""
    return [bytes(part) for part in buffers]
