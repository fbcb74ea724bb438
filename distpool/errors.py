"""Every exception that distpool raises (layer 0: imports nothing of the package).

    DistpoolError
      RemoteException            user code failed on another process (Julia-style calls)
      ProcessExitedException     a worker process is gone            (+ BrokenProcessPool)
      SerializationError         an object could not be sent         (+ pickle.PicklingError)
      ChannelClosedError         the channel is closed               (+ RuntimeError)
      TopologyError              the two processes are not connected (+ RuntimeError)
      LaunchWorkerError          one machine's workers did not start (+ RuntimeError)
      AuthenticationError        the peer does not know the cookie   (+ ConnectionError)
      VersionMismatchError       the peer's versions do not fit      (+ ConnectionError)
      CompositeException         several of the above                (+ ExceptionGroup)
      ProtocolError              the peer broke the wire protocol    (+ ConnectionError)

`ProcessExitedException` has to be a `concurrent.futures.process.BrokenProcessPool`, because that is what code
written for the standard library catches. Importing that module costs as much as the rest of distpool, so the class
is made on first use (module `__getattr__`), not at import.
"""

from __future__ import annotations

import pickle

from distpool.hints import TYPE_CHECKING, Any

__all__ = [
    "AuthenticationError",
    "CapturedException",
    "ChannelClosedError",
    "CompositeException",
    "DistpoolError",
    "LaunchWorkerError",
    "ProcessExitedException",
    "ProtocolError",
    "RemoteException",
    "SerializationError",
    "TopologyError",
    "VersionMismatchError",
]


_CAUSE: Any = vars(BaseException)["__cause__"]
_TRACEBACK: Any = vars(BaseException)["__traceback__"]
_NAME, _QUALNAME, _MODULE = (vars(type)[f"__{name}__"] for name in ("name", "qualname", "module"))


# A class of the user's may have a property, a `__getattribute__` or a `__setattr__` that stands before these and
# raises: whoever only hands an error on would die of it. (For the same reason `issubclass(type(error), ...)` is asked
# of users' errors, and not `isinstance`, which looks up their `__class__`.)


def cause_of(error: BaseException) -> BaseException | None:
    """The `__cause__` of any error, without running code of its class."""
    found: BaseException | None = _CAUSE.__get__(error)
    return found


def set_cause(error: BaseException, cause: BaseException | None) -> None:
    """Give any error a `__cause__`, without running code of its class."""
    _CAUSE.__set__(error, cause)


def traceback_of(error: BaseException) -> Any:
    """The `__traceback__` of any error, without running code of its class."""
    return _TRACEBACK.__get__(error)


def name_of(error: BaseException) -> str:
    """The name of the class of any error, without running code of that class's metaclass."""
    return str(_NAME.__get__(type(error)))


def names_of(kind: type) -> tuple[str, str]:
    """The module ("": it has none) and the qualified name of any class, without running code of its metaclass."""
    try:
        module = _MODULE.__get__(kind)
    except AttributeError:
        module = ""
    return module if type(module) is str else "", str(_QUALNAME.__get__(kind))


def text_of(error: BaseException) -> str:
    """What any error says of itself; an exact `str`, since a class of the user's may not be known elsewhere."""
    try:
        return str.__str__(str(error))
    except BaseException:
        return "(its text raised an error)"


class DistpoolError(Exception):
    """Base of every error that distpool itself raises.

    Example: `except distpool.DistpoolError as error: log.error("cluster: %s", error)`
    """


class CapturedException:
    """An exception as it was caught on another process: the object where it could be rebuilt, and its traceback.

    `ex` is the original exception (or, where it could not be rebuilt here, a `DistpoolError` that names its class);
    `traceback` is the formatted remote traceback, a `str`.

    Example: `except RemoteException as error: print(repr(error.captured.ex), error.captured.traceback)`
    """

    __slots__ = ("ex", "traceback")

    def __init__(self, ex: BaseException, traceback: str = "") -> None:
        self.ex = ex
        self.traceback = traceback

    def __reduce__(self) -> tuple[Any, ...]:
        return CapturedException, (self.ex, self.traceback)

    def __repr__(self) -> str:
        return f"CapturedException({self.ex!r})"


