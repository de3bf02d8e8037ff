"""The built-in authority: a root and an intermediate of its own, what it issued in the manager's database.

For a first run, for tests, and for fleets that trust nobody else.  An order is issued once: its certificate stands in the database
before it is given out.
"""

from __future__ import annotations

import asyncio
import datetime
import time
from collections.abc import Callable, Mapping
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hsmvisor.manager.ca.builtin import issuance, lint, revocation
from hsmvisor.manager.ca.builtin.issuance import Issuer
from hsmvisor.manager.ca.builtin.keys import INTERMEDIATE, ROOT, KeyStore, NoKey
from hsmvisor.manager.ca.builtin.profiles import DAY, PROFILES, Profile
from hsmvisor.manager.ca.builtin.revocation import Revoked
from hsmvisor.manager.ca.interface import Issued, Keep, Later, Order, Reason, Refused, Window
from hsmvisor.manager.store.database import Database, DatabaseError, IntegrityError
from hsmvisor.manager.store.tables import authorities, certificates
from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

ROOT_LIFETIME = 20 * 365 * DAY
INTERMEDIATE_LIFETIME = 5 * 365 * DAY


class BuiltinCa:
    kind = "builtin"

    def __init__(
        self,
        name: str,
        issuer: Issuer,
        root: bytes,
        database: Database,
        profiles: Mapping[str, Profile],
        clock: Callable[[], float],
    ) -> None:
        """As `open_authority` does it."""
        self.name, self._issuer, self.root, self._database = name, issuer, root, database
        self._profiles, self._clock = profiles, clock

    @property
    def intermediate(self) -> bytes:
        return self._issuer.certificate.public_bytes(Encoding.DER)

    async def issue(self, order: Order, keep: Keep) -> Issued:
        profile = self._profiles.get(order.profile)
        if profile is None:
            raise Refused(f"there is no profile {order.profile!r}: there are {', '.join(sorted(self._profiles))}")
        try:
            return Issued((await self._issued(order, profile), self.intermediate))
        except (DatabaseError, NoKey) as error:
            raise Later(str(error)) from None

    async def _issued(self, order: Order, profile: Profile) -> bytes:
        if (earlier := await self._of_order(order)) is not None:
            return earlier
        prepared = issuance.prepare(order, profile, self._issuer, int(self._clock()))
        made = await asyncio.to_thread(issuance.issue, prepared, self._issuer)
        der = made.public_bytes(Encoding.DER)
        row = {
            "authority": self.name,
            "order_id": order.id,
            "serial": f"{prepared.serial:x}",
            "profile": profile.name,
            "names": "\n".join(map(str, order.names)),
            "der": der,
            "not_before": prepared.not_before,
            "not_after": prepared.not_after,
            "revoked_at": 0,
            "reason": "",
        }
        try:
            async with self._database.transaction() as connection:
                await connection.execute(insert(certificates).values(row))
        except IntegrityError:  # another manager was quicker
            earlier = await self._of_order(order)
            if earlier is None:
                raise Later("two certificates got one serial number") from None
            return earlier
        return der

    async def _of_order(self, order: Order) -> bytes | None:
        """Returns what was issued for it.  Raises Refused: for another request."""
        mine = (certificates.c.authority == self.name, certificates.c.order_id == order.id)
        async with self._database.transaction() as connection:
            found = (await connection.execute(select(certificates.c.der).where(*mine))).scalar_one_or_none()
        if found is None:
            return None
        asked = x509.load_der_x509_csr(order.csr).public_key()
        if x509.load_der_x509_certificate(found).public_key() != asked:
            raise Refused("this order was issued for another key")
        return bytes(found)

    async def revoke(self, certificate: bytes, reason: Reason) -> None:
        serial = x509.load_der_x509_certificate(certificate).serial_number
        mine = (certificates.c.authority == self.name, certificates.c.serial == f"{serial:x}", certificates.c.der == certificate)
        try:
            async with self._database.transaction() as connection:
                row = (await connection.execute(select(certificates.c.revoked_at).where(*mine))).one_or_none()
                if row is None:
                    raise Refused("this certificate is none of this authority's")
                if not row.revoked_at:
                    told = {"revoked_at": int(self._clock()), "reason": str(reason)}
                    await connection.execute(update(certificates).where(*mine).values(told))
        except DatabaseError as error:
            raise Later(str(error)) from None

    async def window(self, certificate: bytes) -> Window | None:
        return None

    async def close(self) -> None:
        return

    # ---- what others ask -----------------------------------------------------------------------------------------

    async def revocation_list(self) -> bytes:
        """Returns a new CRL, DER.  Raises Later."""
        try:
            async with self._database.transaction() as connection:
                number = await self._next_number(connection)
                columns = (certificates.c.serial, certificates.c.revoked_at, certificates.c.reason)
                # one stands in a list that was made after its end (RFC 5280, 3.3), and in none after that
                ended = int(self._clock()) - 2 * revocation.CRL_SECONDS
                mine = (certificates.c.authority == self.name, certificates.c.revoked_at > 0)
                chosen = select(*columns).where(*mine, certificates.c.not_after > ended)
                rows = (await connection.execute(chosen.order_by(certificates.c.id))).all()
            revoked = [_revoked(row) for row in rows]
            return await asyncio.to_thread(revocation.revocation_list, self._issuer, revoked, number, int(self._clock()))
        except (DatabaseError, NoKey) as error:
            raise Later(str(error)) from None

    async def _next_number(self, connection: AsyncConnection) -> int:
        mine = authorities.c.name == self.name
        await connection.execute(update(authorities).where(mine).values(crl_number=authorities.c.crl_number + 1))
        return int((await connection.execute(select(authorities.c.crl_number).where(mine))).scalar_one())

    async def ocsp(self, untrusted: bytes) -> bytes:
        """Returns the answer to an OCSP request, DER.  Raises Later."""
        question = revocation.asked(untrusted, self._issuer)
        if question is None:
            return revocation.malformed()
        mine = (certificates.c.authority == self.name, certificates.c.serial == f"{question.serial:x}")
        try:
            async with self._database.transaction() as connection:
                row = (await connection.execute(select(certificates).where(*mine))).one_or_none()
            if row is None:
                return revocation.unauthorized()
            revoked = _revoked(row) if row.revoked_at else None
            made, now = x509.load_der_x509_certificate(row.der), int(self._clock())
            return await asyncio.to_thread(revocation.answer, self._issuer, question, made, revoked, now)
        except (DatabaseError, NoKey) as error:
            raise Later(str(error)) from None


