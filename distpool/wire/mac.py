"""HMAC-SHA256, as the handshake proves with it (layer 1).

`hmac` and `hashlib` would load OpenSSL, which takes a fresh process 2 ms: a short program pays that twice, once in the
master and once in the zygote that its workers come from (benchmark W1). As the standard library's `random` does, this
takes the hash that is built into Python, where it is.
"""

from __future__ import annotations

from distpool.hints import Any

try:
    from _operator import _compare_digest as _same
except ImportError:  # another Python than CPython
    from hmac import compare_digest as _same  # type: ignore[no-redef]

try:
    from _sha2 import sha256 as _sha256  # type: ignore[import-not-found]  # since 3.12
except ImportError:
    try:
        from _sha256 import sha256 as _sha256  # type: ignore[import-not-found]
    except ImportError:  # built without hashes of its own
        from hashlib import sha256 as _sha256

SIZE = 32
"""Bytes of a MAC."""
_BLOCK = 64  # bytes that the hash works on at a time
_INNER = bytes(byte ^ 0x36 for byte in range(256))
_OUTER = bytes(byte ^ 0x5C for byte in range(256))


def digest(key: bytes, data: bytes) -> bytes:
    """The MAC of `data` (RFC 2104 with SHA-256): 32 bytes, those of `hmac.digest(key, data, "sha256")`."""
    hashed: Any = _sha256
    if len(key) > _BLOCK:
        key = hashed(key).digest()
    key = key.ljust(_BLOCK, b"\0")
    inner: bytes = hashed(key.translate(_INNER) + data).digest()
    outer: bytes = hashed(key.translate(_OUTER) + inner).digest()
    return outer


def same(given: bytes, expected: bytes) -> bool:
    """Whether they are equal, in a time that does not tell where they differ."""
    return bool(_same(given, expected))


__all__ = ["SIZE", "digest", "same"]
