"""Machine specs and machine files (CONFORMANCE C217, C218)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import distpool
from distpool.managers.specs import Spec, machine_of, split_spec


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("127.0.0.1", ("127.0.0.1", None)),
        ("127.0.0.1:80", ("127.0.0.1", 80)),
        ("[2001:db8::1]", ("2001:db8::1", None)),
        ("[2001:db8::1]:443", ("2001:db8::1", 443)),
        ("host:1", ("host", 1)),
        ("host:90", ("host", 90)),
        ("host:65535", ("host", 65535)),
        ("me@host", ("me@host", None)),
        ("me@host:2222", ("me@host", 2222)),
        ("me@example.com@host", ("me@example.com@host", None)),
        ("me@[::1]:2222 10.0.0.1:9000", ("me@::1", 2222)),
    ],
)
def test_C218_parse_machine(spec: str, expected: Any) -> None:
    assert distpool.parse_machine(spec) == expected


@pytest.mark.parametrize(
    "spec",
    [
        "127.0.0.1:-1",
        "127.0.0.1:0",
        "127.0.0.1:65536",
        "127.0.0.1:",
        "[2001:db8::1]:443:888",
        "[2001:db8::1",
        "[2001:db8::1]:aaa",
        "[2001:db8::1]x",
        "2001:db8::1",
        "host:80:81",
        "host:²",
        "",
        " ",
        "@host",
        "me@",
        "a b c",
        "host 10.0.0.1:0",
    ],
)
def test_C218_what_is_no_machine(spec: str) -> None:
    with pytest.raises(ValueError, match="not a machine spec"):
        distpool.parse_machine(spec)


def test_specs_must_be_texts() -> None:
    with pytest.raises(TypeError):
        distpool.parse_machine(5)  # type: ignore[arg-type]


def test_all_parts() -> None:
    assert split_spec("me@host:22 [::1]:9300") == Spec("me", "host", 22, "::1", 9300)
    assert split_spec("host 10.0.0.7") == Spec(None, "host", None, "10.0.0.7", None)


def test_C217_machine_file(tmp_path: Path) -> None:
    path = tmp_path / "machines"
    path.write_text(
        "host\n\n# all of them\n4*host   # four\nauto*host\n  3*user@host:2222 10.0.0.1:9000\n2 * other\n",
        encoding="utf-8",
    )
    assert (
        distpool.load_machine_file(path)
        == distpool.load_machine_file(str(path))
        == [
            "host",
            ("host", 4),
            ("host", "auto"),
            ("user@host:2222 10.0.0.1:9000", 3),
            ("other", 2),
        ]
    )


def test_a_file_of_an_editor_on_windows(tmp_path: Path) -> None:
    path = tmp_path / "machines"
    path.write_bytes(b"\xef\xbb\xbfhost\r\n2*other\r\n")
    assert distpool.load_machine_file(path) == ["host", ("other", 2)]


@pytest.mark.parametrize("text", ["", " ", "4*", "4*  "])
def test_no_machine_at_all(text: str) -> None:
    with pytest.raises(ValueError, match="not a machine spec: "):
        machine_of(text)


def test_host_files_of_others(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text(
        "a slots=4 max_slots=8  # Open MPI\nb slots=4 max-slots=2\nc max_slots=3\nme@d:2222 slots=2\n"
        "e 4 all.q@e UNDEFINED\nf 2\ng\ng\nh:4\n",
        encoding="utf-8",
    )
    expected = [("a", 4), ("b", 2), ("c", 1), ("me@d:2222", 2), ("e", 4), ("f", 2), "g", "g", "h:4"]
    assert distpool.load_machine_file(path) == expected, "h:4 is the port of an SSH server, as in every spec"


def test_mpich(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("a:4 ifhn=a-ib\nb\n", encoding="utf-8")
    assert distpool.load_machine_file(path, mpich=True) == [("a", 4), "b"]
    path.write_text("a:x\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 1: 'x' is not a number of workers"):
        distpool.load_machine_file(path, mpich=True)


@pytest.mark.parametrize("line", ["a slots=", "a slots=0", "a slots=x", "a slots=4 foo", "a 0 q", "a slots=2 nodes=4"])
def test_bad_lines_of_others(line: str, tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text(f"good\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 2"):
        distpool.load_machine_file(path)


@pytest.mark.parametrize("line", ["0*host", "x*host", "-1*host", "4*", "host:0", "*host"])
def test_C217_bad_lines_are_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "machines"
    path.write_text(f"good\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 2"):
        distpool.load_machine_file(path)
    with pytest.raises(ValueError, match="line 2"):
        distpool.addprocs(path)


def test_C217_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        distpool.load_machine_file(tmp_path / "nothing")
