"""Loaded by the programs that CPython's tests start: gives them the classes under test. A worker needs none of it."""

import os
import sys

if os.environ.get("COMPAT_TEST_PATH"):
    import test

    test.__path__.append(os.environ["COMPAT_TEST_PATH"])
if os.environ.get("COMPAT_SITE") and not any("distpool" in word for word in sys.orig_argv[1:]):
    os.environ.pop("COMPAT_SITE")  # the program itself only, not its workers
    from compat.cpython import adapters

    adapters.patch()
