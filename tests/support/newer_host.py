"""The host service of a later release: its state file has one schema step more.  Run as a module, as hsmvisor-host."""

from __future__ import annotations

from hsmvisor.host import migrations
from hsmvisor.host.main import main

migrations.STEPS = (*migrations.STEPS, ("ALTER TABLE modules ADD COLUMN owner TEXT NOT NULL DEFAULT ''",))

if __name__ == "__main__":
    main()
