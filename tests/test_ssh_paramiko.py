"""The SSH client in this process: which host keys it trusts, which keys it shows, and what is wrong. tests/ssh has a
real sshd; here a server of paramiko's is at the other end, where one is needed at all."""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import paramiko
import pytest
from fakes import PATIENCE
from wires import until

from distpool.managers import ssh_paramiko
from distpool.managers.ssh_client import LoginError
from distpool.managers.ssh_config import Config, Target
from distpool.managers.ssh_paramiko import ParamikoConnection, connect, host_key_name

HOST_KEY = paramiko.ECDSAKey.generate()
OTHER_KEY = paramiko.ECDSAKey.generate()
USER_KEY = paramiko.ECDSAKey.generate()
RSA_KEY = paramiko.RSAKey.generate(2048)


def soon() -> float:
    return time.monotonic() + PATIENCE


def target(**changes: Any) -> Target:
    given: dict[str, Any] = {"name": "h", "host": "h", "port": 22, "user": "me", "use_agent": False}
    return Target(**{**given, **changes})


def known(tmp_path: Path, *lines: tuple[str, Any], prefix: str = "", name: str = "known_hosts") -> str:
    """A file of host keys."""
    file = tmp_path / name
    file.write_text("".join(f"{prefix}{host} {key.get_name()} {key.get_base64()}\n" for host, key in lines))
    return str(file)


# -- host keys -------------------------------------------------------------------------------------------------------


def test_names_in_known_hosts() -> None:
    assert host_key_name(target()) == "h"
    assert host_key_name(target(port=2222)) == "[h]:2222"
    assert host_key_name(target(port=2222, key_alias="other")) == "other"


check = ssh_paramiko._check_host_key


def test_a_key_that_is_known_anywhere(tmp_path: Path) -> None:
    user = known(tmp_path, ("h", OTHER_KEY))
    system = known(tmp_path, ("h", HOST_KEY), name="system")
    check(target(known_hosts=[str(tmp_path / "none"), user], system_known_hosts=[system]), HOST_KEY)
    check(target(known_hosts=[known(tmp_path, ("[h]:5", HOST_KEY), name="port")], port=5), HOST_KEY)


@pytest.mark.parametrize("hashed", [False, True])
def test_names_of_hosts_have_no_case(tmp_path: Path, hashed: bool) -> None:
    name = paramiko.HostKeys.hash_host("node") if hashed else "node"
    file = known(tmp_path, (name, HOST_KEY))
    check(target(host="Node", known_hosts=[file]), HOST_KEY)
    with pytest.raises(LoginError, match="has CHANGED"):
        check(target(host="NODE", known_hosts=[file], accept_unknown=True), OTHER_KEY)
    check(target(host="Node", known_hosts=[known(tmp_path, ("Node", HOST_KEY))]), HOST_KEY)


def test_an_unknown_key(tmp_path: Path) -> None:
    file = tmp_path / "known_hosts"
    with pytest.raises(LoginError) as caught:
        check(target(known_hosts=[str(file)], port=5), HOST_KEY)
    text = str(caught.value)
    assert "the host key of [h]:5 is not known" in text and "SHA256:" in text
    assert "ssh -p 5 me@h" in text and f"ssh-keyscan -p 5 h >> {file}" in text and not file.exists()


def test_an_unknown_key_that_is_accepted_is_known_the_next_time(tmp_path: Path) -> None:
    file = tmp_path / "new" / "known_hosts"
    check(target(known_hosts=[str(file)], accept_unknown=True), HOST_KEY)
    check(target(known_hosts=[str(file)]), HOST_KEY)
    check(target(known_hosts=["/proc/no/such/file"], accept_unknown=True), HOST_KEY)  # it is only for the next time
    check(target(accept_unknown=True), HOST_KEY)


def test_another_key_of_the_same_kind_has_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = known(tmp_path, ("h", OTHER_KEY))
    for accept in (False, True):
        with pytest.raises(LoginError, match="has CHANGED") as caught:
            check(target(known_hosts=[file], accept_unknown=accept), HOST_KEY)
        assert f"ssh-keygen -f {file} -R 'h'" in str(caught.value)
    with caplog.at_level(logging.WARNING, "distpool"):
        check(target(known_hosts=[file], accept_unknown=True, accept_changed=True), HOST_KEY)
    assert "is not the one in" in caplog.text