def _revoked(row: Any) -> Revoked:
    return Revoked(int(row.serial, 16), row.revoked_at, Reason(row.reason))


# ---- beginning ----------------------------------------------------------------------------------------------------------


async def open_authority(
    name: str,
    keys: KeyStore,
    database: Database,
    profiles: Mapping[str, Profile] = PROFILES,
    crl_url: str = "",
    ocsp_url: str = "",
    clock: Callable[[], float] = time.time,
) -> BuiltinCa:
    """Opens the authority of that name, or begins it.  Raises NoKey, DatabaseError."""
    async with database.transaction() as connection:
        row = (await connection.execute(select(authorities).where(authorities.c.name == name))).one_or_none()
    if row is None:
        row = await _begin(name, keys, database, int(clock()))
    key = await asyncio.to_thread(keys.key, INTERMEDIATE, False)
    certificate = x509.load_der_x509_certificate(row.intermediate)
    if certificate.public_key() != key.public_key():
        raise NoKey(f"the key of authority {name} is not that of its certificate: restore the right one")
    return BuiltinCa(name, Issuer(certificate, key, crl_url, ocsp_url), row.root, database, profiles, clock)


async def _begin(name: str, keys: KeyStore, database: Database, now: int) -> Any:
    """Two managers that begin at once: one's certificates are kept."""
    root_key, key = [await asyncio.to_thread(keys.key, which, True) for which in (ROOT, INTERMEDIATE)]
    root = await asyncio.to_thread(_authority, f"{name} root", root_key, None, root_key, now, ROOT_LIFETIME)
    intermediate = await asyncio.to_thread(_authority, f"{name} issuing", key, root, root_key, now, INTERMEDIATE_LIFETIME)
    row = {
        "name": name,
        "root": root.public_bytes(Encoding.DER),
        "intermediate": intermediate.public_bytes(Encoding.DER),
        "made_at": now,
        "crl_number": 0,
    }
    try:
        async with database.transaction() as connection:
            await connection.execute(insert(authorities).values(row))
    except IntegrityError:
        pass
    async with database.transaction() as connection:
        return (await connection.execute(select(authorities).where(authorities.c.name == name))).one()


def _authority(
    common_name: str,
    key: ec.EllipticCurvePrivateKey,
    parent: x509.Certificate | None,
    parent_key: ec.EllipticCurvePrivateKey,
    now: int,
    lifetime: int,
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])
    begin = datetime.datetime.fromtimestamp(now - issuance.BACKDATED, datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(parent.subject if parent else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + datetime.timedelta(seconds=lifetime))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0 if parent else 1), True)
        .add_extension(_SIGNS, True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
    )
    if parent is not None:
        own = parent.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        builder = builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own), False)
    made = builder.sign(parent_key, hashes.SHA384())
    if wrong := lint.findings(made.public_bytes(Encoding.DER)):
        raise ValueError(f"an authority's certificate that is not well made: {'; '.join(wrong)}")
    return made


_SIGNS = x509.KeyUsage(
    digital_signature=True,  # OCSP answers
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)
