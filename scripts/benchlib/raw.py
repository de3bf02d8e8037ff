"""What this machine's cores can sign at all: libcrypto alone, without a token, a socket or another process."""

from __future__ import annotations

import os
import re
import subprocess

#: names that `openssl speed` has
ALGORITHMS = {"p256": "ecdsap256", "rsa2048": "rsa2048", "rsa3072": "rsa3072", "ed25519": "ed25519"}


def limits(keys: list[str], seconds: float = 2) -> dict[str, float]:
    """Signatures a second of all cores together, by key."""
    found: dict[str, float] = {}
    for key in keys:
        options = ("-mr", "-seconds", str(max(1, round(seconds))), "-multi", str(os.cpu_count()))
        said = subprocess.run(["openssl", "speed", *options, ALGORITHMS[key]], capture_output=True, text=True, check=True).stdout
        rates = re.findall(r"^\+F\d+:\d+:\d+:(?:\w+:)?([\d.]+):[\d.]+$", said, re.MULTILINE)
        found[key] = round(float(rates[-1]), 1) if rates else 0.0
    return found
