"""python-pkcs11's own test-suite through our library, as far as delivered keys go.

python_pkcs11_not_yet.txt names every test that does not pass yet, under what it waits for.  A test that begins to pass has to leave
the list, and one that stops passing is a failure.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from support.guest import Guest, library
from support.host import Module
from support.suite import directory

NOT_YET = Path(__file__).parent / "python_pkcs11_not_yet.txt"


def listed() -> set[str]:
    lines = (line.strip() for line in NOT_YET.read_text().splitlines())
    return {line for line in lines if line and not line.startswith("#")}


def test_python_pkcs11_suite(module: Module, tmp_path: Path) -> None:
    guest = Guest(library("ours"), module.address, tmp_path)
    suite = directory()
    variables = {"PKCS11_MODULE": str(guest.library.path), "PKCS11_TOKEN_LABEL": module.name, "PKCS11_TOKEN_PIN": "1234"}
    variables["PYTHONPATH"] = str(suite)
    command = [sys.executable, "-m", "pytest", "-v", "--tb=no", "-p", "no:cacheprovider", "-p", "no:timeout", suite / "tests"]
    said = guest.run(*command, "--rootdir", suite, "-c", "/dev/null", check=False, timeout=100, more=variables).stdout.decode()
    results = dict(re.findall(r"(test_\w+\.py::\w+::\w+(?:\[.*?\])?)\s+(PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)", said))
    assert len(results) > 140, said[-2000:]
    passed = {name for name, result in results.items() if result in ("PASSED", "XFAIL")}
    assert set(results) - passed == listed() & set(results)
    assert not listed() - set(results), "the list names tests that the suite does not have"
