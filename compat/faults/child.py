"""One cell of the table: ``python -m compat.faults.child ROW PEER``."""

from __future__ import annotations

import os
import signal
import sys
import traceback

import psutil

from compat._proc import emit
from compat.faults.beds import BEDS, NotApplicable
from compat.faults.rows import ROWS


def main() -> None:
    """Run the row, say what was found, and leave nothing behind: a broken pool may not be able to stop itself."""
    _, function = ROWS[sys.argv[1]]
    try:
        ok, text = function(BEDS[sys.argv[2]])
        emit({"status": "ok" if ok else "FAIL", "text": text})
    except NotApplicable as reason:
        emit({"status": "-", "text": str(reason)})
    except BaseException as error:
        line = traceback.format_exc()
        emit({"status": "FAIL", "text": " ".join(f"{type(error).__name__}: {error}".split())[:160], "traceback": line})
    for process in psutil.Process().children(recursive=True):
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.Error:
            continue
    os._exit(0)


if __name__ == "__main__":
    main()
