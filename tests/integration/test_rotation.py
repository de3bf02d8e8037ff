"""Keys and certificates are replaced while guests use them, and no guest notices."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.guest import Library
from support.host import Module
from support.rotation import rotate_under_load

pytestmark = pytest.mark.real


@pytest.mark.slow
def test_twenty_rotations_under_load(library: Library, module: Module, tmp_path: Path) -> None:
    report = rotate_under_load(library, module, tmp_path, rotations=20, interval=1.0)
    print(report.summary())
    assert report.failed_handshakes == []
    assert report.failed_signatures == []
    assert report.wrong_signatures == 0
    assert report.foreign_certificates == 0
    assert report.generations_that_signed == 21
    assert report.certificates_seen >= 3, "nginx never took a new certificate"
    assert report.handshakes > 200 and report.signatures > 2000
