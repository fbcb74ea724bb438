"""HMAC-SHA256 without OpenSSL."""

from __future__ import annotations

import hmac
import subprocess
import sys

import pytest

from distpool.wire import mac


@pytest.mark.parametrize("length", [0, 1, 20, 32, 63, 64, 65, 131, 1000])
def test_the_same_as_the_standard_library_makes(length: int) -> None:
    key = bytes(number % 251 for number in range(length))
    for size in (0, 1, 55, 64, 75, 4096):
        data = bytes((number * 7) % 256 for number in range(size))
        assert mac.digest(key, data) == hmac.digest(key, data, "sha256")
        assert len(mac.digest(key, data)) == mac.SIZE


def test_a_published_example() -> None:
    """RFC 4231, test case 2."""
    expected = "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
    assert mac.digest(b"Jefe", b"what do ya want for nothing?").hex() == expected


def test_same() -> None:
    assert mac.same(b"abc", b"abc")
    assert not mac.same(b"abc", b"abd")
    assert not mac.same(b"abc", b"ab")
    assert not mac.same(b"", b"a")


@pytest.mark.parametrize("missing", [["_sha2", "_sha256"], ["_operator"], ["_sha2", "_sha256", "_operator"]])
def test_a_python_without_what_is_built_in(missing: list[str]) -> None:
    code = f"""if True:
        import operator, sys
        for name in {missing!r}:
            sys.modules[name] = None
        from distpool.wire import mac
        print(mac.digest(b"Jefe", b"what do ya want for nothing?").hex(), mac.same(b"a", b"a"), mac.same(b"a", b"b"))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    expected = "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843 True False\n"
    assert (done.stdout, done.stderr) == (expected, "")


def test_a_program_and_its_workers_do_without_openssl() -> None:
    code = """if True:
        import sys
        import distpool
        def loaded():
            return sorted({"hashlib", "hmac", "_hashlib", "ssl"}.intersection(sys.modules))
        with distpool.ClusterExecutor(1) as executor:
            print(executor.submit(loaded).result(), loaded())
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[] []\n", "")
