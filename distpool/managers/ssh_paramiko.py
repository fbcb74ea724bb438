"""The SSH client in this process: paramiko (layer 8).

    connect  -- socket, through jump hosts or a ProxyCommand if the configuration has them
             -- host key against known_hosts, then keys and agent -> ParamikoConnection

paramiko's transport has a thread of its own; its channels block and cannot be polled, so links that run through the
login are pumped (`transport.pump`). `paramiko.SSHClient` is not used: it looks at one known_hosts file only, tries each
key file three times, which counts against the server's limit, and does not say what it tried.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import os
import socket
import subprocess
import time
from typing import Any

import paramiko

from distpool import config
from distpool.logs import Log, be_quiet
from distpool.managers.process import no_forks
from distpool.managers.specs import split_spec
from distpool.managers.ssh_client import LoginError
from distpool.managers.ssh_config import Config, Target
from distpool.sigpipe import QuietSocket
from distpool.transport import silence

log = Log("ssh")

_DEFAULT_KEYS = ("id_rsa", "id_ecdsa", "id_ecdsa_sk", "id_ed25519", "id_ed25519_sk", "id_xmss")
_JUMPS = 8  # jump hosts behind each other: more are a circle in the configuration
_LOG_CHANNEL = "distpool.ssh.paramiko"  # below our NullHandler: paramiko's own would print on stderr


def connect(target: Target, configuration: Config, deadline: float, jumps: int = 0) -> ParamikoConnection:
    """Log in. LoginError: what is wrong, and what to do; bounded by `deadline` (monotonic seconds)."""
    opened: list[Any] = []  # what has to be closed with the connection, last first
    try:
        sock = _reach(target, configuration, deadline, opened, jumps)
        opened.append(sock)
        transport = _start(target, sock, deadline)
        opened.append(transport)
        _check_host_key(target, transport.get_remote_server_key())
        _authenticate(target, transport, deadline)
        return ParamikoConnection(target, transport, sock, opened)
    except BaseException as error:
        _close_all(opened)
        if isinstance(error, paramiko.SSHException | EOFError | OSError):
            raise LoginError(f"the SSH connection failed: {_text(error)}") from error
        raise


# -- the way there -----------------------------------------------------------------------------------------------


def _reach(target: Target, configuration: Config, deadline: float, opened: list[Any], jumps: int) -> Any:
    """A socket, or what behaves like one, that leads to the server's port."""
    if target.proxy_jump is not None:
        return _jump(target, configuration, deadline, opened, jumps)
    if target.proxy_command is not None:
        return _proxy(target, opened)
    left = deadline - time.monotonic()
    if target.connect_timeout is not None:
        left = min(left, target.connect_timeout)
    place = f"{target.host} port {target.port}"
    try:
        sock = socket.create_connection((target.host, target.port), timeout=max(0.1, left))
    except socket.gaierror as error:
        raise LoginError(f"no such host: {target.host} ({error.strerror})") from error
    except TimeoutError as error:
        raise LoginError(
            f"no answer from {place} within {left:.0f} seconds: is the host up, and does a firewall let SSH through?"
        ) from error
    except ConnectionRefusedError as error:
        raise LoginError(f"connection refused by {place}: no sshd listens there") from error
    except (OSError, UnicodeError) as error:
        raise LoginError(f"cannot connect to {place}: {_text(error)}") from error
    _watch_line(sock)
    return QuietSocket.of(sock)


def _watch_line(sock: socket.socket) -> None:
    """Let the kernel notice when the host has vanished without a word, as it does for links; paramiko's keepalive never
    does. It answers for this process even while somebody holds the GIL."""
    silence.tune(sock)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(config.silent_seconds() * 1000))


def _jump(target: Target, configuration: Config, deadline: float, opened: list[Any], jumps: int) -> Any:
    """Through the jump hosts: a login at each, and a channel from the last to the target."""
    if jumps >= _JUMPS:
        raise LoginError(f"more than {_JUMPS} jump hosts behind each other: ProxyJump goes in a circle")
    hops = [hop.strip().removeprefix("ssh://") for hop in str(target.proxy_jump).split(",")]
    before, last = hops[:-1], hops[-1]
    try:
        hop = configuration.target(split_spec(last))
        if before:
            hop.proxy_jump = ",".join(before)
        bastion = connect(hop, configuration, deadline, jumps + 1)
    except ValueError as error:
        raise LoginError(f"ProxyJump {target.proxy_jump}: {error}") from error
    except LoginError as error:
        raise LoginError(f"at the jump host {last}: {error.reason}", error.output) from error
    opened.append(bastion)
    try:
        return bastion.open_channel(target.host, target.port, deadline)
    except OSError as error:
        raise LoginError(
            f"the jump host {last} cannot connect to {target.host} port {target.port}: {_text(error)}"
        ) from error


