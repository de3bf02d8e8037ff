"""hsmvisord: the launcher of workers.  It has everything imported and forks a worker for each module (confined/forking.py)."""

from __future__ import annotations

from hsmvisord.confined import forking
from hsmvisord.crypto import eddsa, libcrypto
from hsmvisord.lanes import lanes
from hsmvisord.rings import rings
from hsmvisord.transport.rehearsal import Rehearsal
from hsmvisord.worker import main as worker
from hsmvisord.worker import rehearsal

SPAWN_DESCRIPTORS = 3  #: control listener, guest listener, read end of the key pipe


def _load() -> None:
    libcrypto.preload()
    eddsa.preload()
    lanes.preload()
    rings.preload()
    Rehearsal().run()
    rehearsal.run()


def main() -> None:
    forking.launch("hsmvisord", "launcher", "module workers", _load, worker.run, SPAWN_DESCRIPTORS)


if __name__ == "__main__":
    main()
