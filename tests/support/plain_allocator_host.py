"""The host service whose workers free memory as any Python program does, for the bench: what the allocator's settings cost.

Freed keys stay in its workers' memory.  Run as a module, as hsmvisor-host.
"""

from __future__ import annotations

from hsmvisor import environment
from hsmvisor.host.main import main

if __name__ == "__main__":
    environment.ALLOCATOR = {}
    main()
