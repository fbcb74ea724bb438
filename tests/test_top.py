"""The endpoint that tells of the workers, and what draws its table; the command itself is in test_cli."""

from __future__ import annotations

import errno
import io
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from wires import until

from distpool import monitor, top
from distpool.node import node as nodes
from distpool.transport.ioloop import IoLoop


@pytest.mark.parametrize(
    "text, expected",
    [("127.0.0.1:80", ("127.0.0.1", 80)), ("[::1]:80", ("::1", 80)), ("/tmp/x", "/tmp/x"), ("./x:1", "./x:1")],
)
def test_parse_address(text: str, expected: object) -> None:
    assert top.parse_address(text) == expected


@pytest.mark.parametrize("text", ["", "nonsense", ":80", "host:", "host:x", "host:65536", "host:-1", "[]:80"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="neither HOST:PORT nor the path"):
        top.parse_address(text)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("example.org", False),
    ],
)
def test_loopback(host: str, expected: bool) -> None:
    assert top.is_loopback(host) is expected


# -- the watched program ---------------------------------------------------------------------------------------------


class Watched:
    """A node with an endpoint."""

    def __init__(self, loop: IoLoop) -> None:
        self.loop = loop
        self.top: Any = None
        self.on_fork: list[Any] = []
        self.deliver = nodes.current().deliver


@pytest.fixture
def node() -> Iterator[Any]:
    loop = IoLoop("test-io")
    loop.start()
    made = Watched(loop)
    yield made
    if isinstance(made.top, top.Endpoint):
        loop.unregister(made.top._listener)
        made.top._listener.close()
        made.top._remove(os.getpid())
    loop.stop()


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    found = [row()]
    monkeypatch.setattr(monitor, "stats", lambda: found)
    return found


