"""The generated table of functions and mechanisms is that of the code, and complete."""

from __future__ import annotations

import re
import sys

import pytest
from hsmvisord import ck
from hsmvisord.crypto import mechanisms
from support.guest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "scripts"))

from benchlib import reference


def test_the_document_is_what_the_code_says() -> None:
    assert reference.DOCUMENT.read_text() == reference.text(), "run scripts/generate"


def test_it_names_everything() -> None:
    names = reference.functions()
    assert (
        len(names) == len(set(names)) and {"C_Initialize", "C_SignMessage", "C_EncapsulateKey"} <= set(names) and len(names) > 100
    )
    rows = re.findall(r"^\| (CKM_\w+)", reference.text(), re.MULTILINE)
    assert sorted(rows) == sorted(map(ck.mechanism_name, mechanisms.GUEST_TABLE))


@pytest.mark.parametrize("name", ["C_GenerateKeyPair", "C_WrapKey", "C_GetOperationState", "C_EncryptMessage", "C_AsyncJoin"])
def test_what_is_not_there_is_said(name: str) -> None:
    (row,) = re.findall(rf"^\| {name} \| (\w+)", reference.text(), re.MULTILINE)
    assert row.startswith("CKR_")


def test_the_clients_document_names_tests_that_there_are() -> None:
    directory = REPOSITORY / "tests/integration"
    named = set(re.findall(r"`(test_\w+\.py)`", (REPOSITORY / "control_domain/docs/clients.md").read_text()))
    assert named >= {path.name for path in directory.glob("test_client_*.py")}
    assert not [name for name in named if not (directory / name).exists()]
