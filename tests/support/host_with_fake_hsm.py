"""hsmvisor-host with workers and HSMs that are none (fake_launcher.py, fake_hsm.py)."""

from __future__ import annotations

from hsmvisor.host import foundation, hsm_helper
from hsmvisor.host.main import main
from support.host_with_fake_launcher import fake

if __name__ == "__main__":
    hsm_helper.MODULE = "support.fake_hsm"
    foundation.Launcher = fake  # type: ignore[assignment,misc]
    main()
