"""The contract of every source of storage keys, and what the file does beyond it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hsmvisord.keyprovider import tpm
from hsmvisord.keyprovider.keyfile import KEY_SIZE, SourceError
from hsmvisord.keyprovider.sources import KINDS, FileSource, KeySource
from hsmvisord.keyprovider.tpm import TpmSource
from support.tpm_rig import TpmProcess

Open = Callable[[], KeySource]


@pytest.fixture(scope="module")
def host_tpm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TpmProcess]:
    """A TPM of ours stands for the host's."""
    process = TpmProcess(tmp_path_factory.mktemp("tpm"))
    yield process
    process.close()


def of_tpm(process: TpmProcess, directory: Path, told: list[str] | None = None) -> TpmSource:
    said = [] if told is None else told
    return TpmSource(directory / "master.tpm", f"tcp:127.0.0.1:{process.port}", directory / "master.key", said.append)


@pytest.fixture(params=KINDS)
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Opens one and the same source of each kind."""
    if request.param == "file":
        return lambda: FileSource(tmp_path / "master.key")
    process = request.getfixturevalue("host_tpm")
    return lambda: of_tpm(process, tmp_path)


def test_a_storage_key_is_always_the_same_and_its_own(opened: Open) -> None:
    source = opened()
    keys = [source.derive(info) for info in (b"module 1", b"module 2", b"")]
    assert len(set(keys)) == 3 and {len(key) for key in keys} == {KEY_SIZE}
    assert [opened().derive(info) for info in (b"module 1", b"module 2", b"")] == keys


def test_nothing_that_is_printed_holds_a_key(opened: Open) -> None:
    source = opened()
    assert source.derive(b"x").hex() not in repr(source) and len(repr(source)) < 40


def test_derivation_is_rfc_5869(tmp_path: Path) -> None:
    """By hand: HMAC-SHA256 twice.  State that is stored must open with every later version."""
    import hashlib
    import hmac

    key = bytes(range(32))
    path = tmp_path / "master.key"
    path.write_bytes(key)
    path.chmod(0o600)
    extracted = hmac.new(bytes(32), key, hashlib.sha256).digest()
    assert FileSource(path).derive(b"info") == hmac.new(extracted, b"info\1", hashlib.sha256).digest()


@pytest.mark.parametrize(("mode", "size", "says"), [(0o640, 32, "others may read"), (0o600, 31, "31 bytes")])
def test_a_file_that_cannot_be_trusted_is_not_used(tmp_path: Path, mode: int, size: int, says: str) -> None:
    path = tmp_path / "master.key"
    path.write_bytes(bytes(size))
    path.chmod(mode)
    with pytest.raises(SourceError, match=says):
        FileSource(path)


def test_a_file_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    FileSource(tmp_path / "master.key")
    assert (tmp_path / "master.key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(SourceError, match="cannot be made"):
        FileSource(tmp_path / "none/master.key")


# ---- a TPM ----------------------------------------------------------------------------------------------------------------


def test_a_key_in_a_file_is_sealed(host_tpm: TpmProcess, tmp_path: Path) -> None:
    """State that was sealed with it opens as before; the file is not needed any more."""
    before = FileSource(tmp_path / "master.key").derive(b"module 1")
    told: list[str] = []
    assert of_tpm(host_tpm, tmp_path, told).derive(b"module 1") == before
    assert "take" in told[0] and str(tmp_path / "master.key") in told[0]
    key = (tmp_path / "master.key").read_bytes()
    (tmp_path / "master.key").unlink()
    sealed = tmp_path / "master.tpm"
    assert of_tpm(host_tpm, tmp_path, told).derive(b"module 1") == before and len(told) == 1
    assert sealed.stat().st_mode & 0o777 == 0o600
    assert not any(key[at : at + 16] in sealed.read_bytes() for at in range(17))


def test_one_without_a_file_is_made(host_tpm: TpmProcess, tmp_path: Path) -> None:
    told: list[str] = []
    of_tpm(host_tpm, tmp_path, told)
    assert "there is no copy of it" in told[0] and not (tmp_path / "master.key").exists()


def test_another_tpm_does_not_unseal_it(host_tpm: TpmProcess, tmp_path: Path) -> None:
    of_tpm(host_tpm, tmp_path)
    other = TpmProcess(tmp_path / "other")
    try:
        with pytest.raises(SourceError, match="another one sealed it, or it was cleared; put your copy of the master key"):
            of_tpm(other, tmp_path)
        of_tpm(host_tpm, tmp_path)
        other.run("tpm2_changeauth", "-c", "o", "a password")
        (tmp_path / "master.tpm").unlink()
        with pytest.raises(SourceError, match="its owner hierarchy has a password"):
            of_tpm(other, tmp_path)
    finally:
        other.close()


def test_one_that_was_cleared_does_not_either(tmp_path: Path) -> None:
    process = TpmProcess(tmp_path / "tpm")
    try:
        before = FileSource(tmp_path / "master.key").derive(b"x")
        of_tpm(process, tmp_path)
        process.run("tpm2_clear")
        with pytest.raises(SourceError, match="or it was cleared"):
            of_tpm(process, tmp_path)
        (tmp_path / "master.tpm").unlink()  # as the message says
        assert of_tpm(process, tmp_path).derive(b"x") == before
    finally:
        process.close()


def test_swtpm_does_too(tmp_path: Path) -> None:
    process = TpmProcess(tmp_path / "tpm", "swtpm")
    try:
        assert of_tpm(process, tmp_path).derive(b"x") == of_tpm(process, tmp_path).derive(b"x")
    finally:
        process.close()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: b"", "is no sealed master key"),
        (lambda data: b"x" + data[1:], "is no sealed master key"),
        (lambda data: data[:-1], "is no sealed master key"),
        (lambda data: data + b"x", "is no sealed master key"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "does not unseal"),
    ],
    ids=["empty", "another", "short", "long", "changed"],
)
def test_what_is_not_as_it_was_sealed(host_tpm: TpmProcess, tmp_path: Path, change: Callable[[bytes], bytes], says: str) -> None:
    of_tpm(host_tpm, tmp_path)
    path = tmp_path / "master.tpm"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(SourceError, match=says):
        of_tpm(host_tpm, tmp_path)


def test_others_may_not_read_it(host_tpm: TpmProcess, tmp_path: Path) -> None:
    of_tpm(host_tpm, tmp_path)
    (tmp_path / "master.tpm").chmod(0o640)
    with pytest.raises(SourceError, match="others may read"):
        of_tpm(host_tpm, tmp_path)


@pytest.mark.parametrize("device", ["/dev/none", "tcp:127.0.0.1", "tcp:127.0.0.1:1", "tcp:127.0.0.1:x", "/dev/null"])
def test_devices_that_are_no_tpm(tmp_path: Path, device: str) -> None:
    with pytest.raises(SourceError, match="the TPM"):
        TpmSource(tmp_path / "master.tpm", device, tmp_path / "master.key", lambda text: None)
    assert not (tmp_path / "master.tpm").exists()


def test_it_leaves_nothing_loaded(host_tpm: TpmProcess, tmp_path: Path) -> None:
    for _ in range(3):
        of_tpm(host_tpm, tmp_path)
    for kind in ("handles-transient", "handles-loaded-session"):
        assert host_tpm.run("tpm2_getcap", kind).stdout == b""
    assert tpm.DEVICE == "/dev/tpmrm0"