class RemoteException(DistpoolError):
    """User code failed on worker `pid`; `captured.ex` is its exception, `captured.traceback` the text of its traceback.

    Raised by the Julia-style calls (CONFORMANCE C87), and everywhere for an exception that cannot be rebuilt here.
    Example: `except RemoteException as error: print(error.pid, error.captured.ex)`
    """

    @staticmethod
    def own_pid() -> int:
        """The pid of this process; replaced by the module that knows it. What failed here needs no "On worker"."""
        return 1

    def __init__(self, pid: int, captured: CapturedException | BaseException) -> None:
        if isinstance(captured, BaseException):
            captured = CapturedException(captured)
        super().__init__(pid, captured)
        self.pid = pid
        self.captured = captured
        if self.__cause__ is None:
            self.__cause__ = captured.ex

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake, (type(self), RemoteException, self.pid, self.captured), self.__dict__  # which has the notes

    def __str__(self) -> str:
        captured = self.captured
        detail = captured.traceback.rstrip() or f"{type(captured.ex).__name__}: {captured.ex}"
        return f"On worker {self.pid}:\n{detail}" if self.pid not in (0, self.own_pid()) else detail


class SerializationError(DistpoolError, pickle.PicklingError):
    """An object could not be serialised or rebuilt; the text says on which side, and which object.

    Example: `ex.submit(f, threading.Lock()).exception()` is one.
    """


def as_both(error: BaseException) -> BaseException:
    """A `SerializationError` as an exception of its cause's type as well, in this process; others as they are.

    The standard library raises what the pickler or the user's own `__reduce__` raised, this library says which object
    it was: callers may catch either. Not StopIteration: it would end the iterator or generator that it comes out of.
    """
    if type(error) is not SerializationError:
        return error
    cause = error.__cause__  # of the user's class: its type is asked, and not it
    if not issubclass(type(cause), Exception) or isinstance(error, type(cause)):
        return error
    if issubclass(type(cause), StopIteration | StopAsyncIteration):
        return error
    members = {"__module__": type(error).__module__, "__str__": BaseException.__str__, "__reduce__": _as_plain}
    try:
        kind = type("SerializationError", (SerializationError, type(cause)), members)
        both: BaseException = kind.__new__(kind, *error.args)
    except TypeError:  # their memory layouts do not go together, or its __new__ wants other arguments
        return error
    both.__cause__ = cause
    return both


def _as_plain(error: BaseException) -> tuple[Any, ...]:
    return SerializationError, error.args


class ChannelClosedError(DistpoolError, RuntimeError):
    """The channel is closed (and, for `take` and `fetch`, drained).

    Example: `except ChannelClosedError: break`
    """


class TopologyError(DistpoolError, RuntimeError):
    """The topology of the cluster does not connect these two processes.

    Example: `except TopologyError: value = remotecall_fetch(remotecall_fetch, 1, f, 3)` goes through the master.
    """


class UnreachableError(TopologyError, ConnectionError):
    """The topology would connect these two processes, but no link between them can be made; the text says why.

    Not a public name: `TopologyError` is what to catch, and what to do about it is the same.
    """


class LaunchWorkerError(DistpoolError, RuntimeError):
    """Workers of one machine did not start: `host`, and the last `output` lines that came from there (`str`).

    Example: `except CompositeException as group: print([(error.host, error.output) for error in group.exceptions])`
    """

    def __init__(self, host: str, output: str = "", reason: str = "") -> None:
        super().__init__(host, output, reason)
        self.host = host
        self.output = output
        self.reason = reason

    def __str__(self) -> str:
        text = f"could not launch worker on {self.host}"
        if self.reason:
            text += f": {self.reason}"
        if self.output:
            text += f"\nits last output:\n{self.output}"
        return text


class ProtocolError(DistpoolError, ConnectionError):
    """The peer sent something that the wire protocol does not allow at this point; the link is closed."""


class AuthenticationError(DistpoolError, ConnectionError):
    """The peer could not prove that it knows the cluster cookie.

    Example: `except AuthenticationError: log.error("a worker that was started with another cookie")`
    """


class VersionMismatchError(DistpoolError, ConnectionError):
    """The two processes run versions that do not fit together; the text names both sides.

    Example: `except VersionMismatchError as error: log.error("install the same on both: %s", error)`
    """


class CompositeException(DistpoolError, ExceptionGroup):
    """Several tasks failed: `exceptions`, in the order of the tasks; `len()` says how many.

    Example: `except CompositeException as group: first = group.exceptions[0]`
    """

    def __new__(cls, exceptions: list[Exception], message: str | None = None) -> CompositeException:
        exceptions = list(exceptions)
        if message is None and exceptions:
            more = f" (and {len(exceptions) - 1} more)" if len(exceptions) > 1 else ""
            message = f"{type(exceptions[0]).__name__}: {exceptions[0]}{more}"
        return super().__new__(cls, message or "", exceptions)  # which refuses an empty list

    def __init__(self, exceptions: list[Exception], message: str | None = None) -> None:
        super().__init__(self.message, list(exceptions))

    def derive(self, excs: Any) -> Any:
        """The same group for a part of its exceptions (`ExceptionGroup.split`, `except*`)."""
        return CompositeException(list(excs), self.message)

    def __len__(self) -> int:
        return len(self.exceptions)

    def __iter__(self) -> Any:
        return iter(self.exceptions)

    def __bool__(self) -> bool:
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        made_of = type(self), CompositeException, list(self.exceptions), self.message
        return _remake, made_of, self.__dict__ or None  # which has the notes


