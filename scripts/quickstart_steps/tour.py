"""What the quickstart shows: an owner asks once, a guest's programs use the key, nginx serves with it; it is renewed meanwhile."""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path
from typing import Any

from load import Handshakes
from processes import system_file
from services import HostService, Site
from steps import BIN, ROOT, StepFailed, run, say, shown, step
from website import SHIM, Website, curl, guest_environment

RENEWALS = 2
HANDSHAKES_BETWEEN = 60
PYTHON_SIGNATURES = 50
DOMAIN = "example.net"
MESSAGE = b"a message of the guest\n"


class Tour:
    LIFETIME, LEAD = "1m", "50s"  #: of a certificate, and how long before its end it is renewed

    def __init__(self, place: Path) -> None:
        self.place = place
        self.site = Site(place, "host-1")
        self.host: HostService = self.site.hosts["host-1"]
        self.website = Website(self.site.processes, place / "web-1", "web-1", self.host.module("web-1"))
        self.renewed: list[float] = []  #: seconds from one certificate to the next, as clients met them

    def stop(self) -> None:
        self.site.stop()

    def take(self) -> None:
        """All steps; what they started runs on."""
        self.start()
        self.join()
        self.ask()
        self.use(SHIM, "our library, libhsmvisor-pkcs11.so")
        self.use(system_file("*/pkcs11/p11-kit-client.so", "p11-kit-modules"), "Debian's own p11-kit-client.so")
        load = self.serve()
        self.renew(load)
        self.report(load)

    # ---- steps ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        with step("Start hsmvisor-manager, which decides, and hsmvisor-host, which runs guests' modules"):
            self.site.start()
            manager = self.site.manager
            say(f"the manager keeps its database in a file of SQLite; hosts reach it at 127.0.0.1:{manager.port},")
            say(f"those with a token at 127.0.0.1:{manager.join_port}; nobody reaches the host")

    def join(self) -> None:
        with step("The host joins the manager with a token, and tells it of its guest web-1"):
            self.site.join("alice")
            self.site.tell("host-1", "guest", "add", "web-1", "--owner", "alice", "--attribute", "role=web")

    def ask(self) -> None:
        with step("Alice owns that guest: she asks once for a key and a certificate that is renewed"):
            self.site.welcome_alice()
            words = ("--lifetime", self.LIFETIME, "--renew-lead", self.LEAD, "--wait")
            self.site.tell("alice", "request", "apply", "tls", "--select", "role=web", "--name", "dns:{name}." + DOMAIN, *words)
            say("web-1's module has made the key: it is in no other place. From here on nobody acts.")

    def use(self, library: Path, name: str) -> None:
        more = guest_environment(self.website.directory, self.host.module("web-1"), library)
        do = f"look at the library's own words: HSMVISOR_PKCS11_DEBUG=1, and at {self.host.log}"
        with step(f"Use it from ordinary programs of the guest, through {name}"):
            self.sign(library, more, do)
            request = ("openssl", "req", "-new", "-engine", "pkcs11", "-keyform", "engine", "-subj", "/CN=web-1")
            uri = "pkcs11:token=web-1;object=tls;type=private"
            run(*request, "-key", uri, "-verify", "-noout", do=do, more=more, who="web-1")
            say("openssl signed a certificate request with the module's key and verified it")
            loader = ROOT / "scripts/quickstart_steps/load.py"
            good = int(run(sys.executable, loader, library, "tls", str(PYTHON_SIGNATURES), do=do, more=more, show=False))
            if good != PYTHON_SIGNATURES:
                raise StepFailed(f"python-pkcs11: {good} of {PYTHON_SIGNATURES} signatures were good", do)
            say(f"python-pkcs11 signed and verified {good} times")

    def sign(self, library: Path, more: dict[str, str], do: str) -> None:
        """The certificate may be renewed between two programs: then once more."""
        message, signature, digest = self.place / "message", self.place / "signature", self.place / "digest"
        message.write_bytes(MESSAGE)
        digest.write_bytes(hashlib.sha256(MESSAGE).digest())
        tool = ("pkcs11-tool", "--module", library)
        command = (*tool, "--sign", "--mechanism", "ECDSA", "--signature-format", "openssl", "--label", "tls")
        files = ("--input-file", digest.name, "--output-file", signature.name)
        say(shown([str(word) for word in (*command, *files)], "web-1"))
        before = self.certificate(tool, more, do)
        while True:
            run(*command, *files, do=do, more=more, show=False, where=self.place)
            after = self.certificate(tool, more, do)
            if before == after:
                break
            before = after
        self.verify(message, signature, do)
        say("openssl verifies that signature with the public key of the guest's certificate")

    def certificate(self, tool: tuple[str | Path, ...], more: dict[str, str], do: str) -> bytes:
        """Returns the leaf that the guest finds beside its key."""
        file = self.place / "leaf.der"
        run(*tool, "--read-object", "--type", "cert", "--label", "tls", "--output-file", file, do=do, more=more, show=False)
        return file.read_bytes()

    def verify(self, message: Path, signature: Path, do: str) -> None:
        public = self.place / "public.pem"
        leaf = self.place / "leaf.der"
        run("openssl", "x509", "-inform", "DER", "-in", leaf, "-pubkey", "-noout", "-out", public, do=do, show=False)
        run("openssl", "dgst", "-sha256", "-verify", public, "-signature", signature, message, do=do, show=False)

    def serve(self) -> Handshakes:
        with step("Serve TLS with nginx: the private key is in the module, hsmvisor-guest keeps the certificate's file"):
            self.website.serve()
            return self.handshakes(self.website.port, f"see {self.website.logs[1]} and {self.website.guest_log}")

    def handshakes(self, port: int, do: str) -> Handshakes:
        """Says what the server answers; returns handshakes that go on until they are stopped."""
        ca = self.site.roots()
        say(run(*curl("web-1", DOMAIN, port, ca), do=do, who="client").strip())
        load = Handshakes(port, ca, f"web-1.{DOMAIN}")
        load.start()
        self.await_handshakes(load, HANDSHAKES_BETWEEN, do)
        return load

    def await_handshakes(self, load: Handshakes, count: int, do: str) -> None:
        until, end = load.done + count, time.monotonic() + 60
        while load.done < until:
            if time.monotonic() > end or len(load.failures) > 20:
                words = load.failures[-1] if load.failures else "none was made within a minute"
                raise StepFailed(f"handshakes: {words}", do)
            time.sleep(0.02)

    def renew(self, load: Handshakes) -> None:
        do = f"see {self.site.manager.log} and {self.website.guest_log}"
        with step("Clients connect all the time, certificate and key are renewed in service, and nobody acts"):
            began = time.monotonic()
            for _ in range(RENEWALS):
                seen, end = len(load.certificates), time.monotonic() + 180
                while len(load.certificates) == seen:
                    if time.monotonic() > end:
                        raise StepFailed("no new certificate was served within three minutes", do)
                    time.sleep(0.02)
                self.renewed.append(time.monotonic() - began)
                began = time.monotonic()
                self.await_handshakes(load, HANDSHAKES_BETWEEN, do)
                met = f"clients meet certificate {seen + 1}, {self.renewed[-1]:.1f} s after the one before"
                say(f"{met if self.renewed[1:] else f'clients meet certificate {seen + 1}'}; {_told(load)}")
            load.stop()

    def report(self, load: Handshakes) -> None:
        with step("What happened"):
            statistics = self.site.query("host-1", "module", "stats", "web-1")
            signed = sum(int(o["count"]) for o in statistics.get("operations", []) if o["operation"] == "sign")
            errors = sum(int(o["errors"]) for o in statistics.get("operations", []) if o["operation"] == "sign")
            line = self.line("tls")
            say(f"generations of tls: {line['generation']}, each a new key; asked for once, renewed {line['generation'] - 1} times")
            for generation in line["generations"]:
                why = f", because {generation['why']}" if generation["number"] > 1 else ""
                say(f"  {generation['number']}: {generation['state']}{why}")
            say(f"certificates that clients met: {len(load.certificates)}")
            say(f"signatures made in the module: {signed}, failed: {errors}")
            say(f"TLS handshakes: {load.done}, failed: {len(load.failures)}")
            if load.failures or errors:
                raise StepFailed(f"failures, the first: {(load.failures or ['a signature'])[0]}", f"see {self.host.log}")

    def line(self, material: str) -> Any:
        """What the manager tells of the one key of a request."""
        return self.site.query("alice", "request", "show", material)["lines"][0]

    # ---- what comes then ----------------------------------------------------------------------------------------------

    def next_steps(self, kept: bool) -> list[str]:
        if not kept:
            return [
                "scripts/quickstart --keep     the same, left running for you to use",
                "scripts/quickstart --fleet    two hosts, PostgreSQL, the console, and a fleet that changes",
                "scripts/quickstart --vm       the guest is a virtual machine, the module its device",
                ".venv/bin/hsmvisor doctor     is this machine ready to be a host?",
                "README.md                     how to run it in service",
            ]
        return [
            *self.exports(),
            "hsmvisor request show tls                     # renewed on and on; each generation",
            "hsmvisor request rotate tls --wait            # a new key now",
            "hsmvisor request apply tls --owner alice --name 'dns:{name}.example.net' --select role=web   # for 30 days",
            "hsmvisor fleet status                         # hosts, guests, certificates, what fails",
            "hsmvisor fleet events --follow",
            "hsmvisor guest add web-2 --owner alice --attribute role=web     # gets its key by itself",
            " ".join(self.website.curl(self.place / "roots.pem", DOMAIN)),
            'eval "$(hsmvisor module env web-1)"           # from here on this shell is the guest',
            f"pkcs11-tool --module {SHIM} -O",
        ]

    def exports(self) -> list[str]:
        """For the one who tries: operator, owner and the host's root at once."""
        manager = self.site.manager
        return [
            f"export PATH={BIN}:$PATH HSMVISOR_HOST=unix:{self.host.control}",
            f"export HSMVISOR_MANAGER=unix:{manager.control}     # as operator, who may ask for alice too",
            f"# as alice:  hsmvisor --manager 127.0.0.1:{manager.join_port} --manager-file {self.place}/alice.toml fleet whoami",
        ]


def _told(load: Handshakes) -> str:
    return f"{load.done} handshakes so far, {len(load.failures)} failed"
