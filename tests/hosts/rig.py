"""Several hosts on one Linux machine, for tests: each has its own address, host name, processes, /tmp and sshd.

    Rig(4)  ->  network namespace "lan" with a bridge;  for each host a network namespace there (10.199.0.11 ...),
                and in it a process 1 with mount, UTS, IPC and PID namespaces of its own, which runs sshd
    rig.driver  one more network namespace (10.199.0.10), sshd-less, with this machine's files: test programs run there

The addresses exist inside these namespaces only; nothing outside is listened on, and the machine's own network is not
touched. Programs that need the hosts run in `driver`, as `python -m hosts.inside` (see `Rig.call`). Faults: `cut`,
`heal`, `crash`, `partition`, `drop`, `refuse`, `black_hole`, `rate`, `slow`.

Everything goes with `close()`. If the process that made a rig is killed, the next `Rig` on this machine cleans up
behind it: names and the directory below /run hold its process id and start time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

BASE = Path("/run/distpool-rig")
PREFIX = "dprig"
NETWORK = "10.199.0."
ROOT = Path(__file__).resolve().parent.parent.parent
TESTS = ROOT / "tests"
PATIENCE = 30.0

_INIT = r"""
set -e
name=$1 state=$2; shift 2
hostname "$name"
mount --make-rprivate /
mount -t proc proc /proc
number=0
for path in "$@"; do
    number=$((number + 1)); mkdir -p "$state/keep/$number"; mount --bind "$path" "$state/keep/$number"
done
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
number=0
for path in "$@"; do
    number=$((number + 1)); mkdir -p "$path"; mount --bind "$state/keep/$number" "$path"; umount "$state/keep/$number"
done
mount -t tmpfs -o mode=755 tmpfs /run/sshd
# What this machine's user does at each login (pyenv: 0.1 s of a processor) is no part of what is tested or measured.
[ ! -f "$HOME/.bashrc" ] || mount --bind /dev/null "$HOME/.bashrc"
/usr/sbin/sshd -D -f "$state/sshd_config" -E "$state/sshd.log" </dev/null &
echo ready
sleep infinity &
while :; do wait; done
"""

_SSHD = """
Port 22
HostKey {state}/hostkey
PidFile none
AuthorizedKeysFile {base}/authorized_keys
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
PrintMotd no
MaxStartups 100:30:200
MaxSessions 50
Subsystem sftp internal-sftp
"""

_SSH_CONFIG = """
Host *
  User root
  IdentityFile {base}/key
  IdentitiesOnly yes
  UserKnownHostsFile {base}/known_hosts
  StrictHostKeyChecking yes
  LogLevel ERROR
"""


def lacking() -> str:
    """What this machine lacks for a rig, or nothing."""
    if sys.platform != "linux":
        return "hosts on one machine need Linux's namespaces"
    if os.geteuid() != 0:
        return "hosts on one machine need root"
    missing = [name for name in ("ip", "unshare", "nsenter", "ssh-keygen", "nft") if shutil.which(name) is None]
    if not Path("/usr/sbin/sshd").exists():
        missing.append("sshd")
    if missing:
        return f"hosts on one machine need {', '.join(missing)} (apt install iproute2 openssh-server nftables)"
    probe = f"{PREFIX}{os.getpid()}-probe"
    done = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if done.returncode:
        return f"hosts on one machine need network namespaces: {done.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], capture_output=True)
    return ""


def sh(*command: Any, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command of the machine; its output stands in the error."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, **options)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(words)}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return done


@dataclasses.dataclass
class Host:
    """One host: `name`, `address`, and `pid`, its process 1 (0: it is down)."""

    name: str
    address: str
    namespace: str
    state: str
    pid: int = 0

    def command(self, *command: Any) -> list[str]:
        """A command line of this machine that runs `command` on the host."""
        return ["nsenter", "-t", str(self.pid), "-m", "-u", "-i", "-n", "-p", "-r", "-w", "--", *map(str, command)]

    def run(self, *command: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run it there, to its end."""
        return sh(*self.command(*command), **options)

    @property
    def is_up(self) -> bool:
        """Whether its process 1 lives."""
        return self.pid > 0 and not is_gone(self.pid)

    @property
    def port(self) -> str:
        """The name of its end of the cable at the bridge."""
        return f"p-{self.name}"


