"""The command line: `python -m distpool worker | top` (layer 11).

    worker  distpool.standalone: cookie (option or stdin) -> header line on stdout -> serve
    top     distpool.top: asks the endpoint of a running program, prints a table

Runs on the main thread of a process of its own; `main` is also the entry point of the `distpool` script.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command (`argv` without the program's name, default `sys.argv[1:]`) and return the exit status.

    SystemExit for bad usage and `--help`, as argparse has it. `worker` ends the process itself.

    Example: `main(["top", "127.0.0.1:8790", "--once"])`
    """
    options = _parser().parse_args(argv)
    status: int = options.run(options)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m distpool", description="Run functions on many processes.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
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


# -- worker ------------------------------------------------------------------------------------------------------


def _worker(options: argparse.Namespace) -> int:
    if options.login:
        from distpool import login

        login.main(options.worker)
    from distpool import standalone
    from distpool.managers.local import routable_address

    cookie = options.worker if options.worker is not None else standalone.read_cookie()
    try:
        standalone.check_cookie(cookie)
    except ValueError:
        most = standalone.MAX_COOKIE
        return _complain(f"the cookie (--worker=COOKIE or a line on stdin) must be 1 to {most} ASCII characters")
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
