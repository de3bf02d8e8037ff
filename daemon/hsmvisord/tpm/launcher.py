"""hsmvisord: the launcher of TPMs.  It has libtpms loaded and forks a process for each module's TPM (confined/forking.py).

Another one than the workers': so no worker has libtpms in it, and no TPM what a worker has.
"""

from __future__ import annotations

from hsmvisord.confined import forking
from hsmvisord.tpm import main as tpm
from hsmvisord.tpm import rehearsal

SPAWN_DESCRIPTORS = 2  #: control listener, read end of the key pipe


def _load() -> None:
    tpm.preload()
    rehearsal.run()


def main() -> None:
    forking.launch("hsmvisord-tpm", "launcher of TPMs", "TPMs", _load, tpm.run, SPAWN_DESCRIPTORS)


if __name__ == "__main__":
    main()
