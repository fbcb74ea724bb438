"""The rig itself: hosts that are hosts, and nothing left of it, however its maker ends."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from hosts.rig import BASE, PREFIX, TESTS, Rig, clean_up, sh, until


def traces(owner: int) -> list[str]:
    """What there is of the rig of that process."""
    found = [line for line in sh("ip", "netns", "list").stdout.splitlines() if line.startswith(f"{PREFIX}{owner}-")]
    found += [str(path) for path in Path("/etc/netns").glob(f"{PREFIX}{owner}-*")]
    return found + [str(path) for path in BASE.glob(str(owner))]


def test_each_host_is_one(rig: Rig) -> None:
    names = [host.run("hostname").stdout.strip() for host in rig.hosts]
    assert names == [host.name for host in rig.hosts] and platform.node() not in names
    rig.hosts[0].run("touch", "/tmp/only-here")
    assert "only-here" in rig.hosts[0].run("ls", "/tmp").stdout
    assert "only-here" not in rig.hosts[1].run("ls", "/tmp").stdout and not os.path.exists("/tmp/only-here")
    rig.hosts[0].run("rm", "/tmp/only-here")
    inside = ("ip", "netns", "exec", rig.driver)
    for host in rig.hosts:
        assert sh(*inside, "ssh", "-F", rig.ssh_config, host.name, "hostname").stdout.strip() == host.name
    assert "10.199" not in sh("ip", "addr").stdout, "the machine's own network has none of the addresses"


@pytest.mark.leaves_processes("the rig of a process that was killed is removed by hand")
def test_a_killed_maker_leaves_nothing_for_long(whole_rig: Rig) -> None:
    program = "from hosts.rig import Rig; rig = Rig(1); print('up', flush=True); input()"
    maker = subprocess.Popen(
        [sys.executable, "-c", program], cwd=TESTS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert maker.stdout is not None and maker.stdout.readline() == "up\n"
    assert len(traces(maker.pid)) >= 5
    maker.kill()
    maker.communicate()
    clean_up()
    until(lambda: not traces(maker.pid), "the end of the traces")
    assert len(traces(os.getpid())) >= 5, "ours is still there"


def test_what_fails_inside_is_told(rig: Rig) -> None:
    with pytest.raises(AssertionError, match="(?s)exit status 1.*what went wrong"):
        rig.call("hosts.test_rig:fails", "what went wrong")
    with pytest.raises(AssertionError, match="(?s)Timeout"):
        rig.call("hosts.test_rig:hangs", seconds=1)


def fails(rig: Rig, text: str) -> None:
    raise ValueError(text)


def hangs(rig: Rig) -> None:
    sys.stdout.flush()
    subprocess.run(["sleep", "60"])
