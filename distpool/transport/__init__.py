"""Byte streams, the I/O loop, links, and same-host shared memory (layer 2)."""
