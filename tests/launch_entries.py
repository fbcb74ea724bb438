"""What workers run in the tests of the launcher: entry points `module:function(listener, settings) -> exit code`."""

import json
import socket
import sys
import time


def serve(listener: socket.socket, settings: dict) -> int:
    """Execute each line that the first caller sends and answer with its `result`, until the caller closes."""
    if settings["extra"].get("greeting"):
        print(settings["extra"]["greeting"])
    connection, _ = listener.accept()
    names = {"settings": settings, "listener": listener, "connection": connection, "result": None}
    with connection.makefile("rw") as stream:
        for line in stream:
            exec(json.loads(line), names)
            stream.write(json.dumps(names["result"]) + "\n")
            stream.flush()
    return int(settings["extra"].get("code", 0))


def fail(listener: socket.socket, settings: dict) -> int:
    raise ValueError("this entry point fails")


def leave(listener: socket.socket, settings: dict) -> int:
    sys.exit(settings["extra"]["leave"])


def spin() -> None:
    """In Python, for ever."""
    while True:
        pass


def spin_in_c() -> None:
    """In C, holding the GIL, for ever."""
    import collections
    import itertools

    collections.deque(itertools.repeat(None), maxlen=0)


def nap() -> None:
    time.sleep(600)


BUSY = {"sleep": nap, "python": spin, "c": spin_in_c}


def busy(listener: socket.socket, settings: dict) -> int:
    """Say so, then be busy for ever in the way that the settings name."""
    print("busy", flush=True)
    BUSY[settings["extra"]["busy"]]()
    return 0


def loaded(listener: socket.socket, settings: dict) -> int:
    """Print which of the named modules this process was born with."""
    print(*sorted(set(settings["extra"]["names"]) & set(sys.modules)), flush=True)
    return 0
