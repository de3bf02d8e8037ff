"""Run in a guest: signs with a key of its TPM until nobody listens any more, and reads its public part at each use.

Prints a line for each signature, in hexadecimal: what was signed (a SHA-256), and the responses to ReadPublic before it, to Sign,
and to ReadPublic after it.

usage: tpm_sign.py READ SIGN    commands in hexadecimal; SIGN has 32 times the byte dd for the digest
"""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
import sys

PLACE = b"\xdd" * 32


def main(read: bytes, sign: bytes) -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    device = os.open("/dev/tpmrm0", os.O_RDWR)

    def say(command: bytes) -> bytes:
        os.write(device, command)
        return os.read(device, 4096)

    for number in itertools.count():
        digest = hashlib.sha256(b"%d" % number).digest()
        answers = [say(command) for command in (read, sign.replace(PLACE, digest), read)]
        print(*(part.hex() for part in (digest, *answers)), flush=True)


main(*map(bytes.fromhex, sys.argv[1:]))
