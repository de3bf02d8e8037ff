"""What `hsmvisor doctor` finds of the HSMs of a host's configuration: never with a PIN, for a wrong one counts."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
from pathlib import Path

from hsmvisor.cli.finding import FAIL, OK, WARN, Finding
from hsmvisor.host.config import Hsm

_WITHIN = 10.0  #: seconds that a library has to tell its tokens
_INHERITED = ("PATH", "PYTHONPATH", "VIRTUAL_ENV", "LANG")


def examine(hsm: Hsm) -> Finding:
    """What comes first in the way of its use."""
    name = f"HSM {hsm.name}"
    if hsm.user and (missing := _lacks_user(hsm.user)):
        return Finding(name, FAIL, missing, f"adduser --system {hsm.user}")
    if not Path(hsm.library).is_file():
        return Finding(name, FAIL, f"no library {hsm.library}", "install the maker's PKCS#11 module, or mend hsms.library")
    for path in hsm.writes:
        if not Path(path).exists():
            return Finding(name, WARN, f"no {path}, which its library shall change", "make it, or mend hsms.writes")
    if not _there(hsm.pin_file):
        return Finding(name, FAIL, f"no PIN file {hsm.pin_file}", "one line with the user PIN, mode 600")
    return _token(name, hsm)


def _lacks_user(user: str) -> str:
    try:
        pwd.getpwnam(user)
    except KeyError:
        return f"there is no user {user}"
    return ""


def _there(path: str) -> bool:
    try:
        return Path(path).is_file()
    except PermissionError:
        return True  # as far as we may see


def _token(name: str, hsm: Hsm) -> Finding:
    environment = {key: os.environ[key] for key in _INHERITED if key in os.environ}
    environment |= dict(setting.split("=", 1) for setting in hsm.environment)
    user = pwd.getpwnam(hsm.user).pw_uid if hsm.user and os.geteuid() == 0 else None
    command = [sys.executable, "-m", "hsmvisor.cli.hsm_probe", hsm.library]
    try:
        done = subprocess.run(command, env=environment, user=user, capture_output=True, timeout=_WITHIN, check=False)
        found = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return Finding(name, FAIL, f"{hsm.library} tells no tokens within {_WITHIN:.0f} s", "is the HSM reachable?")
    except ValueError:
        return Finding(name, FAIL, f"{hsm.library} ended its process ({done.returncode})", "try it with pkcs11-tool -L")
    if isinstance(found, dict):
        return Finding(name, FAIL, f"{hsm.library}: {found.get('error')}", "try it with pkcs11-tool -L; see hsms.environment")
    if hsm.token not in found:
        there = ", ".join(map(repr, found)) or "none"
        return Finding(name, FAIL, f"no token {hsm.token!r}; there is {there}", "mend hsms.token, or see hsms.environment")
    if found.count(hsm.token) > 1:
        return Finding(name, FAIL, f"{found.count(hsm.token)} tokens are named {hsm.token!r}", "give each a label of its own")
    return Finding(name, OK, f"token {hsm.token!r} (the PIN is not tried)")
