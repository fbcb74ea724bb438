"""~/.ssh/config, the agent, jump hosts and proxy commands, against a real sshd."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import distpool
from distpool import remotecall_fetch, rmprocs

from .sshd import PYTHON, Server, keygen, missing, options
from .test_ssh import sessions, wait_until


def works(machines: list[Any], **more: Any) -> None:
    pids = distpool.addprocs(machines, **more)
    assert [remotecall_fetch(abs, pid, -1) for pid in pids] == [1] * len(pids)
    rmprocs(pids)


def test_the_user_s_own_configuration(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For paramiko; OpenSSH takes the home directory of the password file, whatever HOME says."""
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "config").write_text("Include included\n")
    shutil.copy(server.config, tmp_path / ".ssh" / "included")
    monkeypatch.setenv("HOME", str(tmp_path))
    works(["host1"], exename=PYTHON)


def write(server: Server, path: Path, *lines: str) -> list[str]:
    """Flags for a configuration with these lines before the server's own."""
    path.write_text("\n".join([*lines, server.config.read_text()]))
    return ["-F", str(path)]


def test_default_keys(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".ssh").mkdir()
    shutil.copy(server.key, tmp_path / ".ssh" / "id_ed25519")
    shutil.copy(server.known_hosts, tmp_path / ".ssh" / "known_hosts")
    monkeypatch.setenv("HOME", str(tmp_path))
    works([f"127.0.0.1:{server.port}"], exename=PYTHON)


def test_hashed_known_hosts(server: Server, ssh: Any, tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    shutil.copy(server.known_hosts, known)
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(known)], check=True, capture_output=True)
    assert "127.0.0.1" not in known.read_text()
    flags = write(server, tmp_path / "config", f"UserKnownHostsFile {known}")
    works(["host1"], **options(server, ssh, sshflags=flags))


