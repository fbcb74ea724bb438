"""A slow cable: `python relay.py NAME OTHER MILLISECONDS MBIT` makes two TAP devices and carries frames between them.

Each way takes so many milliseconds and carries so many megabits per second; what does not fit into a fifth of a second
of it is dropped, as a router does. For kernels without netem. Prints "ready"; the devices go with this process.
"""

from __future__ import annotations

import collections
import fcntl
import os
import select
import struct
import sys
import time

_TUNSETIFF = 0x400454CA
_TAP, _NO_HEADER = 0x0002, 0x1000
_QUEUE_SECONDS = 0.2


def tap(name: str) -> int:
    """A device of that name; its descriptor."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TAP | _NO_HEADER))
    return descriptor


class Way:
    """One direction."""

    def __init__(self, source: int, target: int, seconds: float, bytes_per_second: float) -> None:
        self.source, self.target = source, target
        self.seconds, self.rate = seconds, bytes_per_second
        self.free_at = 0.0  # when the last frame has left
        self.under_way: collections.deque[tuple[float, bytes]] = collections.deque()

    def take(self, now: float) -> None:
        """Read what has come."""
        try:
            while frame := os.read(self.source, 65536):
                begin = max(now, self.free_at)
                if begin - now < _QUEUE_SECONDS:
                    self.free_at = begin + len(frame) / self.rate
                    self.under_way.append((self.free_at + self.seconds, frame))
        except BlockingIOError:
            pass
        except OSError:  # the device is down
            time.sleep(0.01)

    def deliver(self, now: float) -> None:
        """Write what is due."""
        while self.under_way and self.under_way[0][0] <= now:
            _, frame = self.under_way.popleft()
            try:
                os.write(self.target, frame)
            except OSError:
                pass  # down, or full: lost


def main(name: str, other: str, milliseconds: float, mbit: float) -> None:
    one, two = tap(name), tap(other)
    ways = [Way(*ends, milliseconds / 1000, mbit * 125_000) for ends in ((one, two), (two, one))]
    print("ready", flush=True)
    while True:
        due = min((way.under_way[0][0] for way in ways if way.under_way), default=None)
        timeout = None if due is None else max(0.0, due - time.monotonic())
        ready, _, _ = select.select([one, two], [], [], timeout)
        now = time.monotonic()
        for way in ways:
            if way.source in ready:
                way.take(now)
            way.deliver(time.monotonic())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))
