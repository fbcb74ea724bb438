"""What is written to an end that is gone, in programs that have SIGPIPE at its default: an error, and not their end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap

import pytest

from distpool.sigpipe import QUIET, QuietSocket, quietly

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="no such signal here")


def lives(program: str) -> None:
    """The program reaches its end."""
    head = "import os, signal, socket, subprocess, sys, threading\nsignal.signal(signal.SIGPIPE, signal.SIG_DFL)\n"
    code = head + textwrap.dedent(program) + "\nprint('alive')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


def test_a_pipe_and_a_socket() -> None:
    told: list[int] = []
    before = signal.signal(signal.SIGPIPE, lambda signum, frame: told.append(signum))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        reader, writer = os.pipe()
        os.close(reader)
        with pytest.raises(BrokenPipeError), quietly():
            os.write(writer, b"x")
        os.close(writer)
        near, far = socket.socketpair()
        near.settimeout(5.0)
        far.close()
        with pytest.raises(BrokenPipeError):
            near.sendall(b"x", QUIET)
        with QuietSocket.of(near) as quiet:
            assert near.fileno() < 0 and quiet.gettimeout() == 5.0
            with pytest.raises(BrokenPipeError):
                quiet.send(b"x")
        assert not told and signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
    finally:
        signal.signal(signal.SIGPIPE, before)


def test_output_of_a_host_that_the_group_has_done_with() -> None:
    lives("""
        from types import SimpleNamespace
        from distpool.managers.ssh_login import RemoteProcess
        process = RemoteProcess(SimpleNamespace(send_signal=None), 0, 1, ("tcp", "host", 1))
        os.close(process.output)
        process.show(b"hello")
    """)


def test_an_order_to_a_login_that_has_ended() -> None:
    lives("""
        from distpool.managers.ssh_binary import BinarySession
        process = subprocess.Popen(["true"], stdin=-1, stdout=-1, stderr=-1, bufsize=0)
        process.wait()
        BinarySession(process).write(b"x")
    """)


def test_an_interpreter_that_ends_before_it_is_told_anything() -> None:
    lives("""
        import time
        from distpool.managers import executed, process
        start = executed.subprocess.Popen
        def started(*args, **options):
            made = start(*args, **options)
            made.wait()
            return made
        executed.subprocess.Popen = started
        executed.start(process.LaunchSpec(1, ["true"], dict(os.environ), "/", [], "c")).end()
    """)


def test_output_that_nobody_takes_any_more() -> None:
    lives("""
        import io
        from distpool.managers.handles import open_output
        class Source(io.RawIOBase):
            left = 2
            def readinto(self, buffer):
                self.left -= 1
                if not self.left:
                    os.close(number)
                buffer[:1] = b"x"
                return 1
        known = threading.Lock()
        class Late(Source):
            def readinto(self, buffer):
                with known:
                    return super().readinto(buffer)
        with known:
            number, _ = open_output(Late())
        for thread in threading.enumerate():
            if thread is not threading.current_thread():
                thread.join(30)
    """)


def test_who_watches_goes_away() -> None:
    lives("""
        from types import SimpleNamespace
        from distpool import monitor, top
        near, far = socket.socketpair()
        def stats():
            far.close()
            return []
        monitor.stats = stats
        far.sendall(b"stats\\n")
        endpoint = object.__new__(top.Endpoint)
        endpoint._clients = threading.Semaphore(1)
        endpoint._serve(near)
    """)