def test_revoked_host_keys(server: Server, ssh: Any, tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    kind, key, *_ = server.host_key.with_suffix(".pub").read_text().split()
    known.write_text(server.known_hosts.read_text() + f"@revoked * {kind} {key}\n")
    flags = write(server, tmp_path / "config", f"UserKnownHostsFile {known}", "StrictHostKeyChecking accept-new")
    with pytest.raises(distpool.CompositeException, match="is revoked"):
        distpool.addprocs(["host1"], **options(server, ssh, sshflags=flags, timeout=20))


def test_the_kind_of_host_key_that_is_known_is_asked_for(ssh: Any, tmp_path: Path) -> None:
    if missing():
        pytest.skip(missing())
    rsa = tmp_path / "host_rsa"
    subprocess.run(["ssh-keygen", "-q", "-t", "rsa", "-b", "2048", "-N", "", "-f", str(rsa)], check=True)
    own = Server(tmp_path / "sshd", f"HostKey {rsa}")
    try:
        kind, key, *_ = rsa.with_suffix(".pub").read_text().split()
        own.known_hosts.write_text(f"[127.0.0.1]:{own.port} {kind} {key}\n")
        works(["host1"], **options(own, ssh))
    finally:
        own.stop()


def test_a_host_key_alias(server: Server, ssh: Any, tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    known.write_text("farm " + server.known_hosts.read_text().splitlines()[0].split(" ", 1)[1] + "\n")
    flags = write(server, tmp_path / "config", f"UserKnownHostsFile {known}", "HostKeyAlias farm")
    works(["host1"], **options(server, ssh, sshflags=flags))


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An agent that nobody knows of yet; its socket."""
    if shutil.which("ssh-agent") is None:
        pytest.skip("needs ssh-agent")
    path = tmp_path / "agent"
    process = subprocess.Popen(["ssh-agent", "-D", "-a", str(path)], stdout=subprocess.DEVNULL)
    wait_until(path.exists)
    yield path
    process.terminate()
    process.wait()


def test_the_agent(server: Server, ssh: Any, tmp_path: Path, agent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent has a key that needs a passphrase on disk."""
    key = tmp_path / "id"
    shutil.copy(server.key, key)
    key.chmod(0o600)
    environment = {**os.environ, "SSH_AUTH_SOCK": str(agent)}
    subprocess.run(["ssh-add", "-q", str(key)], check=True, env=environment, capture_output=True)
    subprocess.run(["ssh-keygen", "-q", "-p", "-N", "secret", "-f", str(key)], check=True, capture_output=True)
    shutil.copy(f"{server.key}.pub", f"{key}.pub")
    text = server.config.read_text().replace(str(server.key), str(key))
    (tmp_path / "config").write_text(text)
    flags = ["-F", str(tmp_path / "config")]
    with pytest.raises(distpool.CompositeException, match="refuses the login"):
        distpool.addprocs(["host1"], **options(server, ssh, sshflags=[*flags, "-o", "IdentityAgent=none"]))
    monkeypatch.setenv("SSH_AUTH_SOCK", str(agent))
    works(["host1"], **options(server, ssh, sshflags=flags))
    monkeypatch.delenv("SSH_AUTH_SOCK")
    works(["host1"], **options(server, ssh, sshflags=[*flags, "-o", f"IdentityAgent={agent}"]))


def test_an_agent_with_too_many_keys(server: Server, tmp_path: Path, agent: Path, ssh: Any) -> None:
    """IdentitiesOnly: the server's patience is not spent on keys that nobody named."""
    environment = {**os.environ, "SSH_AUTH_SOCK": str(agent)}
    for number in range(8):
        key = keygen(tmp_path / f"key{number}")
        subprocess.run(["ssh-add", "-q", str(key)], check=True, env=environment, capture_output=True)
    works(["host1"], **options(server, ssh, sshflags=["-o", f"IdentityAgent={agent}"]))


def test_a_key_of_another_kind(server: Server, ssh: Any, tmp_path: Path) -> None:
    key = tmp_path / "rsa"
    subprocess.run(["ssh-keygen", "-q", "-t", "rsa", "-b", "2048", "-N", "", "-f", str(key)], check=True)
    own = Server(tmp_path / "sshd", f"AuthorizedKeysFile {key}.pub")
    try:
        text = own.config.read_text().replace(str(own.key), str(key))
        (tmp_path / "config").write_text(text)
        works(["host1"], **options(own, ssh, sshflags=["-F", str(tmp_path / "config")]))
    finally:
        own.stop()


# -- the way there -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jumps", ["host2", "host2,host3"])
@pytest.mark.parametrize("tunnel", [False, True])
def test_jump_hosts(server: Server, ssh: Any, tmp_path: Path, jumps: str, tunnel: bool) -> None:
    flags = write(server, tmp_path / "config", "Host host1", f"  ProxyJump {jumps}")
    before = server.logins()
    works([("host1", 2)], **options(server, ssh, sshflags=flags, tunnel=tunnel))
    assert server.logins() == before + 2 + jumps.count(",")
    wait_until(lambda: not sessions(server))


def test_a_jump_host_that_fails(server: Server, ssh: Any, tmp_path: Path) -> None:
    flags = write(server, tmp_path / "config", "Host host1", "  ProxyJump no-such-host.invalid")
    with pytest.raises(distpool.CompositeException) as info:
        distpool.addprocs(["host1"], **options(server, ssh, sshflags=flags, timeout=20))
    (error,) = info.value.exceptions
    assert error.host == "host1" and "no-such-host.invalid" in str(error)


def test_what_the_jump_host_cannot_reach(server: Server, ssh: Any, tmp_path: Path) -> None:
    from .sshd import free_port

    flags = write(server, tmp_path / "config", "Host gone", f"  Port {free_port()}", "  HostName 127.0.0.1")
    flags += ["-J", f"127.0.0.1:{server.port}"]
    with pytest.raises(distpool.CompositeException) as info:
        distpool.addprocs(["gone"], **options(server, ssh, sshflags=flags, timeout=20))
    assert "refused" in str(info.value.exceptions[0]) or "jump host" in str(info.value.exceptions[0])


def test_jump_hosts_in_a_circle(server: Server, tmp_path: Path) -> None:
    flags = write(server, tmp_path / "config", "Host host1", "  ProxyJump host2", "Host host2", "  ProxyJump host1")
    with pytest.raises(distpool.CompositeException, match="circle"):
        distpool.addprocs(["host1"], **options(server, None, sshflags=flags))


RELAY = """
import os, socket, sys, threading
sock = socket.create_connection((sys.argv[1], int(sys.argv[2])))
def out():
    while data := sock.recv(65536):
        os.write(1, data)
    os._exit(0)
threading.Thread(target=out, daemon=True).start()
while data := os.read(0, 65536):
    sock.sendall(data)
"""


def test_a_proxy_command(server: Server, ssh: Any, tmp_path: Path) -> None:
    (tmp_path / "relay.py").write_text(RELAY)
    command = f"{sys.executable} {tmp_path}/relay.py %h %p"
    flags = write(server, tmp_path / "config", "Host host1", f"  ProxyCommand {command}")
    works([("host1", 2)], **options(server, ssh, sshflags=flags))
    works([("host1", 2)], **options(server, ssh, sshflags=flags, tunnel=True))
    wait_until(lambda: not sessions(server))


def test_a_proxy_command_that_fails(server: Server, ssh: Any, tmp_path: Path) -> None:
    flags = write(server, tmp_path / "config", "Host host1", "  ProxyCommand false")
    with pytest.raises(distpool.CompositeException) as info:
        distpool.addprocs(["host1"], **options(server, ssh, sshflags=flags, timeout=20))
    assert "ProxyCommand" in str(info.value.exceptions[0]) or "closed" in str(info.value.exceptions[0])
