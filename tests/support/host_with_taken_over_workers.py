"""hsmvisor-host with workers that their guests can take over (taken_over.py)."""

from __future__ import annotations

from hsmvisor.host import foundation
from hsmvisor.host.launcher import Launcher
from hsmvisor.host.main import main


def fake() -> Launcher:
    return Launcher("support.taken_over")


if __name__ == "__main__":
    foundation.Launcher = fake  # type: ignore[assignment,misc]
    main()
