"""An external authority for tests: `python ca_program.py DIRECTORY issue|revoke`, as hsmvisor.manager.ca.command says.

A file `later` or `refuse` in the directory has it answer so, with what the file says.
"""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hsmvisor.manager.ca import names

PEM = serialization.Encoding.PEM


def _authority(directory: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    path = directory / "authority.pem"
    if not path.exists():
        key = ec.generate_private_key(ec.SECP256R1())
        made = _builder("external", "external", key.public_key()).add_extension(x509.BasicConstraints(True, None), True)
        private = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        path.write_bytes(private + made.sign(key, hashes.SHA256()).public_bytes(PEM))
    data = path.read_bytes()
    key_again = serialization.load_pem_private_key(data, None)
    assert isinstance(key_again, ec.EllipticCurvePrivateKey)
    return x509.load_pem_x509_certificates(data)[0], key_again


def _builder(subject: str, issuer: str, key: object, seconds: int = 86400) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key)  # type: ignore[arg-type]
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(seconds=seconds))
    )


def _issue(directory: Path, told: dict[str, object]) -> dict[str, object]:
    stored = directory / f"order-{told['order']}.json"
    if stored.exists():
        answer: dict[str, object] = json.loads(stored.read_text())
        return answer
    authority, key = _authority(directory)
    csr = x509.load_pem_x509_csr(str(told["csr"]).encode())
    wanted = names.parse_all(told["names"])  # type: ignore[arg-type]
    made = (
        _builder("leaf", "external", csr.public_key(), int(str(told["lifetime"])) or 86400)
        .add_extension(x509.SubjectAlternativeName(map(names.general, wanted)), False)
        .sign(key, hashes.SHA256())
    )
    answer = {"chain": [c.public_bytes(PEM).decode() for c in (authority, made)]}  # the wrong order: the manager mends it
    stored.write_text(json.dumps(answer))
    return answer


def main(directory: Path, verb: str) -> int:
    told = json.load(sys.stdin)
    if (later := directory / "later").exists():
        print(later.read_text())
        print("the signer is away", file=sys.stderr)
        return 75
    if (refuse := directory / "refuse").exists():
        print(refuse.read_text(), file=sys.stderr)
        return 1
    if verb == "revoke":
        x509.load_pem_x509_certificate(told["certificate"].encode())
        (directory / "revoked").write_text(told["reason"])
        print("{}")
        return 0
    print(json.dumps(_issue(directory, told)))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
