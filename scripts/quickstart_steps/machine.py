"""The quickstart with a virtual machine: Debian in QEMU, whose module is a device that is plugged in while it runs.

The key that is renewed is made in the module, so nobody else knows it.  To be able to look for a key in the guest's memory, another
one is brought in by its owner.
"""

from __future__ import annotations

import base64
import contextlib
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from cryptography.hazmat.primitives.serialization import load_pem_private_key
from load import Handshakes
from processes import wait_until
from steps import ROOT, StepFailed, run, say, step
from tour import DOMAIN, MESSAGE, Tour
from website import curl

sys.path.insert(0, str(ROOT / "tests"))  # the tests' guest: there is no other

from qemu.qmp import QMPError
from support.accelerator import accelerator
from support.guest_machine import MEMORY, GuestMachine
from support.leaks import Needles
from support.machine_guest import ADDRESS, OURS, STOCK, GuestLibrary, engine

NGINX = """\
daemon off; worker_processes 2; error_log /root/nginx.log; pid /root/nginx.pid; user root;
env HSMVISOR_PKCS11_ADDRESS; env OPENSSL_CONF;
events { worker_connections 512; }
http { access_log off; server { listen 443 ssl; ssl_session_cache off; ssl_session_tickets off;
ssl_certificate /root/served.pem;
ssl_certificate_key "engine:pkcs11:pkcs11:token=web-1;object=tls;type=private";
location / { return 200 "signed by a module, served by a virtual machine\\n"; } } }
"""
DRIVER = "vmw_vsock_virtio_transport"  #: Linux' own
PIECE, OVERLAP = 16 << 20, 4096  #: bytes of the dump that are searched at a time, and again with the next ones
TRY_AGAIN = "run it again with --keep, and look at the machine"