def test_a_key_of_another_kind(tmp_path: Path) -> None:
    file = known(tmp_path, ("h", RSA_KEY))
    with pytest.raises(LoginError, match="has CHANGED"):
        check(target(known_hosts=[file]), HOST_KEY)
    check(target(known_hosts=[file], accept_unknown=True), HOST_KEY)
    check(target(known_hosts=[file]), HOST_KEY)  # noted beside the other


def test_a_revoked_key_is_never_trusted(tmp_path: Path) -> None:
    good = known(tmp_path, ("h", HOST_KEY), name="good")
    bad = known(tmp_path, ("*", HOST_KEY), prefix="@revoked ", name="bad")
    with pytest.raises(LoginError, match=f"revoked.*{bad}"):
        check(target(known_hosts=[good], system_known_hosts=[bad], accept_unknown=True, accept_changed=True), HOST_KEY)


def test_a_file_that_cannot_be_parsed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: str) -> Any:
        raise paramiko.SSHException("line 3")

    monkeypatch.setattr(paramiko, "HostKeys", refuse)
    with caplog.at_level(logging.WARNING, "distpool"):
        assert ssh_paramiko._known_keys(target(known_hosts=["file"])) == []
    assert "file cannot be used: line 3" in caplog.text


# -- a server --------------------------------------------------------------------------------------------------------


