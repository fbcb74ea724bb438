"""An sshd of the tests' own: on loopback addresses, an unprivileged port, with its own keys and configuration."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PYTHON = sys.executable


def has_ipv6() -> bool:
    """Whether the loopback device has an IPv6 address."""
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


ADDRESSES = ("127.0.0.1", "127.0.0.2", "127.0.0.3") if sys.platform == "linux" else ("127.0.0.1",)
"""Each is a host of its own to a client."""


def find_sshd() -> str | None:
    """sshd wants to be called by its absolute path, and stands where users' PATH does not lead."""
    return shutil.which("sshd", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))


def missing() -> str:
    """What these tests need and this machine has not; empty if nothing."""
    if sys.platform == "win32":
        return "needs a Unix machine"
    lacking = [name for name in ("ssh", "ssh-keygen") if shutil.which(name) is None]
    if find_sshd() is None:
        lacking.append("sshd (Debian: apt-get install openssh-server)")
    return f"needs {', '.join(lacking)}" if lacking else ""


def keygen(path: Path, *options: str) -> Path:
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", *options, "-f", str(path)], check=True, stdin=subprocess.DEVNULL
    )
    return path


class Server:
    """One running sshd. `log()` is what it has written; `logins()` how many came in."""

    def __init__(self, directory: Path, *lines: str) -> None:
        self.directory = directory
        directory.mkdir(mode=0o700, exist_ok=True)
        self.user = getpass.getuser()
        self.key = directory / "id"
        self.known_hosts = directory / "known_hosts"
        self.config = directory / "config"
        self.logfile = directory / "log"
        if os.geteuid() == 0:
            os.makedirs("/run/sshd", mode=0o755, exist_ok=True)
        self.host_key = keygen(directory / "host_key")
        keygen(self.key)
        self.port = free_port()
        self.write_sshd_config(lines)
        self.write_client_config()
        self.process = subprocess.Popen(
            [str(find_sshd()), "-D", "-f", str(directory / "sshd_config"), "-E", str(self.logfile)],
            stdin=subprocess.DEVNULL,
        )
        wait_for_port(self.port)

    def write_sshd_config(self, lines: tuple[str, ...]) -> None:
        text = [
            *lines,  # of a keyword that stands twice the first counts
            f"Port {self.port}",
            *(f"ListenAddress {address}" for address in (*ADDRESSES, *(["::1"] if has_ipv6() else []))),
            f"HostKey {self.host_key}",
            f"AuthorizedKeysFile {self.key}.pub",
            "PidFile none",
            "UsePAM no",
            "StrictModes no",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "PermitRootLogin yes",
            "MaxStartups 100",
            "LogLevel VERBOSE",
        ]
        (self.directory / "sshd_config").write_text("\n".join(text) + "\n")

    def write_client_config(self, *lines: str) -> None:
        public = (self.directory / "host_key.pub").read_text().split()
        known = [f"[{address}]:{self.port} {public[0]} {public[1]}" for address in (*ADDRESSES, "::1")]
        self.known_hosts.write_text("\n".join(known) + "\n")
        hosts = [f"Host host{number}\n  HostName {address}" for number, address in enumerate(ADDRESSES, 1)]
        text = [
            *lines,
            *hosts,
            "Host *",
            f"  Port {self.port}",
            f"  IdentityFile {self.key}",
            "  IdentitiesOnly yes",
            f"  UserKnownHostsFile {self.known_hosts}",
            "  KexAlgorithms curve25519-sha256",  # the default costs 200 ms
        ]
        self.config.write_text("\n".join(text) + "\n")

    @property
    def flags(self) -> list[str]:
        return ["-F", str(self.config)]

    def log(self) -> str:
        return self.logfile.read_text()

    def logins(self) -> int:
        return self.log().count("Accepted publickey")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_for_port(port: int, seconds: float = 10.0) -> None:
    """Until somebody accepts connections there: sshd tells nobody when it is ready."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def options(server: Server, ssh: Any, **more: Any) -> dict[str, Any]:
    """Keywords of `addprocs` for this server and client."""
    flags = [*server.flags, *more.pop("sshflags", [])]
    return {"ssh": ssh, "sshflags": flags, "exename": PYTHON, **more}
