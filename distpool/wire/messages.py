"""The content of control frames: one class per message, no pickle (layer 1).

Three forms. Messages of the hot path (`CALLS`, `RESULTS`) are lists of fixed records, packed by hand in `records`.
Those of remote calls, references and channels are structs (`structs`). All others have fields that travel as JSON: they
are rare, and JSON cannot run code.
"""

from __future__ import annotations

import json

from distpool.errors import ProtocolError
from distpool.fields import Fields
from distpool.hints import Any, ClassVar, Self
from distpool.wire.frames import Kind
from distpool.wire.records import (
    CALL,
    CALLS,
    CHUNK,
    CHUNK_OF_SCALARS,
    CHUNKS,
    ERROR,
    MAPPED,
    ONE,
    ONE_FRESH,
    RESULT,
    RESULTS,
    SEQUENCE,
    SPAN,
    SPAN_OF_SCALARS,
    SPANS,
    TIMED,
    UNLOADABLE,
    UNSENDABLE,
    VALUE,
    VALUES,
    call_records,
    result_records,
)

__all__ = [  # records, used as if they were defined here
    "CALL", "CALLS", "CHUNK", "CHUNKS", "CHUNK_OF_SCALARS", "ERROR", "MAPPED", "ONE", "ONE_FRESH", "RESULT", "RESULTS",
    "SEQUENCE", "SPAN", "SPANS", "SPAN_OF_SCALARS", "TIMED", "UNLOADABLE", "UNSENDABLE", "VALUE", "VALUES",
    "call_records", "result_records",
]  # fmt: skip


class Message(Fields):
    """Base of the JSON messages. `pack()` gives the control part; `unpack` checks how many fields there are."""

    kind: ClassVar[Kind]

    def pack(self) -> bytes:
        """The control part of the frame."""
        return json.dumps([getattr(self, name) for name in self.FIELDS]).encode()

    @classmethod
    def unpack(cls, control: bytes) -> Self:
        """The message; `ProtocolError` when the control part does not fit it."""
        try:
            values = json.loads(control)
            message = cls(*values)
        except (ValueError, TypeError) as error:
            raise ProtocolError(f"malformed {cls.__name__}: {error}") from None
        return message


class Join(Message):
    """Master -> worker, after authentication: who you are and what you need to know."""

    kind: ClassVar[Kind] = Kind.JOIN
    pid: int
    versions: list[str]
    authkey: str  # hex, as `Handshake.veil` makes it
    journal: str  # path of the shared journal, "" for none
    journal_size: int
    segments: str  # directory for segments where memory files do not exist, "" for none
    topology: str = "all_to_all"
    name: str = ""
    lazy: bool = True
    resources: dict[str, Any] | None = None  # `managers.resources`: what it may use of its host
    master: int = 1  # what the master is called in the group that it is a worker of itself, if it is one


class Joined(Message):
    """Worker -> master: ready; what this worker is."""

    kind: ClassVar[Kind] = Kind.JOINED
    versions: list[str]
    ospid: int
    host: str
    shares_memory: bool  # whether the journal, and so any segment, could be mapped
    problem: str = ""  # why it cannot be what it shall be


class Function(Message):
    """Master -> worker: the function `number`; its pickle is the body. `apart`: its buffers come as pieces."""

    kind: ClassVar[Kind] = Kind.FUNCTION
    number: int
    name: str
    apart: bool = False


class Forget(Message):
    """Master -> worker: these function numbers are not used any more."""

    kind: ClassVar[Kind] = Kind.FORGET
    numbers: list[int]


class Recall(Message):
    """Master -> worker: give back calls that have not started: the listed ones, or the last `count`."""

    kind: ClassVar[Kind] = Kind.RECALL
    count: int
    sequences: list[int]


