"""An OpenSSH program as the client: it reads its own configuration and knows everything that OpenSSH knows (layer 8).

    connect  -> nothing yet; the first `run` is the login:   ssh -T [options] [sshflags] host command
    tunnels  -> that login is a control master:              ssh -M -S socket ... host command
                dial: ssh -S socket -O forward -L private-socket:host:port -> a Unix socket of ours, which is pollable

Forwarding to a Unix socket in a private directory needs no free port, and no other user of this machine can connect to
it, as he could to a port of the loopback device.

The program must not ask: there is nobody to answer (`BatchMode`). Its texts tell what is wrong; `explain` knows them.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import weakref
from typing import Any

from distpool import config
from distpool.managers.process import no_forks
from distpool.managers.specs import Spec
from distpool.managers.ssh_client import LoginError
from distpool.sigpipe import quietly

_FAILED = 255  # what ssh exits with for errors of its own; and for commands that a signal ended
_JANITOR = '"$@"; status=$?; rm -rf -- "$0"; exit $status'
_LONGEST_DIRECTORY = 70  # bytes: the path of a Unix socket has 104 to 108, and ssh adds 17 of its own to the name
_END_SECONDS = 2.0  # that the program has to end by itself

_TEXTS = (  # what ssh prints, and what it means; the first one found counts
    ("revoked host key", "the host key of {host} is revoked (@revoked in known_hosts): do not trust it"),
    ("remote host identification has changed", "the host key of {host} has CHANGED. Somebody may be in between; if the "
     "host was set up anew, remove the old key as ssh says below"),
    ("host key verification failed", "the host key of {host} is not known. Log in once by hand, compare the "
     "fingerprint and accept it: {login}"),
    ("cannot execute command-line and remote command", "the ssh configuration has a RemoteCommand for {host}: take it "
     "back with sshflags=['-o', 'RemoteCommand=none']"),
    ("bad configuration option", "the ssh configuration is wrong"),
    ("bad owner or permissions", "the ssh configuration has the wrong owner or permissions"),
    ("could not resolve hostname", "no such host: {host}"),
    ("too many authentication failures", "{host} refuses the login: too many keys were tried; name the right one "
     "(IdentityFile and IdentitiesOnly in ~/.ssh/config)"),
    ("permission denied", "{host} refuses the login: it takes none of the keys. Install one there (ssh-copy-id), or "
     "name one: IdentityFile in ~/.ssh/config, or sshflags=['-i', FILE]; check it with: {login}"),
    ("no such file or directory", "{program} needs a file that is not there"),
    ("connection refused", "connection refused by {host}: no sshd listens there"),
    ("timed out", "no answer from {host}: is the host up, and does a firewall let SSH through?"),
    ("no route to host", "there is no way to {host}: no route to host"),
    ("network is unreachable", "there is no way to {host}: network is unreachable"),
    ("connection closed by", "{host} closed the connection before the login: it may take only so many at a time "
     "(MaxStartups; lower max_parallel=)"),
    ("connection reset by", "{host} closed the connection before the login: it may take only so many at a time "
     "(MaxStartups; lower max_parallel=)"),
)  # fmt: skip


def connect(spec: Spec, program: list[str], flags: list[str], tunnels: bool, deadline: float) -> BinaryConnection:
    """The connection to a host; the login happens with its first command. LoginError: there is no such program."""
    if shutil.which(program[0]) is None:
        raise LoginError(f"there is no SSH program {program[0]!r} here: install OpenSSH, or use ssh=None")
    directory = ""
    if tunnels:
        try:
            directory = _socket_directory()
        except OSError as error:
            raise LoginError(f"no directory for the control socket: {error}") from error
    return BinaryConnection(spec, program, flags, directory, deadline)


def _socket_directory() -> str:
    """A new private directory whose path leaves room for the names of sockets. OSError."""
    directory = tempfile.mkdtemp(prefix="distpool-ssh-")
    if len(os.fsencode(directory)) <= _LONGEST_DIRECTORY or not os.path.isdir("/tmp"):
        return directory
    os.rmdir(directory)
    return tempfile.mkdtemp(prefix="distpool-ssh-", dir="/tmp")


class BinaryConnection:
    """See `ssh_client.Connection`."""

    def __init__(self, spec: Spec, program: list[str], flags: list[str], directory: str, deadline: float) -> None:
        self._spec = spec
        self._program = program
        self._flags = flags
        self._directory = directory
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()  # protects `_master`: two commands may be run at the same time
        self._master: BinarySession | None = None
        self._dialled: weakref.WeakSet[socket.socket] = weakref.WeakSet()

    def run(self, command: str, deadline: float) -> BinarySession:
        """Run a command; its streams. The first one logs in, and with tunnels the others use that login."""
        with self._lock:
            first = self._master is None
            left = max(1, int(deadline - time.monotonic()))
            alive = max(1, int(config.silent_seconds() / 3))
            options = ["BatchMode=yes", f"ConnectTimeout={left}"]
            # The user's own forwards, and what his other programs need, are not for this login.
            options += [f"ServerAliveInterval={alive}", "ServerAliveCountMax=2", "ClearAllForwardings=yes"]
            argv = [*self._program, "-T", "-a", "-x"]
            if self._directory:
                argv += ["-M"] if first else []
                argv += ["-S", self._socket]
                options += ["ControlPersist=no"]
            # The user's flags come first: of an option that is given twice ssh takes the first.
            argv += [*self._flags, *(part for option in options for part in ("-o", option)), *self._address(), command]
            if self._directory and first:
                # The shell removes the directory behind the program, also when this process has been killed.
                argv = ["/bin/sh", "-c", _JANITOR, self._directory, *argv]
            try:
                with no_forks:
                    process = subprocess.Popen(
                        argv,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE,
                        bufsize=0,
                        start_new_session=True,  # Ctrl-C is for the program, not for its logins
                    )
            except OSError as error:
                raise LoginError(f"{self._program[0]}: {error}") from error
            session = BinarySession(process)
            if first:
                self._master = session
            return session

    @property
    def _socket(self) -> str:
        return os.path.join(self._directory, "s")

    def _address(self) -> list[str]:
        spec = self._spec
        user = ["-l", spec.user] if spec.user is not None else []
        port = ["-p", str(spec.port)] if spec.port is not None else []
        return [*user, *port, "--", spec.host]

    def dial(self, host: str, port: int, deadline: float) -> socket.socket:
        """A connection to an address as the host sees it. OSError."""
        path = os.path.join(self._directory, str(next(self._numbers)))
        there = f"[{host}]" if ":" in host else host
        self._control("forward", f"{path}:{there}:{port}", deadline)
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(max(0.1, deadline - time.monotonic()))
            sock.connect(path)
            sock.settimeout(None)
        except OSError:
            sock.close()
            raise
        finally:
            # The connection stays; nobody else shall use the way.
            with contextlib.suppress(OSError):
                self._control("cancel", f"{path}:{there}:{port}", deadline)
            with contextlib.suppress(OSError):
                os.unlink(path)
        self._dialled.add(sock)
        return sock

    def _control(self, order: str, forward: str, deadline: float) -> None:
        # Without the user's flags and configuration: it would ask the login for the forwards in them as well.
        argv = [*self._program, "-F", os.devnull, "-S", self._socket, "-O", order, "-L", forward, *self._address()]
        try:
            done = subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=max(0.1, deadline - time.monotonic()),
                start_new_session=True,
            )
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"the login to {self._spec.host} does not answer") from error
        if done.returncode:
            said = done.stdout.decode("utf-8", "replace").strip()
            raise OSError(f"ssh cannot forward a connection through the login to {self._spec.host}: {said}")

    def explain(self, status: int | None, errors: str) -> str:
        """What is wrong, by what the program printed; empty if it was not the program."""
        if status != _FAILED:
            return ""
        low = errors.lower()
        spec = self._spec
        login = " ".join(["ssh", *(["-p", str(spec.port)] if spec.port else [])])
        login += f" {spec.user}@{spec.host}" if spec.user else f" {spec.host}"
        for text, meaning in _TEXTS:
            if text in low:
                return meaning.format(host=spec.host, program=self._program[0], login=login)
        return f"{self._program[0]} failed" if errors.strip() else ""

    def close(self) -> None:
        """The end of the login."""
        if self._master is not None:
            self._master.close()
            self._master.end()
        if self._directory:
            shutil.rmtree(self._directory, ignore_errors=True)

    def forget(self) -> None:
        """In a forked child: only descriptors."""
        for sock in list(self._dialled):
            with contextlib.suppress(OSError):
                os.close(sock.detach())
        self._dialled = weakref.WeakSet()
        if self._master is not None:
            self._master.forget()
            self._master = None


class BinarySession:
    """See `ssh_client.Session`."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def read(self, size: int) -> bytes:
        """What the command prints."""
        return self._read(self._process.stdout, size)

    def read_errors(self, size: int) -> bytes:
        """What it, or the program itself, prints on stderr."""
        return self._read(self._process.stderr, size)

    @staticmethod
    def _read(stream: Any, size: int) -> bytes:
        try:
            data = stream.read(size)
            if not data:
                stream.close()
            return data or b""
        except (OSError, ValueError):
            return b""  # closed meanwhile

    def write(self, data: bytes) -> None:
        """Into its stdin."""
        stdin = self._process.stdin
        assert stdin is not None
        view = memoryview(data)
        with contextlib.suppress(OSError, ValueError), quietly():
            while view:
                view = view[stdin.write(view) or 0 :]

    def status(self, timeout: float) -> int | None:
        """Its exit status; None if it did not come in time."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def close(self) -> None:
        """End of its stdin: what runs there ends, and the program after it."""
        with contextlib.suppress(OSError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.close()

    def end(self) -> None:
        """The program is not needed any more."""
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)  # it leads a session of its own; there may be a shell
            self._process.wait()

    def forget(self) -> None:
        """In a forked child: close copies, and leave the process alone."""
        self._process.returncode = 0
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            with contextlib.suppress(OSError, ValueError):
                if stream is not None:
                    os.close(stream.fileno())


__all__ = ["BinaryConnection", "connect"]
