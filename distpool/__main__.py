"""`python -m distpool` (layer 11): see `distpool.cli`. Runs on the main thread."""

from __future__ import annotations

import sys

from distpool.cli import main

if __name__ == "__main__":
    sys.exit(main())