class _Command:
    """The program of a ProxyCommand."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def forget(self) -> None:
        self._process.returncode = 0  # not our child


def _proxy(target: Target, opened: list[Any]) -> socket.socket:
    """A socket pair with the program at its other end: pollable, and with time-outs, which its pipes would not have."""
    with no_forks:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                ["/bin/sh", "-c", f"exec {target.proxy_command}"],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
    opened.append(_Command(process))
    return QuietSocket.of(ours)


def _start(target: Target, sock: Any, deadline: float) -> paramiko.Transport:
    """Key exchange."""
    transport = paramiko.Transport(sock)
    be_quiet()
    transport.set_log_channel(_LOG_CHANNEL)
    transport.use_compression(target.compress)
    left = max(0.1, deadline - time.monotonic())
    transport.banner_timeout = transport.handshake_timeout = transport.auth_timeout = left
    known = [key.get_name() for _, key in _known_keys(target)]
    if known:  # ask for a key of a kind that we can check
        options = transport.get_security_options()
        wanted = [name for name in options.key_types if _kind(name) in known]
        options.key_types = [*wanted, *(name for name in options.key_types if name not in wanted)]
    try:
        transport.start_client(timeout=left)
        if not transport.initial_kex_done:  # what `start_client` does when its time is over: it returns
            raise TimeoutError("timed out")
    except Exception as error:
        transport.close()
        if target.proxy_command is not None:
            reason = f"ProxyCommand {target.proxy_command!r} brought no SSH connection: {_text(error)}"
        elif time.monotonic() >= deadline:
            reason = f"{target.host} port {target.port} accepts connections but does not answer: is the host hanging?"
        else:
            reason = (
                f"{target.host} port {target.port} does not talk SSH with us ({_text(error)}): is it an sshd, and "
                "does it take more logins at a time (MaxStartups, max_parallel=)?"
            )
        raise LoginError(reason) from error
    return transport


def _kind(algorithm: str) -> str:
    return "ssh-rsa" if algorithm.startswith("rsa-sha2-") else algorithm


# -- host keys ---------------------------------------------------------------------------------------------------


def host_key_name(target: Target) -> str:
    """The name under which the host stands in known_hosts."""
    if target.key_alias is not None:
        return target.key_alias
    return target.host if target.port == 22 else f"[{target.host}]:{target.port}"


def _known_keys(target: Target) -> list[tuple[str, Any]]:
    """The keys that the host is known by: (file, key)."""
    found: list[tuple[str, Any]] = []
    name = host_key_name(target)
    names = dict.fromkeys((name, name.lower()))  # OpenSSH writes names in lower case, and hashes do not show it
    for file in [*target.known_hosts, *target.system_known_hosts]:
        try:
            keys = paramiko.HostKeys(file)
        except OSError:
            continue  # there need be none
        except Exception as error:  # a line that paramiko cannot parse
            log.warning("%s cannot be used: %s", file, error)
            continue
        found += [(file, key) for name in names for key in (keys.lookup(name) or {}).values()]
    return found


def _revoked_in(target: Target, key: Any) -> str | None:
    """The file that says of this key that it must not be trusted any more; paramiko does not see such lines."""
    for file in [*target.known_hosts, *target.system_known_hosts]:
        with contextlib.suppress(OSError), open(file, encoding="ascii", errors="replace") as lines:
            if any(line.startswith("@revoked") and key.get_base64() in line.split() for line in lines):
                return file
    return None


def _check_host_key(target: Target, key: Any) -> None:
    revoked = _revoked_in(target, key)
    if revoked is not None:
        raise LoginError(f"the host key of {host_key_name(target)} is revoked (@revoked in {revoked}): do not trust it")
    known = _known_keys(target)
    if any(other == key for _, other in known):
        return
    name = host_key_name(target)
    file = target.known_hosts[0] if target.known_hosts else os.path.expanduser("~/.ssh/known_hosts")
    port = "" if target.port == 22 else f"-p {target.port} "
    mark = base64.b64encode(hashlib.sha256(key.asbytes()).digest()).decode().rstrip("=")
    shown = f"it shows {key.get_name()} SHA256:{mark}"
    same_kind = [where for where, other in known if other.get_name() == key.get_name()]
    if same_kind or (known and not target.accept_unknown):
        where = (same_kind or [known[0][0]])[0]
        if target.accept_changed:
            log.warning("the host key of %s is not the one in %s; accepted (StrictHostKeyChecking no)", name, where)
            return
        raise LoginError(
            f"the host key of {name} has CHANGED: {shown}, and {where} has another one. Somebody may be in between; if "
            f"the host was set up anew, remove the old key: ssh-keygen -f {where} -R '{name}'"
        )
    if not target.accept_unknown:
        raise LoginError(
            f"the host key of {name} is not known: {shown}, and it is not in {file}. Compare the fingerprint, then "
            f"accept it: log in once with 'ssh {port}{target.user}@{target.host}', or "
            f"'ssh-keyscan {port}{target.host} >> {file}'"
        )
    if target.known_hosts:
        with contextlib.suppress(OSError):  # it is only for the next time
            os.makedirs(os.path.dirname(file), mode=0o700, exist_ok=True)
            with open(file, "a", encoding="ascii") as lines:
                lines.write(f"{name} {key.get_name()} {key.get_base64()}\n")


# -- who we are --------------------------------------------------------------------------------------------------


def _authenticate(target: Target, transport: paramiko.Transport, deadline: float) -> None:
    """One key after the other, as OpenSSH orders them: the agent's, then files."""
    tried: list[str] = []
    problems: list[str] = []
    allowed: list[str] = []
    agent = _Agent(target)
    try:
        for name, make in [*agent.keys(), *_files(target)]:
            transport.auth_timeout = max(0.1, deadline - time.monotonic())
            try:
                key = make()
            except Exception as error:  # unreadable, or with a passphrase: paramiko has a class for each
                problems.append(f"{name}: {_text(error)}")
                continue
            tried.append(name)
            try:
                if not transport.auth_publickey(target.user, key):
                    return
                allowed = ["a second factor"]
            except paramiko.BadAuthenticationType as error:
                allowed = list(error.allowed_types)
            except paramiko.AuthenticationException:
                pass
            except (paramiko.SSHException, EOFError, OSError) as error:
                problems.append(f"{name}: {_text(error)} (too many keys tried?)")
            if not transport.is_active():
                break
    finally:
        agent.close()
    text = f"{target.host} refuses the login as {target.user}: "
    text += f"it takes none of the keys ({', '.join(tried)})" if tried else "there is no key to log in with"
    if problems:
        text += f"; not usable: {'; '.join(problems)}"
    if allowed and "publickey" not in allowed:
        text += f"; it asks for {', '.join(allowed)}, and distpool logs in with keys only"
    port = "" if target.port == 22 else f"-p {target.port} "
    text += f". Install a key there: ssh-copy-id {port}{target.user}@{target.host}; or name one: IdentityFile in "
    raise LoginError(text + "~/.ssh/config, or sshflags=['-i', FILE]")