class Recalled(Message):
    """Worker -> master: pairs (first sequence number, elements) that were taken back and will not run here. `unasked`:
    no answer to a RECALL, the worker itself has found that they were revoked."""

    kind: ClassVar[Kind] = Kind.RECALLED
    ranges: list[list[int]]
    asked: list[int]
    unasked: bool = False


class Initialize(Message):
    """Master -> worker: run the initializer (body: function and arguments) before any call."""

    kind: ClassVar[Kind] = Kind.INITIALIZE
    name: str


class Initialized(Message):
    """Worker -> master: the initializer returned (`ok`) or raised (body: the exception)."""

    kind: ClassVar[Kind] = Kind.INITIALIZED
    ok: bool


class Shutdown(Message):
    """Master -> worker: finish what was sent, then exit."""

    kind: ClassVar[Kind] = Kind.SHUTDOWN
    reason: str


class Busy(Message):
    """Worker -> master that wants it gone now: calls run here, which are interrupted in a moment."""

    kind: ClassVar[Kind] = Kind.BUSY


class SegmentsFree(Message):
    """Receiver -> sender of segments: the last views of these are gone."""

    kind: ClassVar[Kind] = Kind.SEGMENTS_FREE
    segments: list[int]


class Blocked(Message):
    """Worker -> master: `change` more (or fewer) of my running calls wait for other calls: send that many more."""

    kind: ClassVar[Kind] = Kind.BLOCKED
    change: int


class Submit(Message):
    """Worker -> owner of an executor: run this call (body: function and arguments) for my request `request`."""

    kind: ClassVar[Kind] = Kind.SUBMIT
    request: int
    executor: str
    name: str
    function_bytes: int
    function_buffers: int
    reusable: bool
    options: dict[str, Any] | None


class Outcome(Message):
    """Owner of an executor -> worker: how request `request` ended (body: value or exception)."""

    kind: ClassVar[Kind] = Kind.OUTCOME
    request: int
    status: int


class Cancel(Message):
    """Worker -> owner of an executor: cancel request `request` if it has not started."""

    kind: ClassVar[Kind] = Kind.CANCEL
    request: int


class Cancelled(Message):
    """Owner of an executor -> worker: whether request `request` was cancelled."""

    kind: ClassVar[Kind] = Kind.CANCELLED
    request: int
    done: bool


class Interrupt(Message):
    """Master -> worker: raise KeyboardInterrupt in what runs there."""

    kind: ClassVar[Kind] = Kind.INTERRUPT


class Stacks(Message):
    """Master -> worker: where are all your threads?"""

    kind: ClassVar[Kind] = Kind.STACKS
    request: int


class StacksAre(Message):
    """Worker -> master: the answer to `Stacks`; body: text."""

    kind: ClassVar[Kind] = Kind.STACKS_ARE
    request: int


class Usage(Message):
    """Master -> worker: which remote calls have you run, and (`whole`) how much of your host do you use? The master
    looks itself at what processes of its own host use."""

    kind: ClassVar[Kind] = Kind.USAGE
    request: int
    whole: bool


class UsageIs(Message):
    """Worker -> master: seconds since it started, seconds of CPU used, bytes resident (zeros if not asked for); remote
    calls that returned, and that raised; the one that has run for longest, if any runs, and for how many seconds."""

    kind: ClassVar[Kind] = Kind.USAGE_IS
    request: int
    age: float
    cpu_seconds: float
    memory: int
    done: int
    failed: int
    running: str | None
    since: float | None


class Trace(Message):
    """Master -> worker: begin (or end) to time each call, as trace `number`."""

    kind: ClassVar[Kind] = Kind.TRACE
    number: int
    on: bool


class Traced(Message):
    """Worker -> master: calls of trace `number` (body: `TIMED` records); `last`: no more will come.

    `clock`: nanoseconds from this process's `perf_counter_ns` to its wall clock. `names`: pairs of number and name, of
    remote calls; each is sent once."""

    kind: ClassVar[Kind] = Kind.TRACED
    number: int
    clock: int
    last: bool
    names: list[list[Any]]


