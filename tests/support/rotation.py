"""Rotations under load: nginx whose certificate file hsmvisor-guest keeps, and signers that follow; what came of it."""

from __future__ import annotations

import bisect
import math
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from support.certificates import DER, Authority, PrivateKey, new_key
from support.guest import OURS, Guest, Library, stop, wait_for
from support.guest import library as named
from support.host import Module
from support.load import Made, Signer, SshLoad, TlsLoad, fits
from support.nginx import Nginx, client_context

WITHIN = 60.0  #: seconds for the last certificate to come to clients: hsmvisor-guest lets 3 s pass before it writes
KEPT = 14  #: generations that stay: a material has at most 16
HSMVISOR_GUEST = OURS.parent / "hsmvisor-guest"


@dataclass
class Activation:
    """One generation in service: when its activation was asked for and when it was acknowledged (CLOCK_MONOTONIC)."""

    key: PrivateKey
    leaf: bytes
    asked: float
    acknowledged: float


@dataclass
class Report:
    rotations: int = 0
    handshakes: int = 0
    failed_handshakes: list[str] = field(default_factory=list)
    certificates_seen: int = 0
    foreign_certificates: int = 0
    signatures: int = 0
    failed_signatures: list[str] = field(default_factory=list)
    wrong_signatures: int = 0
    generations_that_signed: int = 0
    swap_ms: list[float] = field(default_factory=list)  #: from asking for the activation to the first signature of the new key
    latency_ms: list[float] = field(default_factory=list)  #: of each signature that ran while no activation did
    latency_in_swap_ms: list[float] = field(default_factory=list)  #: of the others
    connections: int = 0  #: of the module, at most
    reloads: int = 0
    logins: int = 0
    failed_logins: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, float | int]:
        def percentile(values: list[float], share: float) -> float:
            return round(sorted(values)[int(share * (len(values) - 1))], 3) if values else 0.0

        return {
            "rotations": self.rotations,
            "connections": self.connections,
            "handshakes": self.handshakes,
            "failed_handshakes": len(self.failed_handshakes),
            "certificates_seen": self.certificates_seen,
            "foreign_certificates": self.foreign_certificates,
            "signatures": self.signatures,
            "failed_signatures": len(self.failed_signatures),
            "wrong_signatures": self.wrong_signatures,
            "generations_that_signed": self.generations_that_signed,
            "nginx_reloads": self.reloads,
            "logins": self.logins,
            "failed_logins": len(self.failed_logins),
            "swap_ms_median": round(statistics.median(self.swap_ms), 3) if self.swap_ms else 0.0,
            "swap_ms_max": percentile(self.swap_ms, 1.0),
            "signature_ms_p50_between_swaps": percentile(self.latency_ms, 0.5),
            "signature_ms_p50_during_swaps": percentile(self.latency_in_swap_ms, 0.5),
            "signature_ms_p99_between_swaps": percentile(self.latency_ms, 0.99),
            "signature_ms_p99_during_swaps": percentile(self.latency_in_swap_ms, 0.99),
        }


def owner_of(made: Made, activations: list[Activation]) -> int | None:
    """The generation whose signature it is, of those that may have been current while it was made; None: it is wrong."""
    last = bisect.bisect_right([a.asked for a in activations], made.ended) - 1
    for number in range(last, -1, -1):
        if fits(activations[number].key, made):
            return number
        if activations[number].acknowledged < made.began:
            return None  # this one was current before it began: no older one may sign for a follower
    return None


STAGINGS = {
    "web": {"mode": "pin", "profile": "tls"},
    "requests": {"mode": "follow", "profile": "request-signing"},
    "login": {"mode": "pin", "profile": "ssh"},
}


class Rotator:
    """Delivers the next generation of each material; `activations` remember what came into service, and when."""

    def __init__(self, module: Module, materials: list[str]) -> None:
        self.module, self.authority = module, Authority()
        self.activations: dict[str, list[Activation]] = {material: [] for material in materials}
        self.before: Callable[[str, PrivateKey], None] = lambda material, key: None  #: told of a key before it comes into service

    def rotate(self) -> None:
        for material, known in self.activations.items():
            key = new_key("p256")
            chain = self.authority.chain(key) if material == "web" else ()
            generation = self.module.stage(material, key, chain, **STAGINGS[material])
            self.before(material, key)
            asked = time.monotonic()
            self.module.activate(material, generation)
            known.append(Activation(key, chain[0].public_bytes(DER) if chain else b"", asked, time.monotonic()))
            if generation > KEPT:
                self.module.destroy_generation(material, generation - KEPT)


