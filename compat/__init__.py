"""Proof that distpool is a drop-in, survives faults and is fast: other people's suites, consumers and peers.

Four programs, one command each: ``python -m compat.cpython``, ``python -m compat.consumers``,
``python -m compat.faults`` and ``python -m compat.benchmarks``. See ``compat/README.md``. Nothing here is part
of the installed package.
"""
