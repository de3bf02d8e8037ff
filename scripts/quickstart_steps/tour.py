"""What the quickstart shows: a module whose key is used by ordinary programs, served by nginx, and replaced under load."""

from __future__ import annotations

import base64
import json
import sys
import time
from pathlib import Path
from typing import Any

from load import Handshakes
from steps import BIN, ROOT, StepFailed, run, say, step
from website import GUEST, SHIM, Site, system_file

SWAPS = 3
HANDSHAKES_BETWEEN = 60


class Tour:
    def __init__(self, place: Path) -> None:
        self.place = place
        self.site = Site(place)
        self.signatures = 0
        self.swaps: list[float] = []

    def hsmvisor(self, *words: str | Path, show: bool = True) -> str:
        more = {"HSMVISOR_HOST": f"unix:{self.site.control}", "HSMVISOR_AUTHORITY": str(self.place / "authority")}
        return run(
            BIN / "hsmvisor", *words, do="the host service's words are in " + str(self.place / "host.log"), show=show, more=more
        )

    def query(self, *words: str) -> Any:
        return json.loads(self.hsmvisor("--json", *words, show=False))

    def stop(self) -> None:
        self.site.stop()

    def take(self) -> None:
        """All steps; what they started runs on."""
        self.start()
        self.deliver()
        self.use(SHIM, "our library, libhsmvisor-pkcs11.so")
        self.use(system_file("*/pkcs11/p11-kit-client.so", "p11-kit-modules"), "Debian's own p11-kit-client.so")
        load = self.serve()
        self.replace(load)
        self.report(load)

    def next_steps(self, kept: bool) -> list[str]:
        if not kept:
            return [
                "scripts/quickstart --keep     the same, left running for you to use",
                "scripts/quickstart --vm       the guest is a virtual machine, the module its device",
                ".venv/bin/hsmvisor doctor     is this machine ready to be a host?",
                "README.md                     how to run it in service",
            ]
        return [
            *self.exports(),
            ".venv/bin/hsmvisor module show web-1",
            ".venv/bin/hsmvisor material list web-1",
            ".venv/bin/hsmvisor events",
            'eval "$(.venv/bin/hsmvisor module env web-1)"',
            "pkcs11-tool --module pkcs11_shim/build/libhsmvisor-pkcs11.so -O",
        ]

    def exports(self) -> list[str]:
        return [f"export HSMVISOR_HOST=unix:{self.site.control} HSMVISOR_AUTHORITY={self.place}/authority"]

    # ---- steps ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        with step("Start the host service and make a module for guest web-1"):
            self.site.host()
            say(self.hsmvisor("module", "create", "web-1").strip().splitlines()[-1])

    def deliver(self) -> None:
        with step("Deliver two keys, sealed to the module: EC P-256 with its chain, and RSA-2048"):
            self.new_files("ec-p256")
            self.hsmvisor("material", "generate-test", self.place / "rsa", "--type", "rsa-2048", show=False)
            say(self.push("tls", "ec", "tls").strip())
            say(self.push("rsa", "rsa", "any").strip())

    def new_files(self, kind: str) -> None:
        self.hsmvisor("material", "generate-test", self.place / "ec", "--type", kind, show=False)

    def push(self, name: str, files: str, profile: str, show: bool = True) -> str:
        key, chain = self.place / files / "key.pem", self.place / files / "chain.pem"
        return self.hsmvisor("material", "push", "web-1", name, "--key", key, "--cert", chain, "--profile", profile, show=show)

    def use(self, library: Path, name: str) -> None:
        more = self.site.guest_environment(library)
        do = f"look at the library's own words: HSMVISOR_PKCS11_DEBUG=1, and at {self.place}/host.log"
        with step(f"Use them from ordinary programs, through {name}"):
            listed = run("pkcs11-tool", "--module", library, "--list-objects", do=do, more=more, show=False)
            keys, certificates = listed.count("Private Key Object"), listed.count("Certificate Object")
            say(f"pkcs11-tool sees {keys} private keys and {certificates} certificates")
            key_id = self.key_id("rsa")
            message, signature = self.place / "message", self.place / "signature"
            message.write_bytes(b"a message of the guest\n")
            tool = ("pkcs11-tool", "--module", library, "--sign", "--mechanism", "SHA256-RSA-PKCS", "--id", key_id)
            run(*tool, "--input-file", message, "--output-file", signature, do=do, more=more)
            self.verify(message, signature, do)
            say("openssl verifies that signature")
            request = ("openssl", "req", "-new", "-engine", "pkcs11", "-keyform", "engine", "-subj", "/CN=web-1")
            uri = "pkcs11:token=web-1;object=tls;type=private"
            run(*request, "-key", uri, "-verify", "-noout", do=do, more=more)
            say("openssl signed a certificate request with the module's key and verified it")
            loader = ROOT / "scripts/quickstart_steps/load.py"
            counts = [
                int(run(sys.executable, loader, library, label, "50", do=do, more=more, show=False)) for label in ("tls", "rsa")
            ]
            if counts != [50, 50]:
                raise StepFailed(f"python-pkcs11: {counts} of 50 signatures were good", do)
            say("python-pkcs11 signed and verified 50 times with each key")

    def verify(self, message: Path, signature: Path, do: str) -> None:
        public = self.place / "public.pem"
        run("openssl", "pkey", "-in", self.place / "rsa/key.pem", "-pubout", "-out", public, do=do, show=False)
        run("openssl", "dgst", "-sha256", "-verify", public, "-signature", signature, message, do=do, show=False)

    def key_id(self, name: str) -> str:
        found = self.query("material", "show", "web-1", name)
        return base64.b64decode(next(g["id"] for g in found["generations"] if g["state"] == "current")).hex()

    def serve(self) -> Handshakes:
        with step("Serve TLS with nginx: the private key is in the module, hsmvisor-guest keeps the certificate file"):
            certificate = self.place / "served.pem"
            environment = self.site.guest_environment(SHIM)
            do = f"see {self.place}/nginx-error.log and {self.place}/guest.log"
            run(GUEST, "sync", "--label", "tls", "--chain", "--out", certificate, "--once", do=do, more=environment)
            nginx = self.site.nginx(certificate)
            reload = f"kill -HUP {nginx.pid}"
            self.site.start(
                GUEST,
                "sync",
                "--label",
                "tls",
                "--chain",
                "--out",
                certificate,
                "--reload",
                reload,
                log="guest.log",
                more=environment,
            )
            return self.handshakes(do)

    def handshakes(self, do: str) -> Handshakes:
        """Says what the server answers; returns handshakes that go on until they are stopped."""
        ca, address = self.place / "ec/ca.pem", f"https://localhost:{self.site.port}/"
        say(run("curl", "--silent", "--show-error", "--cacert", ca, address, do=do).strip())
        load = Handshakes(self.site.port, ca)
        load.start()
        self.await_handshakes(load, HANDSHAKES_BETWEEN)
        return load

    def await_handshakes(self, load: Handshakes, count: int) -> None:
        until, end = load.done + count, time.monotonic() + 60
        while load.done < until:
            if time.monotonic() > end or len(load.failures) > 20:
                words = load.failures[-1] if load.failures else "none was made within a minute"
                raise StepFailed(f"handshakes: {words}", f"see {self.place}/nginx-error.log")
            time.sleep(0.02)

    def replace(self, load: Handshakes) -> None:
        with step(f"Replace key and certificate {SWAPS} times while handshakes run"):
            for number in range(2, SWAPS + 2):
                seen = len(load.certificates)
                self.new_files("ec-p256")
                began = time.monotonic()
                self.push("tls", "ec", "tls", show=False)
                self.swaps.append(time.monotonic() - began)
                end = time.monotonic() + 30
                while len(load.certificates) == seen:
                    if time.monotonic() > end:
                        raise StepFailed("the new certificate was not served within 30 s", f"see {self.place}/guest.log")
                    time.sleep(0.02)
                served = time.monotonic() - began
                self.await_handshakes(load, HANDSHAKES_BETWEEN)
                failed = len(load.failures)
                say(f"generation {number} is served {served:.1f} s later; {load.done} handshakes so far, {failed} failed")
            load.stop()
            say(f"{load.done} handshakes, {len(load.failures)} failed")
            say(f"{len(load.certificates)} certificates were served, one after the other")

    def report(self, load: Handshakes) -> None:
        with step("What happened"):
            statistics = self.query("module", "stats", "web-1")
            signed = sum(int(o["count"]) for o in statistics.get("operations", []) if o["operation"] == "sign")
            errors = sum(int(o["errors"]) for o in statistics.get("operations", []) if o["operation"] == "sign")
            say(f"signatures made in the module: {signed}, failed: {errors}")
            say(f"TLS handshakes: {load.done}, failed: {len(load.failures)}")
            for generation in self.query("material", "show", "web-1", "tls")["generations"]:
                say(f"generation {generation['number']} of tls: {generation['state']}, used {generation['operations']} times")
            say(f"a swap (command line, sealing and activation together): {min(self.swaps):.2f} to {max(self.swaps):.2f} s")
            if load.failures or errors:
                raise StepFailed(f"failures, the first: {(load.failures or ['a signature'])[0]}", f"see {self.place}/host.log")
