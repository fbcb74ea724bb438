"""The command line: `python -m distpool run | worker | hosts | top` (layer 11).

    run     distpool.runner: adds workers, then runs the user's program as `__main__`
    worker  distpool.standalone: cookie (option or stdin) -> header line on stdout -> serve
    hosts   distpool.hostcheck: logs in to each host, prints what is there, or why not
    top     distpool.top: asks the endpoint of a running program, prints a table

Runs on the main thread of a process of its own; `main` is also the entry point of the `distpool` script.
"""

from __future__ import annotations

import argparse
import ast
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command (`argv` without the program's name, default `sys.argv[1:]`) and return the exit status.

    SystemExit for bad usage and `--help`, as argparse has it. `worker` ends the process itself.

    Example: `main(["top", "127.0.0.1:8790", "--once"])`
    """
    words = list(sys.argv[1:] if argv is None else argv)
    # The program's own words are not for argparse, of which no version leaves them all as they are (`--`, say).
    end = _program_at(words) if words[:1] == ["run"] else len(words)
    options = _parser().parse_args(words[:end])
    options.program = words[end:]
    status: int = options.run(options)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m distpool", description="Run functions on many processes.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_run(commands)
    worker = commands.add_parser(
        "worker",
        help="be a worker: what managers start",
        description="Be a worker: print 'distpool_worker:PORT#ADDR' and serve the program that connects there and "
        "knows the cookie.",
    )
    worker.add_argument(
        "--worker",
        nargs="?",
        metavar="COOKIE",
        help="the cookie; without it the first line of the standard input is taken, which other users cannot see",
    )
    worker.add_argument(
        "--bind-to",
        type=bind_address,
        metavar="ADDR[:PORT]",
        help="where to listen (default: the address that other hosts reach, any port)",
    )
    worker.add_argument(
        "--login",
        action="store_true",
        help="be what an SSH login starts: take an order from the standard input, start workers, live as long as it",
    )
    worker.set_defaults(run=_worker)
    _add_hosts(commands)
    top = commands.add_parser(
        "top",
        help="live table of a program's workers",
        description="Live table of the workers of a program that was started with DISTPOOL_TOP=ADDRESS.",
    )
    top.add_argument("address", type=_top_address, metavar="ADDRESS", help="HOST:PORT or the path of a socket")
    top.add_argument("--once", action="store_true", help="print the table once and end")
    top.add_argument("--interval", type=_seconds, default=1.0, metavar="S", help="seconds between looks (default 1)")
    top.set_defaults(run=_top)
    return parser


def _add_run(commands: Any) -> None:
    run = commands.add_parser(
        "run",
        help="add workers, then run a program",
        usage="python -m distpool run [-p N | --machine-file F | --hosts A,B] [-o NAME=VALUE] "
        "(SCRIPT | -m MODULE | -c CODE | -) [ARGUMENT ...]",
        description="Add workers, then run a Python program that uses them, as python itself would run it. Without -p, "
        "--machine-file and --hosts it starts alone.",
    )
    where = run.add_mutually_exclusive_group()
    where.add_argument("-p", "--procs", type=_count, metavar="N", help="workers on this machine; 'auto': one per CPU")
    where.add_argument("--machine-file", type=_file, metavar="F", help="file with lines [COUNT*]HOST, reached by SSH")
    where.add_argument("--hosts", type=_machines, metavar="A,B", help="[COUNT*]HOST,..., reached by SSH")
    _add_option(run)
    # For the help text: `main` takes these, and what follows them, out first.
    run.add_argument("-m", metavar="MODULE", help="run this module")
    run.add_argument("-c", metavar="CODE", help="run this text")
    run.add_argument("script", nargs="?", metavar="SCRIPT", help="a file, and its arguments; '-': the standard input")
    run.set_defaults(run=_run, usage_error=run.error)


def _program_at(words: Sequence[str]) -> int:
    """Where the program begins in the words of `run`: as with python itself, all that follows belongs to it."""
    at = 1
    while at < len(words):
        word = words[at]
        if word == "--" or word[:2] in ("-m", "-c") or word[:1] != "-" or word == "-":
            return at
        alone = "=" in word if word.startswith("--") else len(word) > 2  # with its value, if it has one
        at += 1 if alone or word == "-h" or "--help".startswith(word) else 2
    return len(words)


def _add_hosts(commands: Any) -> None:
    hosts = commands.add_parser(
        "hosts",
        help="log in to each host and report what is there",
        description="Log in to each host of a machine file and report its Python, cores, memory, round trip and "
        "bandwidth, or the error. The exit status is 1 if a host cannot be used.",
    )
    hosts.add_argument("file", type=_file, metavar="FILE", help="machine file: lines [COUNT*]HOST")
    hosts.add_argument(
        "--timeout", type=_seconds, default=30.0, metavar="S", help="seconds for each host's login (default 30)"
    )
    _add_option(hosts)
    hosts.set_defaults(run=_hosts)


def _add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o",
        "--option",
        action="append",
        default=[],
        type=_option,
        metavar="NAME=VALUE",
        help="keyword of addprocs, such as -o tunnel=True or -o exename=/opt/python/bin/python3 (may be repeated)",
    )


_SAID = {"true": "True", "false": "False", "none": "None"}


def _option(text: str) -> tuple[str, Any]:
    """A keyword and its value, which is a Python literal (true, false and none in any case), or else plain text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"not NAME=VALUE: {text!r}")
    try:
        return name, ast.literal_eval(_SAID.get(value.lower(), value))
    except (ValueError, SyntaxError):
        return name, value