class Rig:
    """The hosts; `hosts[0]` is called h1. With `description`: one that another process has made, and will close."""

    def __init__(self, count: int = 4, description: dict[str, Any] | None = None) -> None:
        self.is_owner = description is None
        if description is not None:
            self.base = Path(description["base"])
            self.lan, self.driver = description["lan"], description["driver"]
            self.hosts = [Host(**each) for each in description["hosts"]]
            return
        clean_up()
        mark = f"{PREFIX}{os.getpid()}"
        self.base = BASE / str(os.getpid())
        self.lan, self.driver = f"{mark}-lan", f"{mark}-driver"
        self.hosts = [
            Host(f"h{n}", f"{NETWORK}{10 + n}", f"{mark}-h{n}", str(self.base / f"h{n}")) for n in range(1, count + 1)
        ]
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *exc: Any) -> None:
        if self.is_owner:
            self.close()

    def describe(self) -> dict[str, Any]:
        """What another process needs to use this rig."""
        hosts = [dataclasses.asdict(host) for host in self.hosts]
        return {"base": str(self.base), "lan": self.lan, "driver": self.driver, "hosts": hosts}

    def __getitem__(self, name: str) -> Host:
        return next(host for host in self.hosts if host.name == name)

    @property
    def ssh_config(self) -> Path:
        """A configuration for `ssh -F` and its like: key and known hosts. In `driver` the hosts have names."""
        return self.base / "ssh_config"

    # -- building ----------------------------------------------------------------------------------------------

    def _build(self) -> None:
        self.base.mkdir(parents=True)
        (self.base / "owner").write_text(json.dumps(psutil.Process().create_time()))
        sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "rig", "-f", self.base / "key")
        shutil.copy(self.base / "key.pub", self.base / "authorized_keys")
        self.ssh_config.write_text(_SSH_CONFIG.format(base=self.base))
        sh("ip", "netns", "add", self.lan)
        sh("ip", "-n", self.lan, "link", "add", "bridge", "type", "bridge")
        sh("ip", "-n", self.lan, "link", "set", "bridge", "up")
        names = "".join(f"{host.address} {host.name}\n" for host in self.hosts)
        self._plug(self.driver, "p-driver", f"{NETWORK}10", "driver", names)
        for host in self.hosts:
            self._plug(host.namespace, host.port, host.address, host.name, names)
            Path(host.state).mkdir()
            sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", host.name, "-f", f"{host.state}/hostkey")
            text = _SSHD.format(state=host.state, base=self.base)
            Path(host.state, "sshd_config").write_text(text)
        known = []
        for host in self.hosts:
            kind, key, *_ = Path(host.state, "hostkey.pub").read_text().split()
            known.append(f"{host.name},{host.address} {kind} {key}\n")
        (self.base / "known_hosts").write_text("".join(known))
        Path("/run/sshd").mkdir(exist_ok=True)
        for host, wait in [(host, self._boot(host)) for host in self.hosts]:
            wait()
            until(lambda host=host: self._answers(host), f"sshd of {host.name}")  # type: ignore[misc]

    def _plug(self, namespace: str, port: str, address: str, name: str, names: str) -> None:
        """A namespace with one cable to the bridge, and the files below /etc that `ip netns exec` puts there."""
        etc = Path("/etc/netns") / namespace
        etc.mkdir(parents=True, exist_ok=True)
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n::1 localhost\n{names}")
        (etc / "resolv.conf").write_text("")
        if name != "driver":
            (etc / "hostname").write_text(f"{name}\n")
        sh("ip", "netns", "add", namespace)
        self._cable(namespace, port)
        self._address(namespace, address)
        sh("ip", "-n", namespace, "link", "set", "lo", "up")

    def _cable(self, namespace: str, port: str) -> None:
        add = ("ip", "-n", self.lan, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        sh(*add)
        sh("ip", "-n", self.lan, "link", "set", port, "master", "bridge", "up")

    def _address(self, namespace: str, address: str) -> None:
        mac = f"02:00:00:00:00:{int(address.rpartition('.')[2]):02x}"  # whatever the cable: the neighbours know it
        sh("ip", "-n", namespace, "link", "set", "eth0", "address", mac)
        sh("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
        sh("ip", "-n", namespace, "link", "set", "eth0", "up")

    def _boot(self, host: Host) -> Callable[[], None]:
        """Start the host's process 1; the function that is returned waits for it."""
        unshare = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child"]
        command = ["ip", "netns", "exec", host.namespace, *unshare, "sh", "-c", _INIT, "init", host.name, host.state]
        process = subprocess.Popen(
            [*command, *kept()], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

        def wait() -> None:
            assert process.stdout is not None
            line = process.stdout.readline()
            if line != "ready\n":
                raise RuntimeError(f"{host.name} does not start: {line}{process.stdout.read()}")
            (child,) = psutil.Process(process.pid).children()
            host.pid = child.pid
            process.stdout.close()

        self.outer = [*getattr(self, "outer", []), process]
        return wait

    def _answers(self, host: Host) -> bool:
        look = "import socket; socket.create_connection(('127.0.0.1', 22), 1).close()"
        return host.run(sys.executable, "-Sc", look, check=False).returncode == 0

    def boot(self, host: Host) -> None:
        """Start it again after a `crash`."""
        self._boot(host)()
        until(lambda: self._answers(host), f"sshd of {host.name}")

    # -- running -----------------------------------------------------------------------------------------------

    def call(self, target: str, *arguments: Any, seconds: float = PATIENCE, env: dict[str, str] | None = None) -> None:
        """Call `target` ("module:function", below tests/) with this rig and `arguments` (JSON) in a fresh interpreter
        that runs in `driver`. AssertionError, with all that was printed, if it raises or takes too long.
        """
        command = ["ip", "netns", "exec", self.driver, sys.executable, "-m", "hosts.inside", target]
        path = os.pathsep.join([str(TESTS), str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        order = json.dumps({"rig": self.describe(), "arguments": arguments, "seconds": seconds})
        process = subprocess.Popen(
            command,
            cwd=TESTS,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": path, **(env or {})},
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(order, timeout=seconds + 10.0)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            raise AssertionError(f"{target}: not done after {seconds:g} s\n{output}") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if process.returncode:
            raise AssertionError(f"{target}: exit status {process.returncode}\n{output}")
        print(output)

    # -- faults ------------------------------------------------------------------------------------------------

    def cut(self, host: Host) -> None:
        """Pull the cable: packets vanish, and no reset tells of it."""
        sh("ip", "-n", self.lan, "link", "set", host.port, "down")

    def heal(self, host: Host) -> None:
        """Plug it in again."""
        sh("ip", "-n", self.lan, "link", "set", host.port, "up")

    def crash(self, host: Host) -> None:
        """All processes of the host die at once; the kernel closes their connections."""
        if host.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(host.pid, signal.SIGKILL)
            until(lambda: is_gone(host.pid), f"the end of {host.name}")
            host.pid = 0

    def partition(self, one: Host, other: Host) -> None:
        """These two lose each other, and nobody else."""
        self._rule(one, "in", "ip", "saddr", other.address, "drop")
        self._rule(one, "out", "ip", "daddr", other.address, "drop")

    def drop(self, host: Host, percent: int) -> None:
        """So many of the packets that come to the host are lost."""
        self._rule(host, "in", "iifname", "eth0", "numgen", "random", "mod", "100", "<", percent, "drop")

    def refuse(self, host: Host, first: int = 1024, last: int = 65535) -> None:
        """New connections to these ports are refused, as by a firewall that says so."""
        ports = ("tcp", "dport", f"{first}-{last}", "tcp", "flags", "syn / syn,ack", "reject", "with", "tcp", "reset")
        self._rule(host, "in", "iifname", "eth0", *ports)

    def black_hole(self, host: Host, first: int = 1024, last: int = 65535) -> None:
        """New connections to these ports get no answer, as by a firewall that says nothing."""
        self._rule(
            host, "in", "iifname", "eth0", "tcp", "dport", f"{first}-{last}", "tcp", "flags", "syn / syn,ack", "drop"
        )

    def unfilter(self, *hosts: Host) -> None:
        """End `partition`, `drop`, `refuse` and `black_hole`, which belong to the host that was named first."""
        for host in hosts or self.hosts:
            sh("ip", "netns", "exec", host.namespace, "nft", "delete", "table", "inet", "rig", check=False)

    def _rule(self, host: Host, chain: str, *rule: Any) -> None:
        nft = ("ip", "netns", "exec", host.namespace, "nft")
        sh(*nft, "add", "table", "inet", "rig")
        for name, hook in (("in", "input"), ("out", "output")):
            sh(*nft, f"add chain inet rig {name} {{ type filter hook {hook} priority 0 ; }}")
        sh(*nft, "add", "rule", "inet", "rig", chain, " ".join(map(str, rule)))

    def rate(self, host: Host, mbit: float | None) -> None:
        """The cable carries so much, both ways; None: as much as it can."""
        for namespace, device in ((host.namespace, "eth0"), (self.lan, host.port)):
            tc = ("tc", "-n", namespace, "qdisc")
            if mbit is None:
                sh(*tc, "del", "dev", device, "root", check=False)
            else:
                shape = ("tbf", "rate", f"{mbit}mbit", "burst", "64kb", "latency", "200ms")
                sh(*tc, "replace", "dev", device, "root", *shape)

    def slow(self, host: Host, milliseconds: float, mbit: float) -> None:
        """A long, thin cable: each way takes so long and carries so much. Until `mend`, or the caller's end."""
        ends = (f"{PREFIX}{os.getpid()}a"[-15:], f"{PREFIX}{os.getpid()}b"[-15:])
        relay = Path(__file__).with_name("relay.py")
        process = subprocess.Popen(
            [sys.executable, str(relay), *ends, str(milliseconds), str(mbit)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # not ours: whoever reads that waits for the last who has it
            text=True,
        )
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        self.relays = [*getattr(self, "relays", []), process]
        sh("ip", "-n", host.namespace, "link", "del", "eth0")  # its other end goes with it
        sh("ip", "link", "set", ends[0], "netns", host.namespace, "name", "eth0")
        sh("ip", "link", "set", ends[1], "netns", self.lan, "name", host.port)
        sh("ip", "-n", self.lan, "link", "set", host.port, "master", "bridge", "up")
        self._address(host.namespace, host.address)

    def mend(self, host: Host) -> None:
        """Its usual cable, where `slow` has put another one."""
        for process in getattr(self, "relays", []):
            process.kill()
            process.wait(PATIENCE)
        self.relays = []
        until(lambda: self._is_veth(host) is not False, "the end of the slow cable")
        if self._is_veth(host) is None:
            self._cable(host.namespace, host.port)
            self._address(host.namespace, host.address)

    def _is_veth(self, host: Host) -> bool | None:
        """None: it has no cable at all."""
        shown = sh("ip", "-n", host.namespace, "-d", "link", "show", "eth0", check=False)
        return "veth" in shown.stdout if shown.returncode == 0 else None

    # -- the end -----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Remove everything."""
        for process in getattr(self, "outer", []):
            process.kill()  # `--kill-child` takes process 1 along, and that all others
            process.wait(PATIENCE)
            if process.stdout is not None:
                process.stdout.close()
        remove(os.getpid())


def kept() -> list[str]:
    """Directories below /tmp that the hosts see nevertheless: the interpreter, its environment, this project."""
    found = {str(Path(place).resolve()) for place in (sys.prefix, sys.base_prefix, ROOT)}
    return sorted(place for place in found if place.startswith("/tmp/"))


def is_gone(pid: int) -> bool:
    """Whether the process has ended, also if nobody has asked for its exit status."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> None:
    """Wait for what only a look can tell."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not after {seconds:g} s")
        time.sleep(0.02)


def clean_up() -> None:
    """Remove the rigs of processes that are gone."""
    for directory in BASE.glob("*") if BASE.exists() else ():
        if not directory.name.isdigit():
            continue
        owner = int(directory.name)
        try:
            begun = json.loads((directory / "owner").read_text())
            alive = psutil.Process(owner).create_time() == begun
        except (OSError, ValueError):  # it is being made, or was not finished
            alive = psutil.pid_exists(owner)
        except psutil.Error:
            alive = False
        if not alive:
            remove(owner)


def remove(owner: int) -> None:
    """Remove what the process `owner` has made."""
    mark = f"{PREFIX}{owner}-"
    listed = sh("ip", "netns", "list", check=False).stdout.splitlines()
    for namespace in [line.split()[0] for line in listed if line.startswith(mark)]:
        for pid in sh("ip", "netns", "pids", namespace, check=False).stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        sh("ip", "netns", "del", namespace, check=False)
    for etc in Path("/etc/netns").glob(f"{mark}*"):
        shutil.rmtree(etc, ignore_errors=True)
    for empty in (Path("/etc/netns"), BASE):
        with contextlib.suppress(OSError):
            empty.rmdir()
    shutil.rmtree(BASE / str(owner), ignore_errors=True)
    with contextlib.suppress(OSError):
        BASE.rmdir()
