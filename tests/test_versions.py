"""Versions of two processes: what fits, what does not, and that both sides are named before anything else is read."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import cloudpickle
import pytest

import distpool
from distpool import ClusterManager, CompositeException, VersionMismatchError, WorkerConfig, addprocs, workers
from distpool.errors import ProtocolError
from distpool.wire import messages, versions


def changed(what: str, value: str) -> list[str]:
    found = list(versions.own())
    found[versions.NAMES.index(what)] = value
    return found


def test_own_versions() -> None:
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert versions.own() == [versions.WIRE, distpool.__version__, python, sys.byteorder, cloudpickle.__version__]


def test_cloudpickle_is_not_imported_for_its_version() -> None:
    program = (
        "import sys, distpool; from distpool.wire import versions; print(versions.own()[-1]);"
        "assert 'cloudpickle' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == cloudpickle.__version__


def test_what_fits() -> None:
    assert versions.mismatch(versions.own(), "it") == ""
    major, minor, *_ = cloudpickle.__version__.split(".")
    assert versions.mismatch(changed("cloudpickle", f"{major}.{minor}.99"), "it") == ""
    assert versions.mismatch(changed("cloudpickle", ""), "it") == "", "its first pickle will tell"
    assert versions.mismatch([*versions.own(), "news of a later version"], "it") == ""


@pytest.mark.parametrize("what", versions.NAMES)
def test_what_does_not_fit_is_named_on_both_sides(what: str) -> None:
    text = versions.mismatch(changed(what, "99.9"), "worker 7 on far")
    mine = versions.own()[versions.NAMES.index(what)]
    assert text.startswith(f"worker 7 on far has {what} 99.9, this process {mine} (")
    assert text.count("this process") == 1


def test_several_at_once_and_too_few() -> None:
    text = versions.mismatch(["0"], "it")
    assert all(name in text for name in versions.NAMES[:-1]) and "(unknown)" in text


@pytest.mark.parametrize("control", [b"", b"{}", b"[]", b"[1]", b"[[1, 2]]", b'["text"]', b"\xff", b"null"])
def test_what_is_no_list_of_versions(control: bytes) -> None:
    with pytest.raises(ProtocolError):
        versions.read(control, 0)


def test_they_stand_where_later_versions_will_look() -> None:
    joined = messages.Joined(versions.own(), 5, "host", False)
    join = messages.Join(2, versions.own(), "", "", 0, "")
    assert versions.read(joined.pack(), 0) == versions.own() == versions.read(join.pack(), 1)
    later = [json.loads(join.pack())[0], ["9"], {"a": "shape", "of": "its own"}]
    assert versions.read(json.dumps(later).encode(), 1) == ["9"]


_WORKER = textwrap.dedent("""
    import sys
    from distpool.wire import messages, versions
    found = versions.own()
    found[int(sys.argv[1])] = "99.9"
    if sys.argv[2] == "other shape":
        messages.Joined.pack = lambda self: __import__("json").dumps([self.versions, "all", "different"]).encode()
        messages.Join.unpack = classmethod(lambda cls, control: 1 / 0)
    from distpool import start_worker
    start_worker()
""")


class Another(ClusterManager):
    """Starts a worker that says it is of another version."""

    def __init__(self, what: str, shape: str) -> None:
        self.what, self.shape = what, shape

    def launch(self, params: dict[str, Any]) -> Iterator[WorkerConfig]:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(versions.NAMES.index(self.what)), self.shape],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert self.process.stdin is not None
        self.process.stdin.write(params["cookie"].encode() + b"\n")
        self.process.stdin.close()
        yield WorkerConfig(io=self.process.stdout, process=self.process)


@pytest.mark.parametrize("what, shape", [("Python", "same shape"), ("distpool", "other shape")])
def test_C278_a_worker_of_another_version(what: str, shape: str) -> None:
    manager = Another(what, shape)
    with pytest.raises(CompositeException) as caught:
        addprocs(manager, timeout=30)
    (error,) = caught.value.exceptions
    assert isinstance(error.__cause__, VersionMismatchError)
    mine = versions.own()[versions.NAMES.index(what)]
    assert f"has {what} 99.9, this process {mine}" in str(error)
    assert manager.process.wait(30) != 0, "it is of no use, and goes"
    assert workers() == [1]
