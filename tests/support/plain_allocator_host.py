"""The host service whose workers free memory as any Python program does, for the bench: what the allocator's settings cost.

Freed keys stay in its workers' memory.  Run as a module, as hsmvisor-host.
"""

from __future__ import annotations

from hsmvisor.host import child
from hsmvisor.host.main import main

if __name__ == "__main__":
    child._ENVIRONMENT = {
        name: value for name, value in child._ENVIRONMENT.items() if name not in ("PYTHONMALLOC", "GLIBC_TUNABLES")
    }
    main()