def rotate_under_load(
    library: Library, module: Module, directory: Path, rotations: int, interval: float, storm: bool = False
) -> Report:
    """`web` (pinned, EC) is served by nginx with 4 workers, `requests` (follow, EC) signs from python-pkcs11; both are rotated.

    `storm`: ssh logs in with `login` (pinned) as well, and over 50 more connections sign with `requests`.
    """
    guest = Guest(library, module.address, directory)
    rotator = Rotator(module, ["web", "requests", "login"] if storm else ["web", "requests"])
    rotator.rotate()
    certificate, pid_file = directory / "web.pem", directory / "nginx.pid"
    with ExitStack() as stack:
        keeper = Guest(named("ours"), module.address, directory).start(
            *(HSMVISOR_GUEST, "sync", "--label", "web", "--out", certificate, "--chain", "--module", OURS),
            *("--reload", f"echo reload >> {directory}/reloads; test ! -e {pid_file} || kill -HUP $(cat {pid_file})"),
            output=directory / "guest.log",
        )
        stack.callback(stop, keeper)
        wait_for(certificate.exists, "the certificate file")
        nginx = Nginx(guest, [(certificate, f"pkcs11:token={module.name};object=web;type=private")])
        stack.callback(nginx.stop)
        load = TlsLoad(nginx.port, client_context(rotator.authority.root_pem))
        stack.callback(load.stop)
        signers = [Signer(guest, "requests")]
        ssh = None
        if storm:
            programs, threads = (10, 5) if library.ours else (50, 1)  # p11-kit's library makes one connection a program
            signers += [Signer(guest, "requests", threads=threads, name=f"signer-{n}", pause=0.1) for n in range(programs)]
            ssh = SshLoad(guest, rotator.activations["login"][0].key)
            stack.callback(ssh.stop)
            rotator.before = lambda material, key: ssh.allow(key) if material == "login" else None
        time.sleep(1)
        connections = 0
        for _ in range(rotations):
            rotator.rotate()
            connections = max(connections, module.status().connections)
            time.sleep(interval)
        last = rotator.activations["web"][-1].leaf
        wait_for(lambda: any(leaf == last for _, leaf in load.done[-4:]), "nginx to serve the last certificate", WITHIN)
        load.stop()
        made = [signer.stop() for signer in signers]
    report = report_of(rotations, load.done, load.failures, [one for part in made for one in part], rotator.activations)
    reloads = directory / "reloads"
    report.reloads = len(reloads.read_text().splitlines()) if reloads.exists() else 0
    report.connections = connections
    if ssh is not None:
        report.logins, report.failed_logins = ssh.done, ssh.failures
    return report


def report_of(
    rotations: int,
    done: list[tuple[float, bytes]],
    failed: list[str],
    made: list[Made],
    activations: dict[str, list[Activation]],
    widened: float = 0.0,
) -> Report:
    """`done`: handshakes, with the leaf certificate (DER) of each.  `widened`: seconds by which each of `made` is longer, at both
    ends, than it was, because its times come from another clock."""
    known = {a.leaf for a in activations["web"]}
    seen = {leaf for _, leaf in done}
    followed = activations["requests"]
    swaps = sorted((a.asked, a.acknowledged) for part in activations.values() for a in part)  # one after the other
    report = Report(rotations, len(done), failed, len(seen & known), len(seen - known), len(made))
    first: dict[int, float] = {}
    for one in made:
        if one.error:
            report.failed_signatures.append(one.error)
            continue
        owner = owner_of(one, followed)
        if owner is None:
            report.wrong_signatures += 1
            continue
        first.setdefault(owner, one.ended)
        took = (one.ended - one.began - 2 * widened) * 1000
        last = bisect.bisect_right(swaps, (one.ended, math.inf)) - 1
        in_swap = last >= 0 and one.began <= swaps[last][1]
        (report.latency_in_swap_ms if in_swap else report.latency_ms).append(took)
    report.generations_that_signed = len(first)
    report.swap_ms = [(first[n] - followed[n].asked) * 1000 for n in sorted(first) if n]
    return report
