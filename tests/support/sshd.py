"""An SSH server of a test's own: loopback, an unprivileged port, its own host key and configuration."""

from __future__ import annotations

import os
import pwd
from dataclasses import dataclass
from pathlib import Path

from support.guest import Guest, free_port, listens, stop, wait_for


@dataclass
class Sshd:
    guest: Guest
    authorized: bytes  #: the authorized_keys file

    def __post_init__(self) -> None:
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd as root separates privileges there (sshd(8), FILES)
        self.port, self.user = free_port(), pwd.getpwuid(os.geteuid()).pw_name
        self.guest.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "host_key")
        keys = self.guest.write("authorized_keys", self.authorized)
        config = (
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.guest.directory}/host_key\nAuthorizedKeysFile {keys}\n"
            "StrictModes no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\n"
            f"UsePAM no\nPidFile none\nLogLevel VERBOSE\nSubsystem sftp internal-sftp\n"
        )
        self.log = self.guest.directory / "sshd.log"
        self._process = self.guest.start(
            "/usr/sbin/sshd", "-D", "-e", "-f", self.guest.write("sshd_config", config), output=self.log
        )
        host_key = (self.guest.directory / "host_key.pub").read_text()
        self.guest.write("known_hosts", f"[127.0.0.1]:{self.port} {host_key}")
        wait_for(lambda: self._process.poll() is not None or listens(self.port), "sshd")
        assert self._process.poll() is None, self.log.read_text()

    def command(self, *arguments: str, agent: str = "", asks: bool = False) -> list[str | Path]:
        """The ssh command of a guest whose keys are in its module and nowhere else.

        `agent`: the socket of one that has them.  `asks`: whether ssh may ask for a PIN.
        """
        known = self.guest.directory / "known_hosts"
        options = [
            f"IdentityAgent={agent}" if agent else f"PKCS11Provider={self.guest.library.path}",
            *([] if agent else ["IdentityAgent=none"]),
            f"UserKnownHostsFile={known}",
            "StrictHostKeyChecking=yes",
            "PreferredAuthentications=publickey",
            f"BatchMode={'no' if asks else 'yes'}",
        ]
        flags = [part for option in options for part in ("-o", option)]
        return ["ssh", "-F", "none", *flags, "-p", str(self.port), f"{self.user}@127.0.0.1", *arguments]

    def stop(self) -> None:
        stop(self._process)
