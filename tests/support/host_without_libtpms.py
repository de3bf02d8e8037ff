"""hsmvisor-host on a machine where libtpms is not installed."""

from __future__ import annotations

from hsmvisor.host import launcher
from hsmvisor.host.main import main

if __name__ == "__main__":
    launcher.OF_TPMS = "support.tpm_launcher_without_libtpms"
    main()
