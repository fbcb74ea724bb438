"""Libraries that take an executor or a pool, each in a short real program with an asserted result."""
