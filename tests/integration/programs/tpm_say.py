"""Run in a guest: says to its TPM what comes on standard input, a command a line in hexadecimal, and prints the responses so.

usage: tpm_say.py DEVICE
"""

from __future__ import annotations

import os
import sys


def main(path: str) -> None:
    device = os.open(path, os.O_RDWR)
    for line in sys.stdin:
        os.write(device, bytes.fromhex(line))
        print(os.read(device, 4096).hex(), flush=True)


main(sys.argv[1])
