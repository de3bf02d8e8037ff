"""The manager, but it looks into its database by the clock each half minute alone.  Run as a module, as hsmvisor-manager."""

from __future__ import annotations

from hsmvisor.manager.engine import engine
from hsmvisor.manager.main import main

engine.LOOK_EVERY = 30.0

if __name__ == "__main__":
    main()
