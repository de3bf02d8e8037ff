"""Run in a guest: says to its TPM what comes on standard input, a command a line in hexadecimal, and prints the responses so.

--loop N: the only command again and again, N times, with the public part of its key before and after.
"""

from __future__ import annotations

import os
import sys


def say(device: int, command: bytes) -> bytes:
    os.write(device, command)
    return os.read(device, 4096)


def main(loops: int) -> None:
    device = os.open("/dev/tpmrm0", os.O_RDWR)
    commands = [bytes.fromhex(line) for line in sys.stdin]
    for _ in range(loops):
        print(" ".join(say(device, command).hex() for command in commands), flush=True)


main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
