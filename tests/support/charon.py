"""strongSwan's IKE daemon, two of them in a network of their own; one has its key in a guest's module."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from support.guest import Guest, stop, wait_for

_PLUGINS = "random nonce openssl x509 revocation constraints pubkey pem pkcs1 kdf hmac socket-default kernel-netlink vici"


def section(name: str, **lines: str) -> str:
    """A section of a configuration of strongSwan's, each setting on a line of its own; one that is a section stands as it is."""
    return f"{name} {{\n" + "".join(f"{key} = {value}\n" if "{" not in value else value for key, value in lines.items()) + "}\n"


@dataclass(frozen=True)
class Network:
    """A network namespace with nothing but its loopback interface."""

    process: subprocess.Popen[bytes]

    @classmethod
    def make(cls, guest: Guest) -> Network:
        ready = guest.directory / "network"
        script = f"ip link set lo up && touch {ready} && exec sleep 120"
        process = guest.start("unshare", "--net", "sh", "-c", script, output=guest.directory / "network.log")
        network = cls(process)
        wait_for(lambda: process.poll() is not None or ready.exists(), "a network")
        assert process.poll() is None, (guest.directory / "network.log").read_text()
        return network

    def within(self) -> tuple[str, ...]:
        """What a command begins with that runs there."""
        return ("nsenter", f"--net=/proc/{self.process.pid}/ns/net")


@dataclass
class Charon:
    """One daemon; `port` is where it speaks IKE, with the marker of NAT traversal."""

    guest: Guest
    network: Network
    name: str
    port: int
    library: Path | None = None

    def __post_init__(self) -> None:
        self.directory = self.guest.directory / self.name
        for place in ("x509", "x509ca", "private"):
            (self.directory / place).mkdir(parents=True)
        self.log = self.directory / "log"
        modules = section("modules", hsmvisor=section("hsmvisor", path=str(self.library)))
        plugins = section(
            "plugins",
            vici=section("vici", socket=self._uri),
            **({"pkcs11": section("pkcs11", modules=modules)} if self.library else {}),
        )
        log = section("filelog", log=section("log", path=str(self.log), default="1"))
        load = _PLUGINS + (" pkcs11" if self.library else "")
        daemon = section("charon-systemd", port=str(self.port - 1), port_nat_t=str(self.port), load=load, plugins=plugins, log=log)
        tool = section("swanctl", load="pem pkcs1 x509 constraints pubkey openssl random")
        self._environment = {"STRONGSWAN_CONF": str(self.directory / "strongswan.conf"), "SWANCTL_DIR": str(self.directory)}
        (self.directory / "strongswan.conf").write_text(daemon + tool)

    @property
    def _uri(self) -> str:
        return f"unix://{self.directory}/vici"

    def start(self, connections: str) -> Charon:
        """`connections`: swanctl.conf."""
        (self.directory / "swanctl.conf").write_text(connections)
        command = (*self.network.within(), "charon-systemd")
        self._process = self.guest.start(*command, output=self.directory / "output", more=self._environment)
        wait_for(lambda: self._process.poll() is not None or self._answers(), "charon")
        assert self._process.poll() is None, self.log.read_text()
        self.swanctl("--load-all")
        return self

    def _answers(self) -> bool:
        return (self.directory / "vici").exists() and b"uptime" in self.swanctl("--stats", check=False)

    def swanctl(self, *arguments: str, check: bool = True) -> bytes:
        return self.guest.run("swanctl", *arguments, "--uri", self._uri, more=self._environment, check=check).stdout

    def stop(self) -> None:
        stop(self._process)
