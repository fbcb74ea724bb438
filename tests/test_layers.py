"""Imports go one way. Each module of the package stands in one layer of the table below; a module may import from
lower layers, from modules of its own layer only where `SAME_LAYER` says so, and never from a higher one. Imports
inside functions count like those at the top: a deferred import hides a cycle, it does not remove it. Only
`if TYPE_CHECKING:` is exempt, because nothing runs there.

More rules that can be seen from outside: nothing under wire/ does I/O, runs threads or reads a clock; no module has
more than 500 lines; no modules import each other in a circle; each has a test module.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "distpool"
TESTS = list(Path(__file__).resolve().parent.rglob("test_*.py"))

LAYERS: dict[int, tuple[str, ...]] = {
    0: ("errors", "config", "directories", "logs", "hints", "fields", "flag", "dropped", "sigpipe", "depth"),
    1: (
        *("wire.frames", "wire.messages", "wire.records", "wire.mac", "wire.protocol", "wire.versions"),
        "wire.pieces",
        "wire.structs",
        *("wire.codec", "wire.byvalue", "wire.failures", "wire.fingerprint", "wire.functions"),
        "progress",
    ),
    2: (
        *("transport.stream", "transport.ioloop", "transport.link", "transport.pump", "transport.segments"),
        *("transport.shm", "transport.views", "transport.memfile", "transport.liveness", "transport.journal"),
        *("transport.silence", "transport.tls", "transport.door", "transport.polling", "transport.deferral"),
    ),
    3: (
        *(
            "node.requests",
            "node.ready",
            "node.interrupts",
            "node.striking",
            "node.tasks",
            "node.spans",
            "node.givingback",
            "node.offers",
            "node.results",
            "node.observe",
            "node.served",
            "node.output",
            "node.threads",
            "node.logrecords",
            "node.deliveries",
        ),
        *("node.peers", "node.node", "node.reach", "node.bulk"),
        *("node.member", "node.group"),
    ),
    4: (
        *("refs.refs", "refs.outcomes", "refs.waiters", "refs.conditions", "refs.finalized", "refs.owner", "refs.gc"),
        *("refs.remote", "refs.travel", "refs.serving"),
        *("refs.lent", "refs.ahead", "refs.room", "refs.channelcore", "refs.channel", "refs.channels"),
        "refs.channelserver",
    ),
    5: ("calls", "verbs"),
    6: (
        *("members", "debug", "replies", "poolqueue", "pools"),
        *("spawning", "loops", "broadcast", "mainmodule", "trackers"),
    ),
    7: (
        *(
            "work",
            "mapruns",
            "slots",
            "recalls",
            "retries",
            "culprits",
            "settling",
            "soon",
            "reclaim",
            "scheduling",
            "lazymap",
            "policy",
            "kept",
        ),
        *("mapping", "ordered", "elements", "batches", "poolmap", "recovery"),
    ),
    8: (
        *("managers.base", "managers.launch", "managers.process", "managers.forked", "managers.executed"),
        *("managers.handles", "managers.specs", "managers.batch", "managers.resources", "managers.local"),
        *("managers.surroundings", "managers.command", "managers.spawned", "managers.zygotes", "managers.record"),
        *("managers.login_protocol", "managers.ssh", "managers.ssh_login", "managers.ssh_command"),
        *("managers.archive", "managers.bootstrap", "managers.unpacking"),
        *("managers.ssh_client", "managers.ssh_config", "managers.ssh_paramiko", "managers.ssh_binary"),
    ),
    9: (
        *("joining", "adding", "cluster", "supply", "crew", "borrowing", "hosts", "exits", "lingering", "shipping"),
        *("monitor", "top"),
    ),
    10: (
        *("executor", "submitter", "submitting", "opening", "shown", "mapresults", "nested"),
        *("pool", "pooling", "pool_runs", "pool_results", "pool_callbacks", "pool_input"),
        *("tracing", "traceplot", "hostcheck"),
    ),
    11: (
        *("startup", "zygote", "worker", "standalone", "siblings", "orphans", "login", "runner", "cli"),
        *("__main__", "__init__"),
    ),
    12: ("integrations.joblib",),
}
"""Layer -> its modules, lowest first. A new module is added here, in the layer of the job that it does."""

PACKAGES = ("wire", "transport", "node", "refs", "managers", "integrations")
"""Sub-packages: their __init__ holds a docstring and nothing else, so that importing one module loads one module."""

ADAPTERS: tuple[str, ...] = ()
"""integrations.*: loaded by name from other libraries; they may import everything, and nothing may import them."""

SAME_LAYER: frozenset[tuple[str, str]] = frozenset(
    {
        # importer, imported
        ("errors", "hints"),
        ("wire.messages", "wire.frames"),
        ("wire.messages", "wire.records"),
        ("wire.structs", "wire.frames"),
        ("wire.structs", "wire.messages"),
        ("wire.pieces", "wire.frames"),
        ("wire.pieces", "wire.messages"),
        ("wire.protocol", "wire.frames"),
        ("wire.protocol", "wire.mac"),
        ("wire.codec", "wire.byvalue"),
        ("wire.failures", "wire.codec"),
        ("wire.fingerprint", "wire.codec"),
        ("wire.functions", "wire.codec"),
        ("wire.functions", "wire.fingerprint"),
        ("transport.ioloop", "transport.polling"),
        ("transport.ioloop", "transport.deferral"),
        ("transport.stream", "transport.ioloop"),
        ("transport.stream", "transport.pump"),
        ("transport.stream", "transport.tls"),
        ("transport.tls", "transport.ioloop"),
        ("transport.silence", "transport.ioloop"),
        ("transport.door", "transport.ioloop"),
        ("transport.door", "transport.tls"),
        ("transport.link", "transport.silence"),
        ("transport.link", "transport.ioloop"),
        ("transport.link", "transport.stream"),
        ("transport.segments", "transport.link"),
        ("transport.segments", "transport.shm"),
        ("transport.shm", "transport.memfile"),
        ("transport.shm", "transport.views"),
        ("transport.views", "transport.liveness"),
        ("transport.views", "transport.memfile"),
        ("transport.journal", "transport.memfile"),
        ("node.observe", "node.node"),
        *(("node.observe", "node.served"), ("node.node", "node.served")),
        ("node.observe", "node.striking"),
        ("node.observe", "node.tasks"),
        ("node.output", "node.threads"),
        ("node.peers", "node.ready"),
        ("node.peers", "node.requests"),
        ("node.node", "node.peers"),
        ("node.node", "node.bulk"),
        ("node.reach", "node.member"),
        ("node.reach", "node.node"),
        ("node.tasks", "node.interrupts"),
        ("node.interrupts", "node.striking"),
        *(("node.tasks", "node.givingback"), ("node.givingback", "node.spans")),
        ("node.tasks", "node.offers"),
        ("node.tasks", "node.results"),
        ("node.tasks", "node.spans"),
        ("node.spans", "node.results"),
        ("node.node", "node.threads"),
        *(("node.node", "node.logrecords"), ("node.logrecords", "node.threads")),
        ("node.member", "node.node"),
        ("node.member", "node.output"),
        ("node.member", "node.threads"),
        ("node.group", "node.member"),
        ("node.group", "node.node"),
        ("node.group", "node.output"),
        ("refs.owner", "refs.refs"),
        ("refs.refs", "refs.waiters"),
        ("refs.refs", "refs.conditions"),
        ("refs.refs", "refs.finalized"),
        ("refs.refs", "refs.outcomes"),
        ("refs.gc", "refs.finalized"),
        ("refs.remote", "refs.finalized"),
        ("refs.channels", "refs.finalized"),
        ("refs.gc", "refs.owner"),
        ("refs.gc", "refs.refs"),
        ("refs.ahead", "refs.owner"),
        ("refs.ahead", "refs.refs"),
        ("refs.lent", "refs.refs"),
        ("refs.gc", "refs.lent"),
        ("refs.remote", "refs.lent"),
        ("refs.serving", "refs.lent"),
        ("refs.channels", "refs.lent"),
        ("refs.channelserver", "refs.lent"),
        ("refs.remote", "refs.ahead"),
        ("refs.remote", "refs.gc"),
        ("refs.remote", "refs.owner"),
        ("refs.remote", "refs.refs"),
        ("refs.serving", "refs.ahead"),
        ("refs.serving", "refs.gc"),
        ("refs.serving", "refs.owner"),
        ("refs.serving", "refs.refs"),
        ("refs.serving", "refs.remote"),
        ("refs.serving", "refs.travel"),
        *(("refs.travel", f"refs.{name}") for name in ("finalized", "gc", "lent", "owner", "refs", "remote")),
        ("refs.channel", "refs.ahead"),
        ("refs.channel", "refs.gc"),
        ("refs.channel", "refs.channelcore"),
        ("refs.channelcore", "refs.refs"),
        ("refs.channelcore", "refs.room"),
        ("refs.channelserver", "refs.channelcore"),
        ("refs.channel", "refs.refs"),
        ("refs.channel", "refs.remote"),
        ("refs.channels", "refs.ahead"),
        ("refs.channels", "refs.channel"),
        ("refs.channels", "refs.gc"),
        ("refs.channels", "refs.owner"),
        ("refs.channels", "refs.refs"),
        ("refs.channels", "refs.remote"),
        ("refs.channelserver", "refs.ahead"),
        ("refs.channelserver", "refs.channel"),
        ("refs.channelserver", "refs.room"),
        ("refs.channelserver", "refs.channels"),
        ("refs.channelserver", "refs.gc"),
        ("refs.channelserver", "refs.owner"),
        ("refs.channelserver", "refs.refs"),
        ("refs.channelserver", "refs.serving"),
        ("slots", "work"),
        ("mapruns", "work"),
        ("pools", "members"),
        ("pools", "poolqueue"),
        ("loops", "members"),
        ("loops", "replies"),
        ("broadcast", "mainmodule"),
        ("broadcast", "members"),
        ("broadcast", "pools"),
        ("broadcast", "replies"),
        ("recalls", "mapruns"),
        ("recalls", "slots"),
        ("recalls", "work"),
        *(("culprits", "work"), ("scheduling", "culprits")),
        ("scheduling", "recalls"),
        ("scheduling", "reclaim"),
        ("scheduling", "retries"),
        ("scheduling", "slots"),
        ("scheduling", "settling"),
        ("reclaim", "settling"),
        ("settling", "mapruns"),
        *(("settling", "soon"), ("soon", "work")),
        ("settling", "slots"),
        ("settling", "work"),
        ("scheduling", "work"),
        ("scheduling", "mapruns"),
        ("lazymap", "scheduling"),
        ("lazymap", "mapruns"),
        ("policy", "work"),
        ("mapping", "elements"),
        ("mapping", "poolmap"),
        ("poolmap", "batches"),
        *(("mapping", "mapruns"), ("poolmap", "mapruns")),
        ("mapping", "ordered"),
        ("mapping", "recovery"),
        ("ordered", "elements"),
        ("ordered", "recovery"),
        ("recovery", "policy"),
        ("elements", "scheduling"),
        ("elements", "mapruns"),
        ("managers.launch", "managers.executed"),
        ("managers.launch", "managers.forked"),
        ("managers.launch", "managers.process"),
        ("managers.launch", "managers.zygotes"),
        ("managers.forked", "managers.zygotes"),
        *(("managers.zygotes", f"managers.{name}") for name in ("command", "process", "spawned", "surroundings")),
        ("managers.command", "managers.surroundings"),
        *((f"managers.{name}", "managers.record") for name in ("base", "local", "ssh", "ssh_login")),
        *(("managers.forked", "managers.process"), ("managers.forked", "managers.surroundings")),
        ("managers.process", "managers.surroundings"),
        ("managers.executed", "managers.base"),
        ("managers.executed", "managers.process"),
        ("managers.handles", "managers.process"),
        ("managers.local", "managers.base"),
        *(("managers.local", f"managers.{name}") for name in ("command", "process")),
        *(("managers.local", "managers.surroundings"), ("managers.ssh", "managers.surroundings")),
        *(("managers.local", "managers.resources"), ("managers.ssh", "managers.resources")),
        *(("managers.ssh", f"managers.{name}") for name in ("base", "command", "specs", "login_protocol")),
        *(("managers.ssh", f"managers.ssh_{name}") for name in ("binary", "client", "command", "config", "login")),
        ("managers.ssh", "managers.ssh_paramiko"),
        *(("managers.ssh", f"managers.{name}") for name in ("archive", "bootstrap")),
        ("managers.local", "managers.archive"),
        ("managers.archive", "managers.unpacking"),
        *(("managers.bootstrap", f"managers.{name}") for name in ("archive", "unpacking", "login_protocol")),
        ("managers.ssh_command", "managers.login_protocol"),
        *(("managers.ssh_login", f"managers.{name}") for name in ("base", "login_protocol", "process", "ssh_client")),
        ("managers.ssh_config", "managers.specs"),
        *(("managers.ssh_paramiko", f"managers.{name}") for name in ("process", "specs", "ssh_client", "ssh_config")),
        *(("managers.ssh_binary", f"managers.{name}") for name in ("process", "specs", "ssh_client")),
        ("managers.batch", "managers.specs"),
        ("adding", "joining"),
        ("cluster", "adding"),
        ("cluster", "exits"),
        ("exits", "lingering"),
        ("cluster", "hosts"),
        ("cluster", "top"),
        ("adding", "supply"),
        ("supply", "joining"),
        ("hosts", "supply"),
        ("crew", "supply"),
        ("crew", "joining"),
        ("borrowing", "crew"),
        *(("executor", name) for name in ("opening", "shown", "submitting")),
        ("executor", "submitter"),
        ("opening", "nested"),
        *(("submitting", "mapresults"), ("submitting", "submitter")),
        ("nested", "mapresults"),
        *(("pool", "executor"), ("pool", "pooling")),
        *(("pooling", name) for name in ("pool_callbacks", "pool_input", "pool_results", "pool_runs", "shown")),
        ("pool_results", "pool_callbacks"),
        ("pool_results", "pool_input"),
        ("top", "monitor"),
        ("zygote", "startup"),
        ("login", "standalone"),
        ("login", "startup"),
        ("login", "zygote"),
        ("siblings", "orphans"),
        ("standalone", "orphans"),
        ("standalone", "startup"),
        ("standalone", "worker"),
        ("worker", "siblings"),
        ("worker", "startup"),
        ("cli", "login"),
        ("cli", "runner"),
        ("cli", "standalone"),
        *(("__main__", name) for name in ("cli", "login")),
    }
)
"""The arrows inside one layer, each a decision: (importer, imported)."""

ON_DEMAND: frozenset[tuple[str, str]] = frozenset({("node.node", "calls"), ("managers.unpacking", "login")})
"""The ways up: modules loaded by `importlib.import_module`. Of the node: when it is first needed; it registers itself.
The node hands frames of unknown kinds to whoever registers for them; who only uses an executor loads no remote calls.
Of unpacking: in a process on another host in which nothing else of the package has been loaded."""

NARROWED: dict[str, int] = {"managers.": 2}
"""Modules that see less than their layer would allow: managers know addresses and byte streams, never calls or refs."""

FORBIDDEN_IN_WIRE = {"socket", "threading", "_thread", "time", "select", "selectors", "asyncio", "subprocess"}
"""The protocol is bytes in, events out: tested without a network, a clock or a second thread."""

MAX_LINES = 500

LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names}


def modules() -> dict[str, Path]:
    """Dotted name inside the package -> file. A sub-package's __init__ goes by the package's name."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        if len(parts) > 1 and parts[-1] == "__init__":
            parts.pop()
        found[".".join(parts)] = path
    return found


