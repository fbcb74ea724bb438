"""What `Rig.call` runs in the driver's network namespace: one function of a test module, with the rig."""

from __future__ import annotations

import faulthandler
import importlib
import json
import sys

from hosts.rig import Rig


def main(target: str) -> None:
    order = json.load(sys.stdin)
    faulthandler.dump_traceback_later(order["seconds"], exit=True)
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name)
    function(Rig(description=order["rig"]), *order["arguments"])
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main(sys.argv[1])
