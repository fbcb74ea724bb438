"""The hosts of a batch job, from the variables and files of its scheduler."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from distpool import ClusterExecutor
from distpool.managers.batch import VARIABLES, expand_nodes, machines_of_job, tasks_per_node


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node", ["node"]),
        ("a,b", ["a", "b"]),
        ("n[1-3,7],m2", ["n1", "n2", "n3", "n7", "m2"]),
        ("n[08-10]", ["n08", "n09", "n10"]),
        ("n[001,9-10]", ["n001", "n9", "n10"]),
        ("r[1-2]n[3-4]-ib.cluster", ["r1n3-ib.cluster", "r1n4-ib.cluster", "r2n3-ib.cluster", "r2n4-ib.cluster"]),
        ("gpu-[5]", ["gpu-5"]),
    ],
)
def test_slurm_node_lists(text: str, names: list[str]) -> None:
    assert expand_nodes(text) == names


@pytest.mark.parametrize(
    "text",
    ["", "a,,b", "n[", "n]", "n[]", "n[1-]", "n[a-b]", "n[3-1]", "n[1[2]]", "n[1-9999999999]", "n[1-999][1-999]"],
)
def test_what_is_no_node_list(text: str) -> None:
    with pytest.raises(ValueError, match="not a list of nodes"):
        expand_nodes(text)


def test_slurm_tasks() -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("4") == [4]
    for text in ("", "a", "2(x)", "2x3", "2(x3", "-1", "1(x99999999)"):
        with pytest.raises(ValueError, match="not a list of numbers"):
            tasks_per_node(text)


def test_slurm() -> None:
    job = {"SLURM_JOB_NODELIST": "n[1-3,7],m2", "SLURM_TASKS_PER_NODE": "2(x3),1,4"}
    assert machines_of_job(job) == [("n1", 2), ("n2", 2), ("n3", 2), ("n7", 1), ("m2", 4)]
    assert machines_of_job({"SLURM_JOB_NODELIST": "n[1-2]"}) == [("n1", 1), ("n2", 1)]
    with pytest.raises(ValueError, match="do not fit: 5 nodes, 2 numbers"):
        machines_of_job({**job, "SLURM_TASKS_PER_NODE": "2,1"})


def test_pbs(tmp_path: Path) -> None:
    path = tmp_path / "nodes"
    path.write_text("n1\nn1\nn2\nn1\n")
    assert machines_of_job({"PBS_NODEFILE": str(path)}) == [("n1", 3), ("n2", 1)]
    with pytest.raises(FileNotFoundError):
        machines_of_job({"PBS_NODEFILE": str(tmp_path / "none")})
    path.write_text("\n")
    with pytest.raises(ValueError, match="names no host"):
        machines_of_job({"PBS_NODEFILE": str(path)})


def test_sge(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("n1 4 all.q@n1 UNDEFINED\nn2.cluster 2 all.q@n2 0,1:0,2\nn1 1 long.q@n1 <NULL>\n")
    assert machines_of_job({"PE_HOSTFILE": str(path)}) == [("n1", 5), ("n2.cluster", 2)]


def test_lsf() -> None:
    assert machines_of_job({"LSB_HOSTS": "a a b a"}) == [("a", 3), ("b", 1)]
    assert machines_of_job({"LSB_MCPU_HOSTS": "a 4 b 2 ", "LSB_HOSTS": "x"}) == [("a", 4), ("b", 2)]
    for text in ("a", "a b", "4 a", "a 4 b"):
        with pytest.raises(ValueError, match="LSB_MCPU_HOSTS"):
            machines_of_job({"LSB_MCPU_HOSTS": text})


def test_no_job() -> None:
    with pytest.raises(ValueError, match="SLURM_JOB_NODELIST, PBS_NODEFILE, PE_HOSTFILE, LSB_MCPU_HOSTS, LSB_HOSTS"):
        machines_of_job({"SLURM_JOB_NODELIST": " "})


def test_env_outside_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="this is no batch job"):
        ClusterExecutor("env")


def test_slurm_itself_agrees() -> None:
    """Where its client is installed."""
    text = "n[1-3,07-09],m2,r[1-2]x[5,7]"
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", text], capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        pytest.skip("scontrol is not installed")
    if done.returncode:
        pytest.skip(done.stderr)
    assert done.stdout.split() == expand_nodes(text)
