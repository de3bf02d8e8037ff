"""The quickstart's tour; scripts/quickstart does the set-up and starts it."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from fleet import FleetTour
from steps import StepFailed
from tour import Tour


def tell(title: str, lines: list[str]) -> None:
    print("\n" + title + "".join(f"\n  {line}" for line in lines), flush=True)


def chosen(place: Path) -> Tour | FleetTour:
    if "--fleet" in sys.argv[1:]:
        return FleetTour(place)
    if "--vm" in sys.argv[1:]:
        from machine import MachineTour  # needs what scripts/setup --guests installs

        return MachineTour(place)
    return Tour(place)


def forget_what_the_user_has_set() -> None:
    """The tour's commands mean the tour's services."""
    ours = [name for name in os.environ if name.startswith("HSMVISOR_") and not name.startswith("HSMVISOR_PKCS11_")]
    for name in ("PYTHONPATH", *ours):
        os.environ.pop(name, None)


def main() -> None:
    keep = "--keep" in sys.argv[1:]
    # the path of a unix socket has at most 107 bytes
    place = Path(tempfile.mkdtemp(prefix="hsmvisor-", dir=None if len(tempfile.gettempdir()) < 50 else "/tmp"))
    place.chmod(0o755)
    forget_what_the_user_has_set()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    tour, code = chosen(place), 0
    try:
        try:
            tour.take()
            if keep:
                tell("Try next:", tour.next_steps(kept=True))
                print(f"It runs until you press Ctrl-C; its files are in {place}.", flush=True)
                signal.pause()
        finally:
            tour.stop()
    except StepFailed:
        code = 1
    except KeyboardInterrupt:
        print("\nInterrupted: nothing is left behind." if not keep else "")
        code = 130 if not keep else 0
    if code == 1:
        print(f"The files of this run are left for you to look at: {place}", file=sys.stderr)
    else:
        shutil.rmtree(place, ignore_errors=True)
        if code == 0:
            tell("Try next:", tour.next_steps(kept=False))
            print("Nothing was left behind.")
    sys.exit(code)


if __name__ == "__main__":
    main()