class Server(paramiko.ServerInterface):
    """One login: takes a key, runs commands, opens channels to a port of its own."""

    def __init__(self, key: Any = USER_KEY, forwards: int = paramiko.OPEN_SUCCEEDED) -> None:
        self.key = key
        self.forwards = forwards
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.channels: list[Any] = []
        self.commands: list[str] = []
        self.asked: list[Any] = []
        self.transports: list[paramiko.Transport] = []
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        try:
            sock, _ = self.listener.accept()
        except OSError:
            return
        transport = paramiko.Transport(sock)
        transport.add_server_key(HOST_KEY)
        self.transports.append(transport)
        try:
            transport.start_server(server=self)
        except (paramiko.SSHException, EOFError, OSError):
            return
        while (channel := transport.accept(PATIENCE)) is not None:
            self.channels.append(channel)

    def get_allowed_auths(self, username: str) -> str:
        return "publickey" if self.key is not None else "password,keyboard-interactive"

    def check_auth_publickey(self, username: str, key: Any) -> int:
        self.asked.append((username, key.get_base64()))
        return paramiko.AUTH_SUCCESSFUL if key == self.key else paramiko.AUTH_FAILED

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.OPEN_SUCCEEDED

    def check_channel_direct_tcpip_request(self, chanid: int, origin: Any, destination: Any) -> int:
        self.asked.append(destination)
        return self.forwards

    def check_channel_exec_request(self, channel: Any, command: bytes) -> bool:
        self.commands.append(command.decode())
        if command == b"refused":
            return False

        def run() -> None:
            data = channel.recv(100)
            channel.sendall(b"got " + data)
            channel.sendall_stderr(b"err")
            channel.send_exit_status(5)
            channel.close()

        threading.Thread(target=run, daemon=True).start()
        return True

    def close(self) -> None:
        self.listener.close()
        for transport in self.transports:
            transport.close()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the target of a server, which takes our key; there is no agent."""
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    USER_KEY.write_private_key_file(str(tmp_path / "key"))

    def make(port: int, **changes: Any) -> Target:
        name = known(tmp_path, (f"[127.0.0.1]:{port}", HOST_KEY))
        given = {"identity_files": [str(tmp_path / "key")], "known_hosts": [name], **changes}
        return target(host="127.0.0.1", port=port, **given)

    return make


def test_a_login_its_commands_and_its_end(server: Server, place: Any) -> None:
    connection = connect(place(server.port), Config(), soon())
    session = connection.run("a command", soon())
    session.write(b"in")
    assert session.read(100) == b"got in" and session.read_errors(100) == b"err"
    assert session.read(100) == b"" and session.status(PATIENCE) == 5
    session.close()
    assert server.commands == ["a command"] and server.asked == [("me", USER_KEY.get_base64())]
    assert connection.explain(255, "Permission denied") == ""
    with pytest.raises(LoginError, match=r"127\.0\.0\.1 runs no command for me"):
        connection.run("refused", soon())
    connection.close()
    connection.close()
    with pytest.raises(LoginError, match="runs no command"):
        connection.run("late", soon())
    session.write(b"nobody reads")  # never raises


def test_streams_through_the_login(server: Server, place: Any) -> None:
    connection = connect(place(server.port), Config(), soon())
    reader, writer = connection.dial("10.0.0.7", 80, soon())
    assert server.asked[-1] == ("10.0.0.7", 80) and not reader.closed
    assert writer.write(b"there") == 5
    until(lambda: server.channels, "the channel")
    (channel,) = server.channels
    assert channel.recv(10) == b"there"
    channel.sendall(b"back")
    buffer = bytearray(10)
    assert reader.readinto(buffer) == 4 and buffer[:4] == b"back"
    channel.close()
    assert reader.readinto(buffer) == 0
    writer.close()
    assert reader.closed
    connection.close()
    with pytest.raises(OSError) as caught:
        connection.dial("10.0.0.7", 80, soon())
    assert caught.value.errno == errno.ECONNABORTED


@pytest.mark.parametrize(
    ("code", "number", "text"),
    [(1, errno.EACCES, "AllowTcpForwarding"), (2, errno.ECONNREFUSED, "refused to connect to 10.0.0.7:80")],
)
def test_a_server_that_does_not_connect(place: Any, code: int, number: int, text: str) -> None:
    server = Server(forwards=code)
    connection = connect(place(server.port), Config(), soon())
    with pytest.raises(OSError, match=text) as caught:
        connection.dial("10.0.0.7", 80, soon())
    assert caught.value.errno == number
    connection.close()
    server.close()


def test_keys_that_are_not_taken(server: Server, place: Any, tmp_path: Path) -> None:
    OTHER_KEY.write_private_key_file(str(tmp_path / "other"))
    files = [str(tmp_path / "none"), str(tmp_path / "other")]
    with pytest.raises(LoginError) as caught:
        connect(place(server.port, identity_files=files), Config(), soon())
    text = str(caught.value)
    assert f"takes none of the keys ({files[1]})" in text and f"not usable: {files[0]}: No such file" in text
    assert f"ssh-copy-id -p {server.port} me@127.0.0.1" in text


def test_a_host_that_wants_something_else(place: Any) -> None:
    server = Server(key=None)
    with pytest.raises(
        LoginError, match="asks for password, keyboard-interactive, and distpool logs in with keys only"
    ):
        connect(place(server.port), Config(), soon())
    server.close()


def test_no_key_at_all(server: Server, place: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(LoginError, match="there is no key to log in with"):
        connect(place(server.port, identity_files=[]), Config(), soon())


def test_a_wrong_host_key_shows_no_key_of_ours(server: Server, place: Any, tmp_path: Path) -> None:
    file = known(tmp_path, (f"[127.0.0.1]:{server.port}", OTHER_KEY), name="wrong")
    with pytest.raises(LoginError, match="has CHANGED"):
        connect(place(server.port, known_hosts=[file]), Config(), soon())
    assert not server.asked


# -- the way there ---------------------------------------------------------------------------------------------------


def test_nobody_listens(place: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(LoginError, match=f"connection refused by 127.0.0.1 port {port}: no sshd"):
        connect(place(port), Config(), soon())


@pytest.mark.parametrize("host", ["no-such-host.invalid", "x" * 70 + ".a", "a..b"])
def test_no_such_host(host: str) -> None:
    with pytest.raises(LoginError, match="no such host|cannot connect"):
        connect(target(host=host), Config(), soon())


def test_who_accepts_and_says_nothing(place: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with pytest.raises(LoginError, match="accepts connections but does not answer"):
            connect(place(listener.getsockname()[1]), Config(), time.monotonic() + 0.2)


def test_a_proxy_command_that_fails(server: Server, place: Any) -> None:
    with pytest.raises(LoginError, match="ProxyCommand 'exit 1' brought no SSH connection"):
        connect(place(server.port, proxy_command="exit 1"), Config(), soon())


def test_jumps_in_a_circle() -> None:
    with pytest.raises(LoginError, match="ProxyJump goes in a circle"):
        ssh_paramiko._reach(target(proxy_jump="a"), Config(), soon(), [], ssh_paramiko._JUMPS)


def test_errors_at_the_jump_host(monkeypatch: pytest.MonkeyPatch) -> None:
    configuration: Any = SimpleNamespace(target=lambda spec: target(host=spec.host))
    with pytest.raises(LoginError, match="ProxyJump a:b: not a machine spec"):
        ssh_paramiko._reach(target(proxy_jump="a:b"), configuration, soon(), [], 0)
    went: list[tuple[str, Any, int]] = []

    class Bastion:
        def open_channel(self, host: str, port: int, deadline: float) -> Any:
            raise OSError(errno.EACCES, "not allowed")

        def close(self) -> None:
            went.append(("closed", None, 0))

    def log_in(hop: Target, configuration: Any, deadline: float, jumps: int) -> Any:
        went.append((hop.host, hop.proxy_jump, jumps))
        if hop.host == "bad":
            raise LoginError("no key", "banner")
        return Bastion()

    real = connect
    monkeypatch.setattr(ssh_paramiko, "connect", log_in)
    with pytest.raises(LoginError, match="at the jump host bad: no key") as caught:
        real(target(proxy_jump="bad"), configuration, soon())
    assert caught.value.output == "banner"
    with pytest.raises(LoginError, match="the jump host last cannot connect to h port 22: not allowed"):
        real(target(proxy_jump="first, ssh://last"), configuration, soon())
    assert went == [("bad", None, 1), ("last", "first", 1), ("closed", None, 0)]


# -- small parts -----------------------------------------------------------------------------------------------------


def test_files_of_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    for name in ("id_ed25519", "id_rsa", "mine"):
        (tmp_path / ".ssh" / name).touch()
    names = [os.path.basename(name) for name, _ in ssh_paramiko._files(target())]
    assert names == ["id_rsa", "id_ed25519"]
    assert [name for name, _ in ssh_paramiko._files(target(identity_files=["/a", "/b"]))] == ["/a", "/b"]


def test_public_parts(tmp_path: Path) -> None:
    """IdentitiesOnly: a file names a key of the agent's, by its public part or beside it."""
    private, public = tmp_path / "key", tmp_path / "key.pub"
    USER_KEY.write_private_key_file(str(private))
    assert ssh_paramiko._public(str(private)) == b""
    public.write_text(f"{USER_KEY.get_name()} {USER_KEY.get_base64()} me@here\n")
    assert ssh_paramiko._public(str(private)) == ssh_paramiko._public(str(public)) == USER_KEY.asbytes()
    assert ssh_paramiko._public(str(tmp_path / "none")) == b""