MODULES = modules()


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom | ast.Call]:
    """Every import that may run, at any depth, and every call (for importlib)."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and is_type_checking(child.test):
            for other in child.orelse:
                yield from statements(other)
                if isinstance(other, (ast.Import, ast.ImportFrom)):
                    yield other
            continue
        if isinstance(child, (ast.Import, ast.ImportFrom, ast.Call)):
            yield child
        yield from statements(child)


def absolute_name(module: str, path: Path, node: ast.ImportFrom) -> str:
    """The dotted name that an import statement means, with its leading dots resolved."""
    if not node.level:
        return node.module or ""
    package = ["distpool", *([] if module == "__init__" else module.split("."))]
    if path.name != "__init__.py":
        package.pop()
    package = package[: len(package) - (node.level - 1)]
    return ".".join([*package, *([node.module] if node.module else [])])


def loaded_by_name(call: ast.Call) -> str | None:
    """The text in import_module("...") and __import__("..."), which are imports too."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name not in ("import_module", "__import__") or not call.args:
        return None
    first = call.args[0]
    return first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else None


def imported_names(module: str, path: Path) -> Iterator[tuple[str, int]]:
    """(absolute dotted name, line) of everything that a module imports, at its top or later."""
    for node in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.Call):
            name = loaded_by_name(node)
            if name is not None:
                yield name, node.lineno
        else:
            base = absolute_name(module, path, node)
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix("distpool.")
                yield (f"distpool.{inner}" if inner in MODULES else base), node.lineno


