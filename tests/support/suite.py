"""python-pkcs11's own test-suite, from the source distribution of the release that is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from support.guest import REPOSITORY

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
