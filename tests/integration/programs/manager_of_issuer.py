"""A manager's process: asks its issuer what it reads, a line of JSON each, and says what came of it.

Arguments: the directory of the issuer's files.  Bytes are hexadecimal.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hsmvisor.manager.ca import names
from hsmvisor.manager.issuer.calls import SealTo
from hsmvisor.manager.issuer.client import BadKey, EscrowAs, Issuer, IssuerAway, Made
from hsmvisor.manager.issuer.settings import FileEscrow, Settings

HELD: list[Any] = []


def say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer, default=lambda value: value.hex()), flush=True)


async def carry_out(issuer: Issuer, asked: dict[str, Any]) -> dict[str, Any]:
    targets = [SealTo.decode(bytes.fromhex(one)) for one in asked["targets"]]
    escrow = EscrowAs(asked["line"], 1) if asked.get("line") else None
    match asked["operation"]:
        case "hold":
            HELD.append(ec.generate_private_key(ec.SECP256R1()))
            return {"held": HELD[-1].private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())}
        case "make":
            return asdict(await issuer.make(asked["key_type"], names.parse_all(asked["names"]), targets, escrow))
        case "take":
            envelope, public_key = bytes.fromhex(asked["envelope"]), bytes.fromhex(asked["public_key"])
            certificates = list(map(bytes.fromhex, asked["certificates"]))
            return asdict(await issuer.take(asked["request"], envelope, public_key, certificates, targets, escrow))
    assert escrow is not None
    return asdict(Made(b"", b"", await issuer.reseal(bytes.fromhex(asked["wrapped"]), escrow, targets)))


async def main(directory: Path) -> None:
    issuer = Issuer(Settings(directory / "issuer.key", FileEscrow(directory / "escrow.key")))
    await issuer.start()
    say({"recipient": issuer.recipient})
    while line := await asyncio.to_thread(sys.stdin.readline):
        try:
            say(await carry_out(issuer, json.loads(line)))
        except (IssuerAway, BadKey) as error:
            say({"error": f"{type(error).__name__}: {error}"})
    await issuer.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