class MachineTour(Tour):
    LIFETIME, LEAD = "2m", "100s"  # the machine may be slow

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        tempfile.tempdir = str(place)  # the machine's files are there too, and go with it
        self.machine = GuestMachine()
        self.port = 0

    def take(self) -> None:
        self.build()
        self.start()
        self.join()
        self.ask()
        self.bring()
        self.boot()
        self.attach()
        self.use_inside(STOCK, "Debian's own p11-kit-client.so")
        self.use_inside(OURS, "our library, libhsmvisor-pkcs11.so")
        load = self.serve()
        self.renew(load)
        self.search()
        self.report(load)

    def stop(self) -> None:
        if self.machine.running:
            for name, where in (("nginx.log", "nginx-error.log"), ("nginx.out", "nginx.log"), ("guest.log", "guest.log")):
                with contextlib.suppress(AssertionError, OSError):
                    self.machine.copy_out(f"/root/{name}", self.website.directory / where)
        if self.machine.console.exists():
            shutil.copy(self.machine.console, self.place / "console.log")
        self.machine.close()
        super().stop()

    def guest(
        self, *command: str, do: str = TRY_AGAIN, more: dict[str, str] | None = None, show: bool = True, code: int = 0
    ) -> str:
        """Runs a program of the guest; `do` is said if it fails."""
        if show:
            say("guest$ " + shlex.join(command))
        try:
            done = self.machine.run(command, more=more, timeout=60, check=False)
        except (AssertionError, OSError) as error:
            raise StepFailed(f"{command[0]} in the guest: {error}", do) from None
        said = (done.stdout + done.stderr).decode(errors="replace")
        if done.returncode != code:
            raise StepFailed(f"{shlex.join(command)} ended with {done.returncode} in the guest:\n{said}", do)
        return said

    # ---- steps ------------------------------------------------------------------------------------------------------

    def build(self) -> None:
        with step("Build the guest: Debian's packages and our library; no key, secret or address"):
            command, told = [ROOT / "scripts/guest-image"], []
            with subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            ) as process:
                assert process.stdout is not None and process.stderr is not None
                for line in process.stderr:
                    told.append(line)
                    say(line.rstrip().removeprefix("guest-image: "))
                made = process.stdout.read().strip()
            if process.returncode:
                why = "".join(told[-20:]) or f"it ended with {process.returncode}"
                raise StepFailed(why, "mend what it says; scripts/guest-image builds it alone")
            say(f"{made.removeprefix(f'{ROOT}/')} (nothing that a guest writes gets into it)")
            how = accelerator(Path(made))
            say(f"QEMU emulates its processor here ({how})" if how == "tcg" else f"QEMU runs it by {how}")

    def bring(self) -> None:
        with step("Alice brings a second key, RSA-2048: it is sealed to the fleet's issuer, and by that to the module"):
            self.site.hsmvisor("host-1", "material", "generate-test", self.place / "rsa", "--type", "rsa-2048", show=False)
            asked = ("--select", "role=web", "--source", "imported", "--key-type", "RSA-2048", "--usage", "any", "--bare")
            self.site.tell("alice", "request", "apply", "rsa", *asked)
            self.site.tell("alice", "request", "import", "rsa", "--key-file", "rsa/key.pem", "--wait")

    def boot(self) -> None:
        with step("Boot it in QEMU, without any device of ours"):
            try:
                self.machine.boot()
            except (AssertionError, OSError, QMPError) as error:
                do = f"mend what it says; it needs {MEMORY} MiB of memory, and some of a processor's time"
                raise StepFailed(f"the machine did not start: {error}", do) from None
            kernel = self.guest("uname", "-sr", show=False).strip()
            say(f"{kernel} is up, {self.machine.boot_seconds:.1f} s after QEMU's start")
            say("for a module QEMU was given shared memory, a free root port and a QMP socket;")
            say("hsmvisor module qemu-args web-1 --check 'COMMAND LINE' tells what one of yours lacks")
            if "web-1" in self.tool(STOCK, "--list-slots", code=None):
                raise StepFailed("the guest has the module before it was plugged in", TRY_AGAIN)
            say("it sees no module")

    def attach(self) -> None:
        with step("Plug the module into the running guest"):
            self.site.tell("host-1", "module", "attach", "web-1", "--qmp", self.machine.qmp_socket)
            wait_until(
                lambda: "web-1" in self.tool(STOCK, "--list-slots", code=None, show=False), "the guest sees the module", TRY_AGAIN
            )
            self.guest("ls", f"/sys/bus/virtio/drivers/{DRIVER}", do="look at the guest's kernel: " + TRY_AGAIN)
            say("the guest sees it, by its own kernel's driver")

    def tool(self, library: GuestLibrary, *arguments: str, show: bool = True, code: int | None = 0) -> str:
        command = ("pkcs11-tool", "--module", library.path, *arguments)
        if show:
            say(f"guest$ {library.variable}={shlex.quote(ADDRESS)} {shlex.join(command)}")
        if code is None:
            command = ("sh", "-c", shlex.join(command) + " || true")
        return self.guest(*command, more=library.environment, show=False)

    def use_inside(self, library: GuestLibrary, name: str) -> None:
        with step(f"Use its keys in the guest, through {name}"):
            listed = self.tool(library, "--list-objects")
            keys, certificates = listed.count("Private Key Object"), listed.count("Certificate Object")
            say(f"the guest sees {keys} private keys and {certificates} certificates")
            message, signature = self.place / "message", self.place / "signature"
            message.write_bytes(MESSAGE)
            self.machine.copy_in(message, "/root/message")
            where = ("--id", self.key_id("rsa"), "--input-file", "/root/message", "--output-file", "/root/signature")
            self.tool(library, "--sign", "--mechanism", "SHA256-RSA-PKCS", *where)
            self.machine.copy_out("/root/signature", signature)
            do, public = f"see {self.host.log}", self.place / "public.pem"
            run("openssl", "pkey", "-in", self.place / "rsa/key.pem", "-pubout", "-out", public, do=do, show=False)
            run("openssl", "dgst", "-sha256", "-verify", public, "-signature", signature, message, do=do, show=False)
            say("openssl verifies that signature on the host")
            request = ("openssl", "req", "-new", "-engine", "pkcs11", "-keyform", "engine", "-subj", "/CN=web-1")
            uri = "pkcs11:token=web-1;object=tls;type=private"
            self.guest(*request, "-key", uri, "-verify", "-noout", more=engine(self.machine, library))
            say("openssl of the guest signed a certificate request with the module's key and verified it")

    def key_id(self, material: str) -> str:
        found = self.site.query("host-1", "material", "show", "web-1", material)
        return base64.b64decode(next(g["id"] for g in found["generations"] if g["state"] == "current")).hex()

    def serve(self) -> Handshakes:
        with step("Serve TLS from the guest by nginx: the private key is in the module, hsmvisor-guest keeps the certificate file"):
            more = engine(self.machine, OURS)
            sync = ("hsmvisor-guest", "sync", "--label", "tls", "--chain", "--out", "/root/served.pem")
            self.guest(*sync, "--once", more=more)
            self.machine.write("/root/nginx.conf", NGINX)
            self.machine.start(["nginx", "-c", "/root/nginx.conf"], output="/root/nginx.out", more=more)
            pid = "test -s /root/nginx.pid"
            do = f"see {self.website.logs[1]}"
            wait_until(lambda: self.machine.run(pid, check=False).returncode == 0, "nginx serves", do)
            self.machine.start([*sync, "--reload", "kill -HUP $(cat /root/nginx.pid)"], output="/root/guest.log", more=more)
            self.port = self.machine.forward(443)
            return self.handshakes(self.port, do)

    def search(self) -> None:
        with step("Search the guest's memory for the key that was brought: the others nobody knows but the module"):
            key = load_pem_private_key((self.place / "rsa/key.pem").read_bytes(), None)
            dump = self.place / "memory"
            self.machine.dump_memory(dump)
            needles = Needles([key])  # type: ignore[list-item]
            found: set[str] = set()
            with dump.open("rb") as file:
                while piece := file.read(PIECE):
                    found |= needles.found_in(piece)
                    if len(piece) == PIECE:
                        file.seek(-OVERLAP, 1)
            size = dump.stat().st_size >> 20
            dump.unlink()
            if found:
                raise StepFailed(
                    f"the guest's memory has {', '.join(sorted(found))}",
                    "do not use this release with keys of yours, and report it",
                )
            say(f"any 16 bytes of it: none in the {size} MiB of the guest's memory")
            try:
                found = needles.in_process(int(self.site.query("host-1", "module", "show", "web-1")["pid"]))
            except PermissionError:
                say("(only root may look into the worker, where the same search finds it)")
                return
            if not found:
                raise StepFailed("the search finds nothing in the module's worker, so it shows nothing", TRY_AGAIN)
            say("the same search finds it in the module's worker, on the host")

    def next_steps(self, kept: bool) -> list[str]:
        if not kept:
            return [
                "scripts/quickstart --vm --keep     the same, left running for you to use",
                "control_domain/docs/qemu.md        your own guests: QEMU's options, libvirt, AppArmor",
                ".venv/bin/hsmvisor doctor          is this machine ready to be a host?",
            ]
        return [
            *self.exports(),
            "hsmvisor request show tls                # renewed on and on; each generation",
            "hsmvisor request rotate tls --wait       # a new key now",
            "hsmvisor module show web-1",
            " ".join(curl("web-1", DOMAIN, self.port, self.place / "roots.pem")),
            "hsmvisor module detach web-1             # the guest's nginx can sign no more",
            f"hsmvisor module attach web-1 --qmp {self.machine.qmp_socket}     # and now it can again",
        ]
