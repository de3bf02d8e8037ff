"""Rotations with client and server inside a virtual machine: nginx, TLS clients and a signer that follows; what came of it."""

from __future__ import annotations

import base64
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace

from support.guest import REPOSITORY, wait_for
from support.guest_machine import GuestMachine
from support.host import Module
from support.load import Made
from support.machine_guest import OURS, GuestLibrary, MachineLoad, MachineSigner, engine
from support.rotation import WITHIN, Report, Rotator, report_of

PORT = 8443
CLIENT = REPOSITORY / "tests/integration/programs/handshake_on.py"
_NGINX = """\
daemon off; worker_processes 2; error_log {directory}/nginx.log; pid {directory}/nginx.pid; user root;
env {variable}; env OPENSSL_CONF;
events {{ }}
http {{ access_log off; ssl_session_cache off; ssl_session_tickets off;
server {{ listen 127.0.0.1:{port} ssl; ssl_certificate {directory}/web.pem;
ssl_certificate_key "engine:pkcs11:pkcs11:object=web;type=private"; location / {{ return 200 "$pid\\n"; }} }} }}
"""


@dataclass(frozen=True)
class Clock:
    """Where the machine's CLOCK_MONOTONIC is on ours."""

    offset: float
    uncertain: float  #: seconds, at most, to either side

    @classmethod
    def of(cls, machine: GuestMachine) -> Clock:
        def once() -> Clock:
            before = time.monotonic()
            there = float(machine.read("/proc/uptime").split()[0])  # in hundredths
            after = time.monotonic()
            return cls((before + after) / 2 - there, (after - before) / 2 + 0.01)

        return min((once() for _ in range(10)), key=lambda clock: clock.uncertain)

    def here(self, made: Made) -> Made:
        """With times that are ours, and that enclose when it was made."""
        return replace(made, began=made.began + self.offset - self.uncertain, ended=made.ended + self.offset + self.uncertain)


def rotate_in_machine(library: GuestLibrary, machine: GuestMachine, module: Module, rotations: int, interval: float) -> Report:
    """`web` (pinned) is served by nginx to clients of the same machine, `requests` (follow) signs; both are rotated."""
    rotator, directory = Rotator(module, ["web", "requests"]), f"/root/rotation-{library.name}"
    rotator.rotate()
    machine.run(["mkdir", "-p", directory])
    machine.write(f"{directory}/root.pem", rotator.authority.root_pem)
    config = _NGINX.format(directory=directory, variable=library.variable, port=PORT)
    machine.write(f"{directory}/nginx.conf", config)
    reload = f"echo reload >>{directory}/reloads; test ! -e {directory}/nginx.pid || kill -HUP $(cat {directory}/nginx.pid)"
    sync = ["hsmvisor-guest", "sync", "--label", "web", "--out", f"{directory}/web.pem", "--chain", "--reload", reload]
    with ExitStack() as stack:
        keeper = machine.start(sync, output=f"{directory}/keeper.log", more=OURS.environment)
        stack.callback(keeper.stop)
        wait_for(lambda: machine.run(["test", "-e", f"{directory}/web.pem"], check=False).returncode == 0, "the certificate", 60)
        server = machine.start(
            ["nginx", "-c", f"{directory}/nginx.conf"], output=f"{directory}/nginx.out", more=engine(machine, library)
        )
        stack.callback(server.stop)
        wait_for(lambda: machine.run(["test", "-e", f"{directory}/nginx.pid"], check=False).returncode == 0, "nginx", 60)
        time.sleep(1)
        client = MachineLoad(machine, f"client-{library.name}", CLIENT, PORT, f"{directory}/root.pem", 2)
        signer = MachineSigner(machine, library, "requests", f"follower-{library.name}")
        wait_for(lambda: len(client.lines()) > 5 and len(signer.lines()) > 20, "handshakes and signatures", 60)
        clock, connections = Clock.of(machine), 0
        for _ in range(rotations):
            rotator.rotate()
            connections = max(connections, module.status().connections)
            time.sleep(interval)
        last = base64.b64encode(rotator.activations["web"][-1].leaf).decode()
        wait_for(lambda: last in client.tail(), "nginx to serve the last certificate", WITHIN)
        client.end()
        made = [clock.here(one) for one in signer.stop()]
    lines = client.lines()
    done = [(ended, base64.b64decode(leaf)) for ended, leaf, *errors in lines if not errors]
    failed = [str(errors[0]) for _, _, *errors in lines if errors]
    report = report_of(rotations, done, failed, made, rotator.activations, clock.uncertain)
    report.reloads = len(machine.run(["cat", f"{directory}/reloads"]).stdout.splitlines())
    report.connections = connections
    return report