@pytest.mark.parametrize("agent", [None, "/no/such/socket"])
def test_no_agent(agent: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    made = ssh_paramiko._Agent(target(use_agent=True, agent_socket=agent))
    assert made.keys() == []
    made.close()


def test_a_forked_child_only_closes_descriptors() -> None:
    left, right = socket.socketpair()
    said: list[str] = []

    class Opened:
        def close(self) -> None:
            said.append("close")

        def forget(self) -> None:
            said.append("forget")

    transport: Any = Opened()
    with right:
        number = left.fileno()
        connection = ParamikoConnection(target(), transport, left, [Opened(), left])
        connection.forget()
        with pytest.raises(OSError):
            os.fstat(number)
        connection.close()
    assert said == ["forget"]


def test_everything_is_closed_last_first_whatever_one_raises() -> None:
    closed: list[int] = []

    def thing(number: int) -> Any:
        return SimpleNamespace(close=lambda: closed.append(number) or 1 // number)

    opened = [thing(2), thing(0), thing(1)]
    ssh_paramiko._close_all(opened)
    assert closed == [1, 0, 2] and not opened


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.EPIPE, "Broken pipe"), "Broken pipe"),
        (EOFError(), "EOFError"),
        (paramiko.SSHException("why"), "why"),
    ],
)
def test_texts(error: Exception, text: str) -> None:
    assert ssh_paramiko._text(error) == text
