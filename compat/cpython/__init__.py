"""CPython's own executor and Pool suites, run against distpool (or a peer) from the installed ``test`` package."""
