"""Executors and pools on hosts that are reached by SSH: the faults of one machine, and machines that go away."""

from __future__ import annotations

import collections
import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from distpool import ClusterExecutor, CompositeException, DistPool, LaunchWorkerError, ProcessExitedException

from .sshd import ADDRESSES, Server, options

PATIENCE = 45.0
Make = Callable[..., ClusterExecutor]


@pytest.fixture
def make(server: Server, ssh: Any) -> Iterator[Make]:
    made: list[ClusterExecutor] = []

    def one(hosts: Any, **more: Any) -> ClusterExecutor:
        made.append(ClusterExecutor(hosts, **options(server, ssh, **more)))
        return made[-1]

    yield one
    for executor in made:
        executor.kill_workers()
        executor.shutdown()


def wait_for(holds: Callable[[], object], executor: ClusterExecutor) -> None:
    """Calls go on meanwhile."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, "did not come true in time"
        executor.submit(abs, 1).result(PATIENCE)


def test_a_job_on_two_workers(server: Server, make: Make) -> None:
    before = server.logins()
    executor = make([("127.0.0.1", 2)])
    scale = 3
    assert list(executor.map(lambda x: scale * x, range(100))) == [3 * x for x in range(100)]
    wait_for(lambda: len(executor.workers) == 2, executor)
    assert executor._max_workers == 2 and server.logins() == before + 1
    assert executor.pmap(lambda x: 1 / x, [1, 0, 2], on_error=lambda error: type(error)) == [1, ZeroDivisionError, 0.5]


def test_replacements_need_no_login(server: Server, make: Make) -> None:
    before = server.logins()
    executor = make([("127.0.0.1", 2)])
    for _ in range(5):
        assert isinstance(executor.submit(os._exit, 3).exception(PATIENCE), ProcessExitedException)
        wait_for(lambda: len(executor.workers) == 2, executor)
    executor.scale(4)
    wait_for(lambda: len(executor.workers) == 4, executor)
    for pid in executor.workers:  # nobody is left for a moment
        executor.options(pids=[pid]).submit(os._exit, 3)
    wait_for(lambda: len(executor.workers) == 4, executor)
    assert server.logins() == before + 1


def test_F25_a_worker_is_killed_every_fifty_milliseconds(server: Server, make: Make) -> None:
    before = server.logins()
    executor = make([("127.0.0.1", 3)])
    over = threading.Event()

    def kill() -> None:
        while not over.wait(0.05):
            # Those that have joined: three launches in a row that are killed are a host that brings nobody.
            ospids = [member.ospid for member in list(executor._crew.members.values()) if member.listed]
            with contextlib.suppress(ProcessLookupError):
                if ospids:
                    os.kill(random.choice(ospids), signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        values = executor.pmap(lambda x: sum(range(10_000)) and x, range(4000), retry_delays=[0] * 20)
    finally:
        over.set()
        thread.join()
    assert values == list(range(4000))
    assert server.logins() == before + 1


def test_F12_replaced_after_so_many_tasks(make: Make, tmp_path: Path) -> None:
    path = str(tmp_path / "ran")

    def note(number: int) -> int:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(descriptor, f"{number} {os.getpid()}\n".encode())
        os.close(descriptor)
        return number

    executor = make([("127.0.0.1", 2)], max_tasks_per_child=3)
    assert list(executor.map(note, range(60))) == list(range(60))
    ran = [line.split() for line in Path(path).read_text().splitlines()]
    assert sorted(int(number) for number, _ in ran) == list(range(60)), "each exactly once"
    assert max(collections.Counter(ospid for _, ospid in ran).values()) <= 3


def test_a_login_that_was_killed_is_made_anew(server: Server, make: Make) -> None:
    before = server.logins()
    executor = make([("127.0.0.1", 2)], retries=3)
    wait_for(lambda: len(executor.workers) == 2, executor)
    parent = executor.submit(os.getppid).result(PATIENCE)
    login = psutil.Process(parent)
    login.kill()  # and its workers go with it
    login.wait(PATIENCE)
    assert list(executor.map(abs, range(100))) == list(range(100))
    wait_for(lambda: len(executor.workers) == 2, executor)
    assert executor.submit(os.getppid).result(PATIENCE) != parent
    assert before + 2 <= server.logins() <= before + 3


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), -signal.SIGKILL),
        (lambda: os._exit(7), 7),
        (lambda: __import__("ctypes").string_at(0), -signal.SIGSEGV),
    ],
    ids=["killed", "exit", "segfault"],
)
def test_F1_death_costs_itself(make: Make, bad: Any, code: int) -> None:
    executor = make([("127.0.0.1", 2)])
    wait_for(lambda: len(executor.workers) == 2, executor)
    futures = [executor.submit(bad if number == 3 else lambda x=number: x * x) for number in range(8)]
    error = futures[3].exception(PATIENCE)
    assert isinstance(error, ProcessExitedException) and error.exitcode == code
    assert [f.result(PATIENCE) for f in futures if f is not futures[3]] == [x * x for x in range(8) if x != 3]
    assert executor.submit(lambda: 81).result(PATIENCE) == 81
    wait_for(lambda: len(executor.workers) == 2, executor)


def test_F2_with_calls_sent_ahead(make: Make) -> None:
    executor = make([("127.0.0.1", 2)])
    list(executor.map(lambda x: x, range(200)))  # now calls are sent ahead
    futures = [executor.submit(lambda x: os._exit(7) if x == 20 else x, number) for number in range(60)]
    failed = [number for number, future in enumerate(futures) if future.exception(PATIENCE) is not None]
    assert failed == [20]
    assert [f.result() for number, f in enumerate(futures) if number != 20] == [x for x in range(60) if x != 20]


def test_F3_exit_is_an_exception(make: Make) -> None:
    executor = make(["127.0.0.1"])
    (pid,) = {executor.submit(os.getpid).result(PATIENCE)}
    error = executor.submit(sys.exit, 7).exception(PATIENCE)
    assert isinstance(error, SystemExit) and error.code == 7
    assert executor.submit(os.getpid).result(PATIENCE) == pid


@pytest.mark.parametrize("deaf", [False, True], ids=["loop", "deaf"])
def test_F7_time_limit(make: Make, deaf: bool, tmp_path: Path) -> None:
    path = tmp_path / "pid"

    def work() -> None:
        path.write_text(str(os.getpid()))
        if deaf:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        while True:
            time.sleep(60 if deaf else 0)

    executor = make(["127.0.0.1"])
    assert executor.submit(abs, -1).result(PATIENCE) == 1
    begin = time.monotonic()
    assert isinstance(executor.options(timeout=0.5).submit(work).exception(PATIENCE), TimeoutError)
    assert time.monotonic() - begin < 10
    assert executor.submit(abs, -2).result(PATIENCE) == 2, "its worker was ended and replaced"
    wait_for(lambda: not alive(int(path.read_text())), executor)


def alive(ospid: int) -> bool:
    try:
        with open(f"/proc/{ospid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


needs_hosts = pytest.mark.skipif(len(ADDRESSES) < 3, reason="needs several loopback addresses")


def host_of(executor: ClusterExecutor) -> dict[int, str]:
    """pid -> host of each worker."""
    crew = executor._crew
    return {pid: crew.members[pid].config.environ["machine"] for pid in executor.workers}


@needs_hosts
def test_a_host_that_is_killed(server: Server, make: Make) -> None:
    """Every process of host2 dies at once, and its SSH server answers no more: its calls run elsewhere."""
    executor = make([("host1", 1), ("host2", 2)], retries=3)
    wait_for(lambda: len(executor.workers) == 3, executor)
    victims = [member for pid, member in executor._crew.members.items() if host_of(executor)[pid] == "host2"]
    assert len(victims) == 2
    config = server.config.read_text()
    try:
        server.config.write_text(config.replace(f"HostName {ADDRESSES[1]}", "HostName 127.0.0.99"))
        results = executor.map(lambda x: sum(range(20_000)) and x, range(2000))
        login = victims[0].config.userdata
        for member in victims:
            os.kill(member.ospid, signal.SIGKILL)
        login.close()
        assert list(results) == list(range(2000)), "nothing is lost"
        wait_for(lambda: len(executor.workers) == 3, executor)
        assert set(host_of(executor).values()) == {"host1"}
    finally:
        server.config.write_text(config)


@needs_hosts
def test_a_host_that_is_not_there(make: Make) -> None:
    executor = make(["host1", "nosuchhost.invalid"])
    assert executor.submit(abs, -1).result(PATIENCE) == 1
    wait_for(lambda: executor._max_workers == 1, executor)


def test_no_host_is_there(make: Make) -> None:
    executor = make(["nosuchhost.invalid", ("nosuchhost2.invalid", 4)])
    error = executor.submit(abs, -1).exception(PATIENCE)
    assert isinstance(error, CompositeException)
    assert sorted(each.host for each in error.exceptions) == ["nosuchhost.invalid", "nosuchhost2.invalid"]  # type: ignore[attr-defined]
    single = make("nosuchhost.invalid").submit(abs, -1).exception(PATIENCE)
    assert isinstance(single, LaunchWorkerError) and single.host == "nosuchhost.invalid"


def test_bad_keywords_are_refused_at_the_call(make: Make) -> None:
    with pytest.raises(ValueError, match="^Invalid keyword argument foo$"):
        make(["127.0.0.1"], foo=1)
    with pytest.raises(ValueError, match="tunnel must be"):
        make(["127.0.0.1"], tunnel="perhaps")


def test_a_pool_by_machine_file_and_url(server: Server, ssh: Any, tmp_path: Path) -> None:
    path = tmp_path / "machines"
    path.write_text("2*127.0.0.1  # this one\n")
    with DistPool(path, **options(server, ssh)) as pool:
        assert pool.map(lambda x: -x, range(10)) == [-x for x in range(10)]
        assert pool.size == 2
    with ClusterExecutor("ssh://2*127.0.0.1", **options(server, ssh)) as executor:
        assert executor.submit(abs, -3).result(PATIENCE) == 3
    with ClusterExecutor("127.0.0.1", **options(server, ssh)) as executor:
        assert executor.submit(abs, -4).result(PATIENCE) == 4


def test_one_worker_for_each_processor(make: Make) -> None:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    executor = make([("127.0.0.1", "auto")])
    wait_for(lambda: len(executor.workers) == count and executor._max_workers == count, executor)
    least = make([("127.0.0.1", "auto")], max_workers=1)
    assert least.submit(abs, -1).result(PATIENCE) == 1
    wait_for(lambda: len(least._crew.members) == 1 and not least._crew.supply.busy, least)
    assert len(least.workers) == least._max_workers == 1


def test_scale(make: Make) -> None:
    executor = make(["127.0.0.1"])
    assert executor.submit(abs, -1).result(PATIENCE) == 1
    executor.scale(3)
    wait_for(lambda: len(executor.workers) == 3, executor)
    executor.scale(1)
    wait_for(lambda: len(executor.workers) == 1, executor)


def test_nothing_is_left(server: Server, ssh: Any) -> None:
    with ClusterExecutor([("127.0.0.1", 2)], **options(server, ssh)) as executor:
        ospids = set(executor.map(lambda _: os.getpid(), range(50)))
    deadline = time.monotonic() + PATIENCE
    while (
        any(map(alive, ospids))
        or subprocess.run(["pgrep", "-f", f"sshd.*{server.directory}.*priv"], capture_output=True, check=False).stdout
    ):
        assert time.monotonic() < deadline
        time.sleep(0.02)