def _count(text: str) -> int:
    if text == "auto":
        from distpool.hosts import usable_cpus

        return usable_cpus()
    if not text.isascii() or not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"not a number of workers: {text!r}")
    return int(text)


def _file(text: str) -> Path:
    if not os.path.isfile(text):
        raise argparse.ArgumentTypeError(f"no such file: {text!r}")
    return Path(text)


def _machines(text: str) -> list[Any]:
    from distpool.managers.specs import machine_of

    try:
        return [machine_of(part.strip()) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def bind_address(text: str) -> tuple[str, int]:
    """`ADDR[:PORT]`, IPv6 in brackets if a port follows; port 0 means any. ArgumentTypeError if it is neither."""
    host, port = text, "0"
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise argparse.ArgumentTypeError(f"not ADDR[:PORT]: {text!r}")
        port = rest[1:] if rest else "0"
    elif text.count(":") == 1:
        host, port = text.split(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"not ADDR[:PORT]: {text!r}")
    return host, int(port)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"not a positive number of seconds: {text!r}")
    return value


def _top_address(text: str) -> str | tuple[str, int]:
    from distpool.top import parse_address

    try:
        return parse_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _complain(text: object) -> int:
    print(f"distpool: {text}", file=sys.stderr, flush=True)
    return 1


# -- run, hosts --------------------------------------------------------------------------------------------------


def _run(options: argparse.Namespace) -> int:
    from distpool import runner

    kind, words = "script", options.program
    if words and words[0] == "--":
        words = words[1:]
    elif words and words[0][:2] in ("-m", "-c"):
        kind = {"-m": "module", "-c": "code"}[words[0][:2]]
        words = [*filter(None, [words[0][2:]]), *words[1:]]
    if not words:
        options.usage_error("a script, -m MODULE or -c CODE is needed")
    target, *arguments = words
    if kind == "script" and target == "-":  # as of python: the text comes from the standard input
        kind = "stdin"
    if options.machine_file is not None:
        options.machine_file = _machines_of(options.machine_file)
        if options.machine_file is None:
            return 1
    machines = next((x for x in (options.procs, options.machine_file, options.hosts) if x is not None), None)
    if options.option and machines is None:
        options.usage_error("-o is about workers: -p, --machine-file or --hosts is needed")
    return runner.run(runner.Program(kind, target, arguments), machines, dict(options.option))


def _hosts(options: argparse.Namespace) -> int:
    from distpool import hostcheck

    machines = _machines_of(options.file)
    if machines is None:
        return 1
    reports = hostcheck.check_hosts(machines, dict(options.option), options.timeout)
    print(hostcheck.table(reports))
    return 1 if any(report.error for report in reports) else 0


def _machines_of(file: Path) -> list[Any] | None:
    """The machines of a file; None: there are none, and it has been said why."""
    from distpool.managers.specs import load_machine_file

    try:
        machines = load_machine_file(file)
    except (OSError, ValueError) as error:
        _complain(error)
        return None
    if not machines:
        _complain(f"{file}: no machine in this file")
    return machines or None


# -- worker ------------------------------------------------------------------------------------------------------


def _worker(options: argparse.Namespace) -> int:
    if options.login:
        from distpool import login

        login.main(options.worker)
    from distpool import config, standalone
    from distpool.managers.surroundings import routable_address

    try:
        config.worker_timeout(), config.silent_seconds()  # whoever starts it hears of a bad one
    except ValueError as error:
        return _complain(error)
    cookie = options.worker if options.worker is not None else standalone.read_cookie()
    try:
        config.check_cookie(cookie)
    except ValueError as error:
        return _complain(f"{error} (--worker=COOKIE, or a line on stdin)")
    host, port = options.bind_to or (routable_address(), 0)
    try:
        standalone.serve(None, cookie, host, port)
    except OSError as error:
        return _complain(f"cannot listen on {host}:{port}: {error}")


# -- top ---------------------------------------------------------------------------------------------------------


def _top(options: argparse.Namespace) -> int:
    from distpool import top

    try:
        client = top.Client(options.address)
    except OSError as error:
        return _complain(f"cannot connect: {error}. Was the program started with DISTPOOL_TOP set, and does it run?")
    try:
        top.watch(client, options.once, options.interval)
    except EOFError as error:
        print(error)
    except KeyboardInterrupt:
        print()
    except (OSError, ValueError) as error:
        return _complain(error)
    finally:
        client.close()
    return 0


__all__ = ["main"]