def internal_imports(module: str, path: Path) -> Iterator[tuple[str, int]]:
    """(module of this package, line): the arrows that leave a module. `distpool` itself is "__init__"."""
    for name, line in imported_names(module, path):
        if name == "distpool" or name.startswith("distpool."):
            inner = name.removeprefix("distpool").removeprefix(".") or "__init__"
            while inner and inner not in MODULES:  # a name inside a module: cut back to the module
                inner = inner.rpartition(".")[0]
            yield inner or "__init__", line


def complaint(importer: str, imported: str) -> str | None:
    """Why an arrow is not allowed, or None."""
    if imported in PACKAGES or importer in ADAPTERS or importer == imported or (importer, imported) in ON_DEMAND:
        return None
    if imported in ADAPTERS:
        return "integrations are loaded by other libraries, never by distpool"
    here, there = LAYER_OF.get(importer), LAYER_OF.get(imported)
    if here is None or there is None:
        return None  # test_every_module_has_a_layer says so
    if here == there:
        if (importer, imported) in SAME_LAYER:
            return None
        return f"both are in layer {here}: list the arrow in SAME_LAYER, or move what is shared down"
    limit = next((top for prefix, top in NARROWED.items() if importer.startswith(prefix)), here)
    if there > limit:
        return f"layer {here} (may see up to {limit}) imports layer {there}"
    return None


