"""The command line with a place to die, as support.crashing_host."""

from __future__ import annotations

import os

from support.crashing_host import arm

if __name__ == "__main__":
    if place := os.environ.get("HSMVISOR_CRASH"):
        arm(place)
    from hsmvisor.cli.main import main

    main()