class _Agent:
    """The keys of the user's agent, if there is one."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._sock: socket.socket | None = None

    def keys(self) -> list[tuple[str, Any]]:
        path = self._target.agent_socket or os.environ.get("SSH_AUTH_SOCK")
        agent: Any
        try:
            if path is None:
                return []
            self._sock = sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(5.0)
            sock.connect(path)
            agent = paramiko.agent.AgentSSH()
            agent._connect(sock)
            keys = agent.get_keys()
        except (OSError, AttributeError, paramiko.SSHException) as error:
            log.info("the SSH agent at %s cannot be used: %s", path, error)
            return []
        if not self._target.use_agent:  # IdentitiesOnly: of the agent's, those that are named
            named = {_public(path) for path in self._target.identity_files}
            keys = [key for key in keys if key.asbytes() in named]
        return [(f"agent: {key.comment or key.get_name()}", lambda key=key: key) for key in keys]

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()


def _public(path: str) -> bytes:
    for name in (path, path + ".pub"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            with open(name, encoding="ascii") as file:
                return base64.b64decode(file.read().split()[1])
    return b""


def _files(target: Target) -> list[tuple[str, Any]]:
    paths = target.identity_files or [
        path for name in _DEFAULT_KEYS if os.path.exists(path := os.path.expanduser(f"~/.ssh/{name}"))
    ]
    return [(path, lambda path=path: _load(path)) for path in paths]


def _load(path: str) -> Any:
    key: Any = paramiko.PKey.from_path(path)
    certificate = path + "-cert.pub"
    if os.path.exists(certificate):
        key.load_certificate(certificate)
    return key


# -- the connection ----------------------------------------------------------------------------------------------


class ParamikoConnection:
    """See `ssh_client.Connection`."""

    def __init__(self, target: Target, transport: paramiko.Transport, sock: Any, opened: list[Any]) -> None:
        self._target = target
        self._transport = transport
        self._sock = sock
        self._opened = opened

    def run(self, command: str, deadline: float) -> ParamikoSession:
        """Run a command; its streams."""
        try:
            channel = self._transport.open_session(timeout=max(0.1, deadline - time.monotonic()))
            channel.exec_command(command)
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise LoginError(f"{self._target.host} runs no command for {self._target.user}: {_text(error)}") from error
        return ParamikoSession(channel)

    def open_channel(self, host: str, port: int, deadline: float) -> Any:
        """A channel to an address as the host sees it; OSError."""
        left = max(0.1, deadline - time.monotonic())
        try:
            return self._transport.open_channel("direct-tcpip", (host, port), ("127.0.0.1", 0), timeout=left)
        except paramiko.ChannelException as error:
            code = errno.EACCES if error.code == 1 else errno.ECONNREFUSED
            why = "it does not allow it (AllowTcpForwarding)" if error.code == 1 else _text(error)
            raise OSError(
                code, f"the sshd of {self._target.host} refused to connect to {host}:{port}: {why}"
            ) from error
        except (paramiko.SSHException, EOFError) as error:
            raise OSError(errno.ECONNABORTED, f"the login to {self._target.host} failed: {_text(error)}") from error

    def dial(self, host: str, port: int, deadline: float) -> Any:
        """Streams to an address as the host sees it."""
        channel = self.open_channel(host, port, deadline)
        end = _ChannelEnd(channel)
        return end, end

    def explain(self, status: int | None, errors: str) -> str:
        """paramiko raises what is wrong; nothing is left to be read from texts."""
        return ""

    def close(self) -> None:
        """The end of the login."""
        _close_all(self._opened)

    def forget(self) -> None:
        """In a forked child: only descriptors."""
        for thing in self._opened:
            if hasattr(thing, "forget"):
                thing.forget()
            elif isinstance(thing, socket.socket):
                # Not the transport's `close`: some thread of the parent may have held its lock at the fork.
                with contextlib.suppress(OSError):
                    os.close(thing.detach())
        self._opened = []


class ParamikoSession:
    """See `ssh_client.Session`."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel

    def read(self, size: int) -> bytes:
        """What the command prints."""
        return bytes(self._channel.recv(size))

    def read_errors(self, size: int) -> bytes:
        """What it prints on stderr."""
        return bytes(self._channel.recv_stderr(size))

    def write(self, data: bytes) -> None:
        """Into its stdin."""
        with contextlib.suppress(OSError, paramiko.SSHException):
            self._channel.sendall(data)

    def status(self, timeout: float) -> int | None:
        """Its exit status; None if it did not come in time, or a signal ended it."""
        if not self._channel.status_event.wait(timeout) or self._channel.exit_status < 0:
            return None
        return int(self._channel.exit_status)

    def close(self) -> None:
        """End of its stdin, and of our interest."""
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
            self._channel.close()


class _ChannelEnd:
    """A channel as a reader and a writer for `transport.pump`."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel

    @property
    def closed(self) -> bool:
        return bool(self._channel.closed)

    def readinto(self, buffer: Any) -> int:
        data = self._channel.recv(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def write(self, data: bytes) -> int:
        return int(self._channel.send(data))

    def close(self) -> None:
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
            self._channel.close()


def _close_all(opened: list[Any]) -> None:
    while opened:
        with contextlib.suppress(Exception):  # paramiko raises whatever its thread died of
            opened.pop().close()


def _text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


__all__ = ["ParamikoConnection", "connect", "host_key_name"]
