"""python-pkcs11's own test-suite, from the source distribution of the release that is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from support.guest import REPOSITORY, Guest

_CACHE = REPOSITORY / ".cache/python-pkcs11"


def directory() -> Path:
    """Returns the directory that holds `tests` alone (beside it stands a `pkcs11` that is not built); fetches it once."""
    release = version("python-pkcs11")
    place = _CACHE / release
    if not (place / "tests").exists():
        place.mkdir(parents=True, exist_ok=True)
        requirement = f"python-pkcs11=={release}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "python-pkcs11"]
        subprocess.run([*command, "--dest", str(_CACHE), requirement], check=True, capture_output=True)
        (archive,) = _CACHE.glob(f"*{release}.tar.gz")
        shutil.unpack_archive(archive, _CACHE)
        (_CACHE / f"python_pkcs11-{release}/tests").rename(place / "tests")
    return place


def run(guest: Guest, library: Path, token: str, pin: str, so_pin: str = "", timeout: float = 100, **more: str) -> dict[str, str]:
    """Returns what pytest says of each test of the suite, run with the token of a library.

    With a library whose name ends as that of SoftHSM2, the suite runs the tests that it has for that alone, too.
    """
    suite = directory()
    variables = {"PKCS11_MODULE": str(library), "PKCS11_TOKEN_LABEL": token, "PKCS11_TOKEN_PIN": pin, "PYTHONPATH": str(suite)}
    variables |= ({"PKCS11_TOKEN_SO_PIN": so_pin} if so_pin else {}) | more
    command = [sys.executable, "-m", "pytest", "-v", "--tb=no", "-p", "no:cacheprovider", "-p", "no:timeout", suite / "tests"]
    said = guest.run(*command, "--rootdir", suite, "-c", "/dev/null", check=False, timeout=timeout, more=variables).stdout.decode()
    return results(said)


def results(said: str) -> dict[str, str]:
    """Returns what pytest said of each test."""
    found = dict(re.findall(r"(test_\w+\.py::\w+::\w+(?:\[.*?\])?)\s+(PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)", said))
    assert len(found) > 140, said[-2000:]
    return found


def passed(results: dict[str, str]) -> set[str]:
    return {name for name, result in results.items() if result in ("PASSED", "XFAIL")}
