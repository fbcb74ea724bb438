"""Archives: which files, under which names, and the same bytes for the same content."""

from __future__ import annotations

import io
import os
import sys
import types
import zipfile
from pathlib import Path

import pytest

import distpool
from distpool.managers import archive
from distpool.managers.archive import Archive, find, pack, wishes


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Modules that can be imported, and that leave a file behind if they are."""
    package = tmp_path / "shipped_package"
    (package / "inner" / "__pycache__").mkdir(parents=True)
    (package / ".git").mkdir()
    (package / ".git" / "HEAD").write_text("x")
    (package / "__init__.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\n")
    (package / "inner" / "__init__.py").write_text("")
    (package / "inner" / "part.py").write_text("VALUE = 1\n")
    (package / "inner" / "other.py").write_text("VALUE = 2\n")
    (package / "inner" / "__pycache__" / "part.cpython-311.pyc").write_bytes(b"x")
    (package / "data.bin").write_bytes(bytes(range(256)))
    (package / "tool.sh").write_text("#!/bin/sh\n")
    (package / "tool.sh").chmod(0o755)
    (tmp_path / "shipped_module.py").write_text("VALUE = 3\n")
    (tmp_path / "shipped_space" / "below").mkdir(parents=True)
    (tmp_path / "shipped_space" / "below" / "leaf.py").write_text("")
    (tmp_path / "a table.csv").write_text("1,2")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    assert not (tmp_path / "imported").exists(), "nothing is imported in order to be sent"


def names(*sources: archive.Source) -> list[str]:
    with zipfile.ZipFile(io.BytesIO(pack(*sources).data)) as found:
        return found.namelist()


def test_a_package_with_its_data(tree: Path) -> None:
    expected = [
        "shipped_package/__init__.py",
        "shipped_package/data.bin",
        "shipped_package/inner/__init__.py",
        "shipped_package/inner/other.py",
        "shipped_package/inner/part.py",
        "shipped_package/tool.sh",
    ]
    assert names(find("shipped_package")) == expected
    assert names(find(tree / "shipped_package")) == expected == names(find(str(tree / "shipped_package")))


def test_modules_and_parts(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert names(find("shipped_module")) == ["shipped_module.py"]
    monkeypatch.chdir(tree)
    assert names(find("shipped_module.py")) == names(find("./shipped_module.py")) == ["shipped_module.py"]
    assert names(find("shipped_space")) == ["shipped_space/below/leaf.py"]
    part = ["shipped_package/__init__.py", "shipped_package/inner/__init__.py", "shipped_package/inner/part.py"]
    assert names(find("shipped_package.inner.part")) == part
    assert names(find("shipped_space.below")) == ["shipped_space/below/leaf.py"]


def test_extension_modules_are_files_as_well() -> None:
    import _cffi_backend  # of cryptography, which paramiko needs

    assert names(find("_cffi_backend")) == [os.path.basename(_cffi_backend.__file__)]


def test_links_to_directories_are_followed_once(tree: Path) -> None:
    (tree / "shipped_package" / "again").symlink_to(tree / "shipped_package")
    (tree / "shipped_package" / "space").symlink_to(tree / "shipped_space")
    os.mkfifo(tree / "shipped_package" / "pipe")
    found = names(find("shipped_package"))
    assert "shipped_package/space/below/leaf.py" in found and not any("again" in name for name in found)
    assert "shipped_package/pipe" not in found


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ("no_such_module", "no module of that name"),
        ("shipped_package.nothing", "no module of that name"),
        ("shipped_module.part", "no module of that name"),
        ("sys", "part of Python itself"),
        ("__main__", "no module of that name"),
        ("by_hand", "no module of that name"),
        ("no/such.py", "no such file or directory"),
        ("", "neither the name of a module nor a path"),
        ("a-b", "neither the name of a module nor a path"),
        (Path("a table.csv"), "not a module"),
        (Path("/"), "cannot be the name of a package"),
    ],
)
def test_what_cannot_be_sent(tree: Path, monkeypatch: pytest.MonkeyPatch, item: object, said: str) -> None:
    monkeypatch.chdir(tree)
    monkeypatch.setitem(sys.modules, "by_hand", types.ModuleType("by_hand"))
    with pytest.raises(ValueError, match="cannot ship") as info:
        find(item)
    assert said in str(info.value)


def test_wishes(tree: Path) -> None:
    assert wishes(()) == wishes(None) == ([], False)
    assert wishes("auto") == ([], True)
    sources, fetches = wishes(["shipped_module", "auto", tree / "shipped_package"])
    assert [source.name for source in sources] == ["shipped_module", "shipped_package"] and fetches
    for wrong in ("shipped_module", Path("x"), 7):
        with pytest.raises(TypeError, match="ship must be 'auto' or a list"):
            wishes(wrong)
    with pytest.raises(TypeError, match="names and paths"):
        wishes([7])


def test_the_same_content_is_the_same_archive(tree: Path) -> None:
    first = pack(find("shipped_package"))
    os.utime(tree / "shipped_package" / "data.bin", (1, 1))
    second = pack(find(tree / "shipped_package"))
    assert first.digest == second.digest and first.data == second.data and len(first.digest) == 40
    files = [("a", False, b"x"), ("b", False, b"")]
    assert Archive(files).digest == Archive(reversed(files)).digest
    others = [
        [("a", True, b"x"), ("b", False, b"")],
        [("a", False, b"y"), ("b", False, b"")],
        [("a", False, b""), ("b", False, b"x")],
        [("a", False, b"x")],
        [("c", False, b"x"), ("b", False, b"")],
    ]
    assert len({Archive(each).digest for each in [files, *others]}) == 6


def test_what_cannot_be_read(tree: Path) -> None:
    source = find("shipped_module")
    (tree / "shipped_module.py").unlink()
    with pytest.raises(FileNotFoundError, match="shipped_module"):
        pack(source)


def test_what_a_bare_python_needs() -> None:
    own = archive.own()
    assert own is archive.own() and len(own.data) < 1_000_000
    with zipfile.ZipFile(io.BytesIO(own.data)) as found:
        inside = set(found.namelist())
    assert {"distpool/__init__.py", "distpool/login.py", "cloudpickle/cloudpickle.py"} <= inside
    assert {name.partition("/")[0] for name in inside} == {"distpool", "cloudpickle"}


def test_local_workers_have_everything_but_names_are_checked() -> None:
    with pytest.raises(ValueError, match="cannot ship 'no_such_module'"):
        distpool.addprocs(1, ship=["no_such_module"])
    with pytest.raises(ValueError, match="cannot ship 'no_such_module'"):
        distpool.ClusterExecutor(1, ship=["no_such_module"])
    assert distpool.procs() == [1]
    (pid,) = distpool.addprocs(1, ship=["distpool", "auto"])
    distpool.rmprocs(pid)
