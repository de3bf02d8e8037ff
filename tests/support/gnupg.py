"""GnuPG with gnupg-pkcs11-scd in place of its own smart-card daemon."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from support.guest import Guest

#: Answers whoever asks for a PIN (the Assuan protocol of pinentry).
_PINENTRY = """\
#!/bin/sh
echo "OK ready"
while read -r command rest; do
    case $command in
    GETPIN) echo "D {pin}"; echo OK ;;
    BYE) echo OK; exit 0 ;;
    *) echo OK ;;
    esac
done
"""


@dataclass(frozen=True)
class Gnupg:
    """A home of GnuPG's whose cards are the tokens of the guest's module; `pin` is what is asked for."""

    guest: Guest
    pin: str
    home: Path  #: short, for the sockets in it

    def __post_init__(self) -> None:
        pinentry = self.guest.write("pinentry", _PINENTRY.format(pin=self.pin))
        pinentry.chmod(0o700)
        library = f"providers hsmvisor\nprovider-hsmvisor-library {self.guest.library.path}\n"
        (self.home / "gnupg-pkcs11-scd.conf").write_text(library)
        agent = f"scdaemon-program /usr/bin/gnupg-pkcs11-scd\npinentry-program {pinentry}\n"
        (self.home / "gpg-agent.conf").write_text(agent)
        (self.home / "gpgsm.conf").write_text("disable-crl-checks\ndisable-dirmngr\n")

    def run(self, *command: str | Path, stdin: bytes = b"", check: bool = True) -> bytes:
        return self.guest.run(*command, stdin=stdin, check=check, more={"GNUPGHOME": str(self.home)}).stdout

    def learn(self) -> dict[str, str]:
        """Has the agent take note of the tokens' keys; returns their keygrips by the certificate's subject and token."""
        said = self.run("gpg-connect-agent", "LEARN --sendinfo", "/bye")
        assert said.rstrip().endswith(b"OK"), said
        told = self.run("gpg-connect-agent", "SCD LEARN", "/bye").decode().splitlines()
        rows = (line.split(maxsplit=3) for line in told if line.startswith("S KEY-FRIEDNLY"))
        return {row[3]: row[2] for row in rows}

    def end(self) -> None:
        self.run("gpgconf", "--kill", "all")
