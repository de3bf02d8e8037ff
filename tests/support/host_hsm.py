"""The HSM of a host's configuration (SoftHSM2 in its place), and what lies in it as its owner sees it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from support.softhsm import PIN, TOKEN, make_token

_LOOK = """
import json, sys, pkcs11
from pkcs11 import Attribute as A, ObjectClass
names = {A.SENSITIVE: "sensitive", A.EXTRACTABLE: "extractable", A.NEVER_EXTRACTABLE: "never_extractable", A.LOCAL: "local"}
token = pkcs11.lib(sys.argv[1]).get_token(token_label=sys.argv[2])
rows = []
with token.open(user_pin=sys.argv[3]) as session:
    for found in session.get_objects():
        row = {"class": found.object_class.name, "label": found[A.LABEL], "id": found[A.ID].hex()}
        if found.object_class in (ObjectClass.PRIVATE_KEY, ObjectClass.SECRET_KEY):
            row |= {"type": found[A.KEY_TYPE].name} | {name: found[a] for a, name in names.items()}
        rows.append(row)
print(json.dumps(rows))
"""

LOOKS = 5  #: SoftHSM2 passes over a token that another process is writing at the moment when it lists them


class HostHsm:
    """`directory` holds the token, its configuration and the file with its PIN."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.at, self.label = directory, make_token(directory), TOKEN
        self.library, self.pin_file, self.tokens = str(self.at.library), self.at.pin_file, directory / "tokens"
        self.environment = os.environ | self.at.environment

    def enter(self, pin: str = PIN) -> None:
        """Writes the PIN's file."""
        self.pin_file.write_text(f"{pin}\n")

    def settings(self, name: str = "rack", **changes: str) -> str:
        """The section of the host's configuration."""
        environment = ", ".join(f'"{key}={value}"' for key, value in self.at.environment.items())
        values = {
            "name": f'"{name}"',
            "library": f'"{self.library}"',
            "token": f'"{self.label}"',
            "pin_file": f'"{self.pin_file}"',
            "environment": f"[{environment}]",
            "writes": f'["{self.tokens}"]',
        }
        return "[[hsms]]\n" + "".join(f"{key} = {value}\n" for key, value in (values | changes).items())

    def objects(self) -> list[dict[str, Any]]:
        """All that is in the token, as its owner sees it who logs in."""
        command = [sys.executable, "-c", _LOOK, self.library, self.label, PIN]
        for _ in range(LOOKS):
            done = subprocess.run(command, env=self.environment, check=False, capture_output=True, text=True, timeout=30)
            if "NoSuchToken" not in done.stderr:
                break
        assert done.returncode == 0, done.stderr
        rows: list[dict[str, Any]] = json.loads(done.stdout)
        return rows

    def keys(self, module_id: bytes) -> list[dict[str, Any]]:
        """The keys of one module."""
        return [row for row in self.objects() if module_id.hex() in row["label"]]