def serve(node: Any, address: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("DISTPOOL_TOP", str(address))
    top.serve_if_wanted(node)
    return node.top.address


def test_nobody_wants_it(node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISTPOOL_TOP", raising=False)
    top.serve_if_wanted(node)
    assert node.top is None
    node.top = "there already"
    monkeypatch.setenv("DISTPOOL_TOP", "nonsense")
    top.serve_if_wanted(node)
    assert node.top == "there already"


def test_questions_and_answers(node: Any, rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client = top.Client(serve(node, "127.0.0.1:0", monkeypatch))
    for pid in (2, 3):
        rows[0] = row(pid=pid)
        answer = client.stats()
        assert answer["workers"] == [row(pid=pid)] and answer["ospid"] == os.getpid()
    client.close()


def test_only_so_many_at_a_time(node: Any, rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    address = serve(node, "127.0.0.1:0", monkeypatch)
    clients = [top.Client(address) for _ in range(top._CLIENTS)]
    for client in clients:
        client.stats()
    refused = top.Client(address)
    with pytest.raises(EOFError):
        refused.stats()
    refused.close()
    clients.pop().close()

    def served() -> bool:
        client = top.Client(address)
        try:
            return bool(client.stats())
        except EOFError:
            return False
        finally:
            client.close()

    until(served, "the place is given back")
    for client in clients:
        client.close()


class Refusing:
    """A listener of a process that has no descriptor left, until it has."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener, self.asked, self.left = listener, 0, False

    def accept(self) -> Any:
        self.asked += 1
        if not self.left:
            raise OSError(errno.EMFILE, "Too many open files")
        return self.listener.accept()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.listener, name)


def test_without_descriptors_the_loop_does_not_spin(node: Any, rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    listen = top.Endpoint._listen
    monkeypatch.setattr(top.Endpoint, "_listen", lambda self, address: Refusing(listen(self, address)))
    client = top.Client(serve(node, "127.0.0.1:0", monkeypatch))
    refusing = node.top._listener
    until(lambda: refusing.asked, "the first look")
    for _ in range(100):
        turned = threading.Event()
        node.loop.call_soon(turned.set)
        assert turned.wait(20)
    assert refusing.asked < 50
    refusing.left = True
    assert client.stats()["workers"] == [row()]
    client.close()


def test_an_address_in_use_is_logged_and_not_tried_again(
    node: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setenv("DISTPOOL_TOP", f"127.0.0.1:{other.getsockname()[1]}")
        top.serve_if_wanted(node)
    assert isinstance(node.top, OSError) and "cannot listen" in caplog.text
    top.serve_if_wanted(node)
    assert isinstance(node.top, OSError)


def test_two_threads_want_it_at_once(node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each adds its first workers: one endpoint serves both, and neither finds its address in use by the other."""
    made: list[Any] = []
    barrier = threading.Barrier(2)
    parse = top.parse_address

    def parse_together(text: str) -> Any:  # both have seen that there is none
        barrier.wait(20)
        return parse(text)

    def make(*arguments: Any) -> Any:
        made.append(arguments)
        return object()

    monkeypatch.setattr(top, "parse_address", parse_together)
    monkeypatch.setattr(top, "Endpoint", make)
    monkeypatch.setenv("DISTPOOL_TOP", "127.0.0.1:0")
    threads = [threading.Thread(target=top.serve_if_wanted, args=(node,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(made) == 1
    monkeypatch.undo()


def test_a_path_is_private_and_goes(node: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s"
    serve(node, path, monkeypatch)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert len(node.on_fork) == 1
    node.top._remove(os.getpid() + 1)  # in a forked child
    assert path.exists()
    node.top._remove(os.getpid())
    assert not path.exists()
    node.top._remove(os.getpid())


def test_sockets_of_others(tmp_path: Path) -> None:
    path = tmp_path / "s"
    top.remove_stale(str(path))
    with socket.socket(socket.AF_UNIX) as living:
        living.bind(str(path))
        living.listen()
        with pytest.raises(OSError, match="another program listens"):
            top.remove_stale(str(path))
    top.remove_stale(str(path))  # it has been killed
    assert not path.exists()
    path.write_text("data")
    with pytest.raises(OSError, match="is not a socket"):
        top.remove_stale(str(path))
    assert path.read_text() == "data"


# -- the watching one ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", EOFError),
        (b"HTTP/1.1 400 Bad Request\r\n", ValueError),
        (b"[]\n", ValueError),
        (b'{"workers": 3}\n', ValueError),
        (b"\xff\n", ValueError),
    ],
)
@pytest.mark.parametrize("path", [False, True])
def test_answers_that_are_none(answer: bytes, error: type[Exception], path: bool, tmp_path: Path) -> None:
    address: Any = str(tmp_path / "s") if path else ("127.0.0.1", 0)
    with socket.socket(socket.AF_UNIX if path else socket.AF_INET) as server:
        server.bind(address)
        server.listen()

        def reply() -> None:
            with server.accept()[0] as client:
                client.recv(100)
                client.sendall(answer)

        thread = threading.Thread(target=reply)
        thread.start()
        client = top.Client(server.getsockname())
        with pytest.raises(error):
            client.stats()
        client.close()
        thread.join(10)


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
    for there in (address, str(tmp_path / "none")):
        with pytest.raises(OSError):
            top.Client(there)


def client_of(*answers: list[dict[str, Any]]) -> Any:
    """A client of a program that ends after so many answers."""
    rest = iter(answers)

    def stats() -> dict[str, Any]:
        try:
            return {"workers": next(rest), "ospid": 9, "time": 0.0}
        except StopIteration:
            raise EOFError from None

    return SimpleNamespace(stats=stats)


def test_once() -> None:
    out = io.StringIO()
    top.watch(client_of([row()], [row()]), True, 1.0, out)
    assert out.getvalue() == top.table([row()]) + "\n"


def test_watching_until_the_end() -> None:
    out, pauses = io.StringIO(), []
    with pytest.raises(EOFError):
        top.watch(client_of([row()], [row(running=None), row(pid=3)]), False, 2.5, out, pauses.append)
    one, two = out.getvalue().split("\x1b[H")[1:]
    assert "program 9" in one and "1 workers, 1 busy" in one and "2 workers, 1 busy" in two
    assert pauses == [2.5, 2.5]
    assert all(line.endswith("\x1b[K") for line in two.split("\n")[:-1]) and two.endswith("\x1b[J")


def row(**changes: Any) -> dict[str, Any]:
    values = {
        "pid": 2, "host": "node1", "ospid": 4711, "cpu": 99.7, "memory": 17_300_000, "done": 5, "failed": 1,
        "bytes_in": 999, "bytes_out": 1_500, "running": "f", "since": 2.34, "queued": 3,
    }  # fmt: skip
    return {**values, **changes}


def test_table() -> None:
    text = top.table([row(), row(pid=10, cpu=None, memory=None, running=None, since=None)])
    head, one, two = text.splitlines()
    assert one.split() == "2 node1 4711 100 17.3 MB 5 1 3 999 B 1.5 kB 2.3 s f".split()
    assert two.split() == "10 node1 4711 - - 5 1 3 999 B 1.5 kB - -".split()
    assert head.index("running") == one.rindex("f")
    assert "\x1b" not in top.table([row(running="\x1b[2Jevil\n", host="a\x07b")])
    assert len(top.table([row(running="x" * 1000)]).splitlines()[1]) < 200
    assert top.table([]).split()[0] == "pid"


@pytest.mark.parametrize(
    "count, text",
    [(None, "-"), (0, "0 B"), (999, "999 B"), (1000, "1 kB"), (2_345_678, "2.35 MB"), (5 * 10**13, "50 TB")],
)
def test_sizes(count: int | None, text: str) -> None:
    assert top.size(count) == text
