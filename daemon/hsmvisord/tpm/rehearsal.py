"""A TPM's life, done once in the launcher: what is loaded and made for it lies there, and is every TPM's (transport/rehearsal.py).

Its seeds and keys are nobody's, and are forgotten.
"""

from __future__ import annotations

import contextlib
import os

from cryptography.hazmat.primitives.asymmetric import ec
from hsmvisor_rpc.internal import messages as m

from hsmvisord.tpm import stored
from hsmvisord.tpm.blobs import Blobs
from hsmvisord.tpm.library import NoLibrary
from hsmvisord.tpm.managed import ManagedTpm, Wanted
from hsmvisord.tpm.seals import Seals
from hsmvisord.tpm.server import Server
from hsmvisord.tpm.stored import Sealer
from hsmvisord.tpm.wanted import PLATFORMS
from hsmvisord.wire import tpm2
from hsmvisord.wire.tpm2 import Code

TIMES = 2


def run() -> None:
    for _ in range(TIMES):
        with contextlib.suppress(NoLibrary):
            _life()


def _life() -> None:
    keys = stored.keys(os.urandom(stored.KEY_SIZE))
    sealer = Sealer(keys.stored, bytes(16), b"rehearsal")

    def keep(permanent: bytes) -> None:
        m.StoreTpm(1, sealer.seal(1, permanent)).encode()

    managed = ManagedTpm(b"", keep, lambda text: None)
    managed.manufacture()
    managed.endorsement_keys()
    Server(managed, Seals(Blobs(keys.blobs, bytes(16))), lambda text: None)
    managed.switch_on()
    managed.process(tpm2.command(Code.STARTUP, (), tpm2.number(tpm2.CLEAR)))
    managed.want({PLATFORMS.start: Wanted(ec.generate_private_key(ec.SECP256R1()), certificate=bytes(600))})
    managed.quote(bytes(32), (0, 7))
    managed.tpm.close()
