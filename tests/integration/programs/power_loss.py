"""Run in a virtual machine that loses its power: what is there of an earlier life, then deliveries on and on.

A line "found {...}" tells what is there; "activated N ID" and "destroyed N" are written once that was acknowledged.
The argument is the module that is run as the host service.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature
from cryptoki import Cryptoki, number
from hsmvisor.authority import Authority
from hsmvisor.serving.audit_verify import verify
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from support.certificates import new_key
from support.guest import OURS
from support.host import SETTINGS, Host, Module
from support.host_process import HostProcess

DISK = Path("/mnt")
KEPT = 4  #: generations; older ones are destroyed
DIGEST = bytes(range(32))


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


class DurableHost(Host):
    """Its state is on the disk; what it needs only while it runs is not."""

    def __init__(self, program: str) -> None:
        self.process = HostProcess(SETTINGS, module=program)
        self.process.state = DISK / "state"
        self.process.patience = 30  # an emulated processor, of a machine that has other things to do
        self.process.configure(SETTINGS)
        new = not (DISK / "authority").exists()
        self.authority = (Authority.create if new else Authority.open)(DISK / "authority")
        self.process.root_public = self.authority.root_public
        if new:
            os.sync()


def signs(module: Module) -> bool:
    """Says whether the newest key signs, and it is the one that the host names."""
    (current,) = [g for g in module.material("requests").generations if g.state == "current"]
    os.environ["HSMVISOR_PKCS11_ADDRESS"] = module.address
    token = Cryptoki(str(OURS))
    token.initialize()
    token.open()
    (handle,) = token.find({"CLASS": number(3)})
    signature = token.sign(handle, DIGEST)
    token.finalize()
    r, s = (int.from_bytes(part, "big") for part in (signature[:32], signature[32:]))
    public = serialization.load_der_public_key(current.public_key)
    assert isinstance(public, ec.EllipticCurvePublicKey)
    public.verify(encode_dss_signature(r, s), DIGEST, ec.ECDSA(Prehashed(hashes.SHA256())))
    return True


def found(host: Host, module: Module | None) -> None:
    verdict = verify(host.process.state / "audit.log", host.key)
    lines = [json.loads(line) for line in host.process.audit_lines()]
    report: dict[str, object] = {
        "module": bool(module),
        "audit": verdict.sound,
        "said": list(map(str, verdict.findings)),
        "audited": [f"{x['action']} {x['generation']}" for x in lines if x["kind"] == "material.execute" and x["result"] == "ok"],
    }
    if module is not None:
        report["states"] = {g.number: [g.state, g.id.hex()] for g in module.material("requests").generations}
        report["signs"] = signs(module)
    say("found", json.dumps(report))


def main(program: str) -> None:
    host = DurableHost(program).start()
    names = [m.name for m in host.process.modules.ListModules(pb.ListModulesRequest(), timeout=300).modules]
    module = Module(host, "power", host.process.serving("power").address) if names else None
    found(host, module)
    if module is None:
        module = host.create("power")
        say("created")
    while True:
        generation = module.stage("requests", new_key("p256"), mode="follow", profile="request-signing")
        module.activate("requests", generation)
        (identifier,) = [g.id.hex() for g in module.material("requests").generations if g.number == generation]
        say("activated", generation, identifier)
        if generation > KEPT:
            module.destroy_generation("requests", generation - KEPT)
            say("destroyed", generation - KEPT)


main(sys.argv[1])
