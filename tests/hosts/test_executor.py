"""Executors on hosts with addresses of their own: a host that is lost costs nothing, and others take its work."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from typing import Any

import pytest

from distpool import ClusterExecutor
from hosts.rig import ROOT, Rig

clients = pytest.mark.parametrize("client", [None, "ssh"], ids=["paramiko", "openssh"])
PATIENCE = 25.0


def executor_on(rig: Rig, client: str | None, machines: list[Any], **more: Any) -> ClusterExecutor:
    return ClusterExecutor(machines, ssh=client, sshflags=["-F", str(rig.ssh_config)], exename=sys.executable, **more)


def wait_for(holds: Any, executor: ClusterExecutor) -> None:
    """Until then the executor serves, at a pace that leaves the processor to the logins that are waited for."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, (executor.workers, names(executor))
        executor.submit(abs, 1).result(PATIENCE)
        time.sleep(0.02)


def names(executor: ClusterExecutor) -> list[str]:
    """The hosts of its workers."""
    hosts = {row["pid"]: row["host"] for row in executor.stats()}
    return sorted(hosts.get(pid, "?") for pid in executor.workers)


def work(number: int) -> tuple[int, str]:
    sum(range(50_000))
    return number, platform.node()


@clients
@pytest.mark.leaves_processes("the host is started again")
@pytest.mark.parametrize("fault", ["crash", "cut"])
def test_a_host_is_lost_half_way(rig: Rig, client: str | None, fault: str) -> None:
    env = {"DISTPOOL_SILENT_SECONDS": "3"}
    rig.call("hosts.test_executor:a_host_is_lost_half_way", client, fault, env=env, seconds=50.0)


def a_host_is_lost_half_way(rig: Rig, client: str | None, fault: str) -> None:
    with executor_on(rig, client, ["h1", "h2", "h3", "h4"], retries=3) as executor:
        wait_for(lambda: names(executor) == ["h1", "h2", "h3", "h4"], executor)
        results = executor.map(lambda number: work(number), range(3000), chunksize=1)
        seen = [next(results) for _ in range(500)]
        getattr(rig, fault)(rig["h3"])
        seen += results
        assert [number for number, _ in seen] == list(range(3000)), "nothing is lost, nothing comes twice"
        assert {host for _, host in seen} == {"h1", "h2", "h3", "h4"}
        wait_for(lambda: len(executor.workers) == 4 and "h3" not in names(executor), executor)
        assert set(names(executor)) == {"h1", "h2", "h4"}
        begin = time.monotonic()
    assert time.monotonic() - begin < 10, "a launch that hangs is not waited for"


@clients
def test_a_host_comes_back(rig: Rig, client: str | None) -> None:
    rig.call("hosts.test_executor:a_host_comes_back", client)


def a_host_comes_back(rig: Rig, client: str | None) -> None:
    """All processes die at once, and the host answers again: it keeps its share, as far as it answers in time."""
    with executor_on(rig, client, [("h1", 1), ("h2", 2)], retries=3) as executor:
        wait_for(lambda: names(executor) == ["h1", "h2", "h2"], executor)
        rig["h2"].run("pkill", "-KILL", "python")  # the login's process and its workers
        assert list(executor.map(abs, range(200))) == list(range(200))
        wait_for(lambda: len(executor.workers) == 3 and "h2" in names(executor), executor)


@clients
def test_a_host_that_never_answers(rig: Rig, client: str | None) -> None:
    rig.black_hole(rig["h4"], 22, 22)
    rig.call("hosts.test_executor:a_host_that_never_answers", client, env={"DISTPOOL_WORKER_TIMEOUT": "4"})


def a_host_that_never_answers(rig: Rig, client: str | None) -> None:
    begin = time.monotonic()
    with executor_on(rig, client, ["h1", "h4"]) as executor:
        assert executor.submit(platform.node).result(PATIENCE) == "h1"
        assert time.monotonic() - begin < 4, "nobody waits for it"
        wait_for(lambda: executor._max_workers == 1, executor)
    with executor_on(rig, client, ["h4"]) as executor:
        error = executor.submit(abs, 1).exception(PATIENCE)
        assert "h4" in str(error)


@pytest.mark.leaves_processes("the host is started again")
def test_the_example(rig: Rig) -> None:
    """Four hosts, one of which loses power when half of the work is done."""
    command = ["ip", "netns", "exec", rig.driver, sys.executable, str(ROOT / "examples" / "many_hosts.py"), "--keep"]
    options = ["--ssh-config", str(rig.ssh_config), "--python", sys.executable, "--limit", "60000000"]
    with subprocess.Popen(
        [*command, *options, "h1", "h2", "h3", "h4"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "half of the work is done\n"
            rig.crash(rig["h3"])
            assert process.poll() is None, "it is lost while it is needed"
            output, errors = process.communicate(timeout=45)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    assert "3,562,115 primes below 60,000,000" in output
    assert sum(map(int, re.findall(r"\d+: (\d+)", output.splitlines()[-1]))) == 240, "each piece counted once"