def test_package_is_here() -> None:
    assert "__init__" in MODULES, f"no package in {ROOT}"


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_layer(module: str) -> None:
    known = module in LAYER_OF or module in PACKAGES or module in ADAPTERS
    assert known, f"distpool.{module} stands in no layer: add it to LAYERS in {__file__}, where its job belongs"


@pytest.mark.parametrize("module", MODULES)
def test_docstrings_name_the_layer_of_the_table(module: str) -> None:
    doc = ast.get_docstring(ast.parse(MODULES[module].read_text(encoding="utf-8"))) or ""
    said = re.search(r"\(layer (\d+)", doc)
    if module in LAYER_OF and said:
        assert int(said[1]) == LAYER_OF[module], "the docstring or the table is out of date"


def test_no_module_stands_twice() -> None:
    listed = [name for names in LAYERS.values() for name in names]
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    path = MODULES[module]
    wrong = [
        f"{path}:{line}: {module} -> {imported}: {why}"
        for imported, line in dict.fromkeys(internal_imports(module, path))
        if (why := complaint(module, imported))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("arrow", sorted(SAME_LAYER))
def test_same_layer_arrows_are_in_one_layer(arrow: tuple[str, str]) -> None:
    importer, imported = arrow
    assert LAYER_OF[importer] == LAYER_OF[imported], "such an arrow needs no exception, or must not have one"
    assert (imported, importer) not in SAME_LAYER, "that would be a cycle"


@pytest.mark.parametrize("arrow", sorted(ON_DEMAND))
def test_what_is_loaded_on_demand_is_never_imported_by_a_statement(arrow: tuple[str, str]) -> None:
    importer, imported = arrow
    tree = ast.parse(MODULES[importer].read_text(encoding="utf-8"))
    assert imported in {
        str(loaded_by_name(node)).removeprefix("distpool.") for node in ast.walk(tree) if isinstance(node, ast.Call)
    }
    names = {
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
    }
    assert f"distpool.{imported}" not in names


@pytest.mark.parametrize("package", PACKAGES)
def test_sub_packages_hold_nothing(package: str) -> None:
    path = MODULES.get(package)
    if path is None:
        return
    body = ast.parse(path.read_text(encoding="utf-8")).body
    extra = [node for node in body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    assert not extra, f"{path}:{extra[0].lineno}: a sub-package's __init__ is a docstring and nothing else"


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("wire")])
def test_wire_does_no_io(module: str) -> None:
    path = MODULES[module]
    wrong = [
        f"{path}:{line}: imports {name}"
        for name, line in imported_names(module, path)
        if name.partition(".")[0] in FORBIDDEN_IN_WIRE
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", MODULES)
def test_modules_stay_readable(module: str) -> None:
    lines = len(MODULES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{MODULES[module]} has {lines} lines: it has taken on a second job"


@pytest.mark.parametrize("module", MODULES)
def test_each_module_has_a_test_module(module: str) -> None:
    """Who changes one knows where to look: tests/**/test_NAME.py."""
    if MODULES[module].name == "__init__.py":
        return
    name = f"test_{MODULES[module].name}"
    assert any(path.name == name for path in TESTS), f"there is no {name}"


def test_no_import_cycles() -> None:
    arrows = {
        module: {
            imported
            for imported, _ in internal_imports(module, path)
            if imported in MODULES and imported != module and (module, imported) not in ON_DEMAND
        }
        for module, path in MODULES.items()
    }
    done: set[str] = set()

    def walk(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, "import cycle: " + " -> ".join((*way[way.index(module) :], module))
        if module not in done:
            for imported in sorted(arrows[module]):
                walk(imported, (*way, module))
            done.add(module)

    for module in sorted(arrows):
        walk(module, ())


# The parser above decides whether other tests see anything, so it is tested too.


@pytest.mark.parametrize(
    "source, expected",
    [
        ("import distpool.errors", {"errors"}),
        ("from distpool import errors", {"errors"}),
        ("from distpool.errors import DistpoolError", {"errors"}),
        ("from .errors import DistpoolError", {"errors"}),
        ("from . import errors", {"errors"}),
        ("def f():\n    from distpool import errors", {"errors"}),
        ("import importlib\nimportlib.import_module('distpool.errors')", {"errors"}),
        ("try:\n    import distpool.errors\nexcept ImportError:\n    pass", {"errors"}),
        ("if TYPE_CHECKING:\n    import distpool.errors", set()),
        ("import typing\nif typing.TYPE_CHECKING:\n    import distpool.errors\nelse:\n    import json", set()),
        ("import json\nfrom os import path", set()),
        ("from distpool import pmap_or_any_public_name", {"__init__"}),
    ],
)
def test_the_parser_sees(source: str, expected: set[str], tmp_path: Path) -> None:
    path = tmp_path / "calls.py"
    path.write_text(source)
    assert "errors" in MODULES
    assert {imported for imported, _ in internal_imports("calls", path)} == expected


@pytest.mark.parametrize(
    "importer, imported, allowed",
    [
        ("calls", "errors", True),
        ("errors", "calls", False),
        ("managers.local", "transport.stream", True),
        ("managers.local", "node.node", False),
        ("node.node", "node.group", False),
        ("node.group", "node.node", True),
        ("executor", "__init__", False),
        ("worker", "node.node", True),
    ],
)
def test_the_rule_decides(importer: str, imported: str, allowed: bool) -> None:
    assert (complaint(importer, imported) is None) == allowed