class Connect(Message):
    """Master -> worker: make your links to these processes now (they are not lazy)."""

    kind: ClassVar[Kind] = Kind.CONNECT
    pids: list[int]


class Connected(Message):
    """Worker -> master: each of them has been tried; what went wrong as `[pid, text]`."""

    kind: ClassVar[Kind] = Kind.CONNECTED
    problems: list[list[Any]]


class Launch(Message):
    """Master -> worker: start `count` more workers on your host ("auto": one per CPU, yourself included)."""

    kind: ClassVar[Kind] = Kind.LAUNCH
    count: int | str
    command: list[str]  # [] for the interpreter that you run on
    timeout: float


class Launched(Message):
    """Worker -> master: where those that came up listen (`[number, host, port]`), and why others did not."""

    kind: ClassVar[Kind] = Kind.LAUNCHED
    workers: list[list[Any]]
    problems: list[list[str]]  # reason, last output


class Named(Message):
    """Master -> worker: the pids of those that you started (`[number, pid]`), for the prefix of their output."""

    kind: ClassVar[Kind] = Kind.NAMED
    pids: list[list[int]]


class Peer(Message):
    """Dialler -> listener, after authentication: which worker I am."""

    kind: ClassVar[Kind] = Kind.PEER
    pid: int
    shares_memory: bool


class Where(Message):
    """Worker -> pid 1: I need a link to `pid`; `detail`: I was told its address, but this is what I got."""

    kind: ClassVar[Kind] = Kind.WHERE
    pid: int
    detail: str = ""


class Address(Message):
    """Pid 1 -> worker: where `pid` listens; `problem` is "unknown", "topology", "unreachable", "denied" or "".

    `detail`: the text of the problem; without one, why `pid` itself could not dial (there is no third way).
    `address`: family and place; `["manager", connect_at]` for a custom transport.
    """

    kind: ClassVar[Kind] = Kind.ADDRESS
    pid: int
    address: list[Any]
    shares_memory: bool
    problem: str
    detail: str = ""


class Dial(Message):
    """Pid 1 -> worker: `pid` needs a link to you, and you have to make it; `detail`: why it could not itself."""

    kind: ClassVar[Kind] = Kind.DIAL
    pid: int
    address: list[Any]
    shares_memory: bool
    detail: str = ""


class Undialled(Message):
    """Worker -> pid 1: I could not dial `pid`, and why; `tried`: why `pid` itself could not; `denied`: it has another
    cookie than I."""

    kind: ClassVar[Kind] = Kind.UNDIALLED
    pid: int
    detail: str
    tried: str
    denied: bool = False


class IdentityIs(Message):
    """Pid 1 -> worker, over a private link: the cluster's certificate and key (PEM), for encrypted links."""

    kind: ClassVar[Kind] = Kind.IDENTITY
    certificate: str
    key: str


class Dead(Message):
    """Pid 1 -> every worker, and whoever asks later: this process is gone; `output`: the last lines it printed."""

    kind: ClassVar[Kind] = Kind.DEAD
    pid: int
    exitcode: int | None
    reason: str
    output: str = ""


class Relay(Message):
    """Any -> pid 1: pass this small frame on to `pid`, which I am not connected to (its control is the body)."""

    kind: ClassVar[Kind] = Kind.RELAY
    pid: int
    relayed: int


MESSAGES: dict[int, type[Message]] = {
    int(cls.kind): cls
    for cls in (
        Join, Joined, Function, Forget, Recall, Recalled, Initialize, Initialized, Shutdown,
        Busy, SegmentsFree, Blocked, Submit, Outcome, Cancel, Cancelled, Interrupt,
        Connect, Connected, Launch, Launched, Named,
        Peer, Where, Address, Dial, Undialled, IdentityIs, Dead, Relay,
        Stacks, StacksAre, Usage, UsageIs, Trace, Traced,
    )
}  # fmt: skip