def _remake(kind: Any, base: Any, *args: Any) -> Any:
    """From a pickle: an error of class `kind` as `base(*args)` makes it. What else a subclass's constructor wants, or
    has done, is in the state that the error gets next."""
    error = base.__new__(kind, *args)
    base.__init__(error, *args)
    return error


if TYPE_CHECKING:
    from concurrent.futures.process import BrokenProcessPool as BrokenProcessPool

    remote_traceback: Any  # its argument is wrong in typeshed

    class ProcessExitedException(DistpoolError, BrokenProcessPool):
        """A worker process is gone; see `_make_process_exited`."""

        worker_id: int
        exitcode: int | None
        maybe_ran: bool
        output: str
        reason: str

        def __init__(
            self,
            worker_id: int,
            exitcode: int | None = None,
            maybe_ran: bool = True,
            output: str = "",
            reason: str = "",
        ) -> None: ...

    class BoundChannelClosed(ChannelClosedError, ProcessExitedException):
        """See `_make_bound_channel_closed`."""


def _process_module() -> Any:
    """`concurrent.futures.process`, also when the interpreter is ending: a thread, or an `atexit` hook, that makes the
    first call of the program. The module wants to register a hook then, which is too late, and has nothing to end."""
    try:
        from concurrent.futures import process
    except RuntimeError:
        import threading

        hooks: Any = threading
        register = hooks._register_atexit
        hooks._register_atexit = lambda *_: None
        try:
            from concurrent.futures import process
        finally:
            hooks._register_atexit = register
    return process


def _make_process_exited() -> type:
    """Build the class; `concurrent.futures.process` is imported here and not before."""
    _process_module()
    from concurrent.futures.process import BrokenProcessPool

    class ProcessExitedException(DistpoolError, BrokenProcessPool):
        """A worker process is gone: `worker_id`, `exitcode` (negative: the signal; `None`: unknown),
        `maybe_ran` (`False`: the call surely never started), `output` (`str`, its last lines, up to 20).

        Example: `except ProcessExitedException as error: print(error.worker_id, error.exitcode)`
        """

        def __init__(
            self,
            worker_id: int,
            exitcode: int | None = None,
            maybe_ran: bool = True,
            output: str = "",
            reason: str = "",
        ) -> None:
            super().__init__(worker_id, exitcode, maybe_ran, output, reason)
            self.worker_id = worker_id
            self.exitcode = exitcode
            self.maybe_ran = maybe_ran
            self.output = output
            self.reason = reason

        def __str__(self) -> str:
            if self.reason:
                how = f": {self.reason}"
            elif self.exitcode is None:
                how = ""
            elif self.exitcode < 0:
                how = f": killed by signal {-self.exitcode}"
            else:
                how = f": exit code {self.exitcode}"
            ran = "" if self.maybe_ran else " (the call had not started)"
            said = f"\nits last output:\n{self.output}" if self.output else ""
            return f"worker {self.worker_id} exited{how}{ran}{said}"

    ProcessExitedException.__module__ = __name__
    ProcessExitedException.__qualname__ = "ProcessExitedException"
    return ProcessExitedException


def _make_bound_channel_closed() -> type:
    from distpool.errors import ProcessExitedException

    class BoundChannelClosed(ChannelClosedError, ProcessExitedException):
        """A channel is closed because the process that it is bound to has exited: either name catches it."""

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.__cause__ = ProcessExitedException(*args)  # here: so it is there in every process that gets this

        def __str__(self) -> str:
            return f"this channel is closed, because it is bound to a process that is gone: {super().__str__()}"

    BoundChannelClosed.__module__ = __name__
    BoundChannelClosed.__qualname__ = "BoundChannelClosed"
    return BoundChannelClosed


def __getattr__(name: str) -> Any:
    """What needs `concurrent.futures.process`, which imports half of multiprocessing (5 ms, in each process): made when
    it is first asked for, so write `errors.BrokenProcessPool` where programs that meet no error come by."""
    if name == "ProcessExitedException":
        made: Any = _make_process_exited()
    elif name == "BoundChannelClosed":
        made = _make_bound_channel_closed()
    elif name in ("BrokenProcessPool", "remote_traceback"):
        process = _process_module()
        made = process.BrokenProcessPool if name == "BrokenProcessPool" else process._RemoteTraceback
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = made
    return made
