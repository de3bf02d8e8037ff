"""The quickstart with a fleet: two hosts, PostgreSQL, the console, and guests that come, change and go while others serve."""

from __future__ import annotations

import time
import urllib.request
from pathlib import Path

import postgres
from load import Handshakes
from processes import wait_until
from services import CONSOLE, Site
from steps import BIN, StepFailed, run, say, step
from watching import Watch
from website import SHIM, Website

GUESTS = {"web-1": "host-1", "web-2": "host-1", "web-3": "host-2", "web-4": "host-2"}
LATER, ITS_HOST = "web-5", "host-2"
DOMAIN = "example.net"
WITHIN = 2.0  #: seconds in which a guest that appears should have its material
PAUSE = 0.02  #: seconds between two connections of a client
MET = 20  #: handshakes with each guest between two steps


class FleetTour:
    def __init__(self, place: Path) -> None:
        self.place = place
        self.site = Site(place, "host-1", "host-2", console=True)
        self.websites: dict[str, Website] = {}
        self.loads: dict[str, Handshakes] = {}
        self.came = self.went = self.rotated = 0.0  #: seconds

    def stop(self) -> None:
        self.site.stop()

    def take(self) -> None:
        """All steps; what they started runs on."""
        self.database()
        self.start()
        self.join()
        self.ask()
        self.serve()
        self.appear()
        self.lose()
        self.rotate()
        self.report()

    # ---- steps ------------------------------------------------------------------------------------------------------

    def database(self) -> None:
        with step("Start PostgreSQL: a cluster of its own, on a unix socket"):
            self.site.manager.database = postgres.start(self.site.processes, self.place / "pg")
            say(self.site.manager.database)

    def start(self) -> None:
        with step(f"Start hsmvisor-manager{' with its console' if CONSOLE else ''}, and two hosts"):
            self.site.start()
            if CONSOLE:
                self.console_answers()

    def console_answers(self) -> None:
        with urllib.request.urlopen(self.site.manager.console, timeout=10) as answer:
            if answer.status != 200:
                raise StepFailed(f"the console answers {answer.status}", f"see {self.site.manager.log}")
        token = ("fleet", "token", "create", "--owner", "alice", "--role", "owner", "--role", "operator", "--role", "auditor")
        self.site.hsmvisor("operator", *token, "--lifetime", "1d", "--out", "console.token")
        say(f"the console: {self.site.manager.console}, with the token in {self.place}/console.token")

    def join(self) -> None:
        with step("Both hosts join with tokens, and tell the manager of two guests each"):
            self.site.join("alice")
            for guest in GUESTS:
                self.add(guest)

    def add(self, guest: str) -> None:
        host = GUESTS.get(guest, ITS_HOST)
        self.site.tell(host, "guest", "add", guest, "--owner", "alice", "--attribute", "role=web")

    def ask(self) -> None:
        with step("Alice asks once, for all of her guests that have role=web, now or later"):
            self.site.welcome_alice()
            words = ("--name", "dns:{name}." + DOMAIN, "--select", "role=web", "--lifetime", "1h", "--wait")
            self.site.tell("alice", "request", "apply", "tls", *words)

    def serve(self) -> None:
        with step("Each guest serves TLS with its own key, and clients connect from now on"):
            ca = self.site.roots()
            for guest, host in GUESTS.items():
                address = self.site.hosts[host].module(guest)
                website = Website(self.site.processes, self.place / guest, guest, address, workers=1)
                website.serve(show=False)
                self.websites[guest] = website
                load = Handshakes(website.port, ca, f"{guest}.{DOMAIN}", threads=1, pause=PAUSE)
                self.loads[guest] = load
                load.start()
            self.await_clients()
            say(f"{self.done} handshakes with {len(GUESTS)} guests, {len(self.failures)} failed")

    def appear(self) -> None:
        with step(f"A guest appears: {LATER}, on {ITS_HOST}; nobody asks for anything"):
            do = f"see {self.site.manager.log}"
            with Watch(self.site.hosts[ITS_HOST], LATER, "tls", there=True) as watch:
                self.add(LATER)
                registered = time.monotonic() - watch.began
                self.came = watch.wait(f"{LATER} has its key and certificate", do)
            say(f"key and certificate serve {self.came:.2f} s after that command began (it ended after {registered:.2f} s)")
            if self.came > WITHIN:
                say(f"that is more than {WITHIN:.0f} s: this machine is busy")
            say(self.sees(LATER))

    def sees(self, guest: str) -> str:
        """Returns what the guest's programs find in its token."""
        more = {"HSMVISOR_PKCS11_ADDRESS": self.site.hosts[ITS_HOST].module(guest)}
        do = f"see {self.site.hosts[ITS_HOST].log}"
        found = run("pkcs11-tool", "--module", SHIM, "--list-objects", do=do, more=more, who=guest)
        return f"{guest} sees {found.count('Private Key Object')} private keys, {found.count('Certificate Object')} certificates"

    def lose(self) -> None:
        with step(f"{LATER} loses its attribute: what it had because of that is taken away"):
            do = f"see {self.site.manager.log}"
            with Watch(self.site.hosts[ITS_HOST], LATER, "tls", there=False) as watch:
                self.site.hsmvisor(ITS_HOST, "guest", "set", LATER, "--attribute", "role=mail")
                self.went = watch.wait(f"the key of {LATER} is taken away", do)
            say(f"its key is gone {self.went:.2f} s after that command began")
            said = self.sees(LATER)
            if f"{LATER} sees 0 private keys" not in said:
                raise StepFailed(said, do)
            say(said)

    def rotate(self) -> None:
        with step("Alice has all keys replaced while clients connect"):
            before = {guest: set(load.certificates) for guest, load in self.loads.items()}
            began = time.monotonic()
            self.site.tell("alice", "request", "rotate", "tls", "--wait")
            self.rotated = time.monotonic() - began
            what, do = "clients of all guests meet new certificates", f"see {self.place}/web-1/guest.log"
            wait_until(lambda: all(set(load.certificates) - before[guest] for guest, load in self.loads.items()), what, do, 60)
            served = time.monotonic() - began
            self.await_clients()
            say(f"all four serve new keys after {self.rotated:.1f} s, and all clients meet them after {served:.1f} s")
            for load in self.loads.values():
                load.stop()

    @property
    def done(self) -> int:
        return sum(load.done for load in self.loads.values())

    @property
    def failures(self) -> list[str]:
        return [f"{load.name}: {why}" for load in self.loads.values() for why in load.failures]

    def await_clients(self) -> None:
        """Until each guest's client has connected some more times."""
        counts = {guest: load.done + MET for guest, load in self.loads.items()}
        do = f"see {self.place}/web-1/nginx-error.log, and the others"
        wait_until(lambda: all(load.done >= counts[guest] for guest, load in self.loads.items()), "all clients have connected", do)

    def report(self) -> None:
        with step("What happened"):
            self.site.tell("operator", "fleet", "status")
            say(f"a guest that appeared had its key and certificate after {self.came:.2f} s, and lost them after {self.went:.2f} s")
            certificates = sum(len(load.certificates) for load in self.loads.values())
            say(f"TLS handshakes: {self.done}, failed: {len(self.failures)}; {certificates} certificates were met")
            if self.failures:
                raise StepFailed(f"failures, the first: {self.failures[0]}", f"see {self.place}/web-1/nginx-error.log")

    # ---- what comes then ----------------------------------------------------------------------------------------------

    def next_steps(self, kept: bool) -> list[str]:
        if not kept:
            return [
                "scripts/quickstart --fleet --keep     the same, left running for you to use",
                "control_domain/docs/fleet.md          operators, owners, auditors: what each does",
                "control_domain/docs/policy.md         who may have which key",
            ]
        manager, add = self.site.manager, "--owner alice --attribute role=web"
        hosts = {name: f"hsmvisor --host unix:{host.control}" for name, host in self.site.hosts.items()}
        console = [f"the console: {manager.console}     # log in with the token in {self.place}/console.token"] if CONSOLE else []
        return [
            *console,
            f"export PATH={BIN}:$PATH HSMVISOR_MANAGER=unix:{manager.control}     # as operator, who may ask for alice too",
            f"# as alice:  hsmvisor --manager 127.0.0.1:{manager.join_port} --manager-file {self.place}/alice.toml fleet whoami",
            "hsmvisor fleet status",
            "hsmvisor fleet events --follow &",
            "hsmvisor request show tls",
            "hsmvisor request rotate tls --wait",
            f"{hosts['host-1']} guest add web-6 {add}     # gets its key by itself",
            f"{hosts['host-2']} guest remove web-5",
            "hsmvisor fleet host distrust host-2     # its guests get nothing new",
            " ".join(self.websites["web-1"].curl(self.place / "roots.pem", DOMAIN)),
        ]
