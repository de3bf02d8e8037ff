"""Orders of certificates, as the manager gives them to an authority."""

from __future__ import annotations

from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from hsmvisor.manager.ca import names
from hsmvisor.manager.ca.interface import Order
from support.certificates import PrivateKey


def order(key: PrivateKey, *texts: str, id: str = "1", csr_names: tuple[str, ...] | None = None, **more: Any) -> Order:
    told = names.parse_all(texts or ("web.example.net",))
    asked = told if csr_names is None else tuple(map(names.parse, csr_names))
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if asked:
        builder = builder.add_extension(x509.SubjectAlternativeName(map(names.general, asked)), False)
    algorithm = None if type(key).__name__.startswith("Ed") else hashes.SHA256()
    csr = builder.sign(key, algorithm).public_bytes(serialization.Encoding.DER)  # type: ignore[arg-type]
    return Order(id, csr, more.pop("profile", "server"), told, **more)
