"""`python -m distpool` (layer 11): see `distpool.cli`. Runs on the main thread."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command; does not return."""
    if sys.argv[1:] == ["worker", "--login"]:
        # What each login of `SSHManager` runs: without the parsers of all commands, which take as long as the rest.
        from distpool import login

        login.main(None)
    from distpool import cli

    sys.exit(cli.main())


if __name__ == "__main__":
    main()
