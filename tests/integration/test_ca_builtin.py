"""The built-in authority: profiles, linting, revocation lists and OCSP as OpenSSL reads them, restarts, two managers at once."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from hsmvisor.manager.ca import names
from hsmvisor.manager.ca.builtin import issuance, lint
from hsmvisor.manager.ca.builtin.authority import INTERMEDIATE_LIFETIME, BuiltinCa, open_authority
from hsmvisor.manager.ca.builtin.issuance import Issuer
from hsmvisor.manager.ca.builtin.keys import FileKeys, NoKey
from hsmvisor.manager.ca.builtin.profiles import PROFILES
from hsmvisor.manager.ca.builtin.revocation import MAX_OCSP
from hsmvisor.manager.ca.interface import Order, Reason, Refused
from hsmvisor.manager.store import tables
from hsmvisor.manager.store.database import Database, DatabaseError
from sqlalchemy import inspect
from support.certificates import new_key
from support.orders import order

Story = Callable[[BuiltinCa], Awaitable[None]]


@contextlib.asynccontextmanager
async def authority(directory: Path, now: float | None = None, **urls: str) -> AsyncIterator[BuiltinCa]:
    database = Database(f"sqlite:///{directory}/fleet.db")
    await database.migrate()
    clock = {} if now is None else {"clock": lambda: now}
    try:
        yield await open_authority("fleet", FileKeys(directory / "keys"), database, **urls, **clock)  # type: ignore[arg-type]
    finally:
        await database.close()


async def keep(text: str) -> None:
    return


async def leaf(ca: BuiltinCa, wanted: Order) -> x509.Certificate:
    return x509.load_der_x509_certificate((await ca.issue(wanted, keep)).chain[0])


def pem(path: Path, *certificates: bytes) -> Path:
    path.write_bytes(b"".join(x509.load_der_x509_certificate(c).public_bytes(Encoding.PEM) for c in certificates))
    return path


def openssl(*arguments: str | Path, status: int = 0) -> str:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


# ---- profiles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda profile: profile.name)
def test_lifetimes_at_the_limit_and_one_past(tmp_path: Path, profile: object) -> None:
    row = PROFILES[profile.name]  # type: ignore[attr-defined]
    told = {"dns": "web.example.net", "email": "a@example.net"}[row.kinds[0] if row.kinds[0] in ("dns", "email") else "dns"]
    if row.kinds[0] == "uri":
        told = "dns:web.example.net"
    text = f"email:{told}" if row.kinds[0] == "email" else told

    async def story() -> None:
        async with authority(tmp_path, now=1_800_000_000) as ca:
            for number, seconds in enumerate((row.shortest, row.longest)):
                made = await leaf(ca, order(new_key("p256"), text, id=str(number), profile=row.name, lifetime=seconds))
                assert (made.not_valid_after_utc.timestamp(), made.not_valid_before_utc.timestamp()) == (
                    1_800_000_000 + seconds,
                    1_800_000_000 - issuance.BACKDATED,
                )
            for seconds in (row.shortest - 1, row.longest + 1):
                with pytest.raises(Refused, match="a lifetime of"):
                    await leaf(ca, order(new_key("p256"), text, id="x", profile=row.name, lifetime=seconds))
            usual = await leaf(ca, order(new_key("p256"), text, id="usual", profile=row.name))
            assert usual.not_valid_after_utc.timestamp() == 1_800_000_000 + row.lifetime

    asyncio.run(story())


def test_what_a_profile_does_not_certify(tmp_path: Path) -> None:
    async def story() -> None:
        async with authority(tmp_path) as ca:
            with pytest.raises(Refused, match="no profile 'nothing': there are client, email"):
                await leaf(ca, order(new_key("p256"), profile="nothing"))
            with pytest.raises(Refused, match="no names of kind email"):
                await leaf(ca, order(new_key("p256"), "email:a@example.net"))
            strict = replace(PROFILES["server"], key_types=("P-384",))
            ca._profiles = {"server": strict}
            with pytest.raises(Refused, match="certifies P-384, not P-256"):
                await leaf(ca, order(new_key("p256")))

    asyncio.run(story())


def test_a_leaf_does_not_outlive_its_authority(tmp_path: Path) -> None:
    async def story() -> None:
        async with authority(tmp_path, now=1_800_000_000) as ca:
            end = ca._issuer.certificate.not_valid_after_utc
        late = 1_800_000_000 + INTERMEDIATE_LIFETIME - 3600
        async with authority(tmp_path, now=late) as ca:
            assert (await leaf(ca, order(new_key("p256")))).not_valid_after_utc == end

    asyncio.run(story())


def test_what_is_signed_is_what_was_linted(tmp_path: Path) -> None:
    async def story() -> None:
        async with authority(tmp_path) as ca:
            prepared = issuance.prepare(order(new_key("p256")), PROFILES["server"], ca._issuer, 1_800_000_000)
            made = issuance.issue(prepared, ca._issuer)
            assert made.tbs_certificate_bytes == prepared.tbs
            with pytest.raises(ValueError, match="issued once"):
                issuance.issue(prepared, ca._issuer)
            other = Issuer(ca._issuer.certificate, ec.generate_private_key(ec.SECP256R1()))
            again = issuance.prepare(order(new_key("p256")), PROFILES["server"], ca._issuer, 1_800_000_000)
            with pytest.raises(ValueError, match="not what was linted"):
                issuance.issue(again, other)  # another algorithm: other bytes

    asyncio.run(story())


def test_the_linter_finds_what_is_wrong(tmp_path: Path) -> None:
    async def story() -> None:
        async with authority(tmp_path) as ca:
            assert lint.findings(ca.root) == lint.findings(ca.intermediate) == ()
            with pytest.raises(Refused, match=r"not be well made: hsmvisor\.serial_number"):
                issuance.prepare(order(new_key("p256")), PROFILES["server"], ca._issuer, 1_800_000_000, serial=lambda: 7)
            two_hundred = "a" * 60
            made = await leaf(ca, order(new_key("p256"), f"{two_hundred}.{two_hundred}.example.net"))
            assert not list(made.subject), "too long for a common name: then the names are critical"
            assert made.extensions.get_extension_for_class(x509.SubjectAlternativeName).critical

    asyncio.run(story())


# ---- what others ask ----------------------------------------------------------------------------------------------------


def test_openssl_reads_the_revocation_list(tmp_path: Path) -> None:
    async def story() -> None:
        async with authority(tmp_path, crl_url="http://crl.example.net/fleet.crl") as ca:
            good, bad = [(await ca.issue(order(new_key("p256"), id=name), keep)).chain for name in ("good", "bad")]
            await ca.revoke(bad[0], Reason.KEY_COMPROMISE)
            numbers = []
            for _ in range(2):
                crl = x509.load_der_x509_crl(await ca.revocation_list())
                numbers.append(crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number)
            assert numbers == [1, 2]
            (tmp_path / "crl.pem").write_bytes(crl.public_bytes(Encoding.PEM))
            root, issuing = pem(tmp_path / "root.pem", ca.root), pem(tmp_path / "issuing.pem", ca.intermediate)
            command = ["verify", "-crl_check", "-CRLfile", tmp_path / "crl.pem", "-CAfile", root, "-untrusted", issuing]
            openssl(*command, pem(tmp_path / "good.pem", good[0]))
            assert "certificate revoked" in openssl(*command, pem(tmp_path / "bad.pem", bad[0]), status=2)
            assert "URI:http://crl.example.net/fleet.crl" in openssl("x509", "-in", tmp_path / "good.pem", "-noout", "-text")

    asyncio.run(story())


def test_a_revoked_certificate_leaves_the_list_some_time_after_its_end(tmp_path: Path) -> None:
    async def story() -> None:
        day, now = 86400.0, 1_800_000_000.0
        async with authority(tmp_path, now) as ca:
            issued = await ca.issue(replace(order(new_key("p256")), lifetime=int(day)), keep)
            await ca.revoke(issued.chain[0], Reason.SUPERSEDED)
        for later, listed in ((0.5, 1), (2.9, 1), (3.1, 0)):
            async with authority(tmp_path, now + later * day) as ca:
                assert len(x509.load_der_x509_crl(await ca.revocation_list())) == listed

    asyncio.run(story())


def test_openssl_reads_ocsp_answers(tmp_path: Path) -> None:
    async def story() -> None:
        async with authority(tmp_path, ocsp_url="http://ocsp.example.net") as ca:
            good, bad = [(await ca.issue(order(new_key("p256"), id=name), keep)).chain for name in ("good", "bad")]
            await ca.revoke(bad[0], Reason.SUPERSEDED)
            issuing, root = pem(tmp_path / "issuing.pem", ca.intermediate), pem(tmp_path / "root.pem", ca.root)
            for name, chain, said in (("good", good, ": good"), ("bad", bad, "Reason: superseded")):
                asked, answered = tmp_path / "asked", tmp_path / "answered"
                one = pem(tmp_path / f"{name}.pem", chain[0])
                openssl("ocsp", "-issuer", issuing, "-cert", one, "-reqout", asked)
                answered.write_bytes(await ca.ocsp(asked.read_bytes()))
                command = ["ocsp", "-no_nonce", "-reqin", asked, "-respin", answered, "-issuer", issuing, "-cert", one]
                told = openssl(*command, "-CAfile", root, "-verify_other", issuing)  # -no_nonce: no other one than it asked with
                assert "Response verify OK" in told and said in told
                assert "WARNING: no nonce" not in told

    asyncio.run(story())


def test_ocsp_questions_that_are_not_answered(tmp_path: Path) -> None:
    from cryptography.x509 import ocsp

    async def story() -> None:
        async with authority(tmp_path) as ca:
            made = await leaf(ca, order(new_key("p256")))
            builder = ocsp.OCSPRequestBuilder()
            algorithm = ca._issuer.hash
            unknown = builder.add_certificate_by_hash(
                *_hashes(builder.add_certificate(made, ca._issuer.certificate, algorithm).build()), 4711, algorithm
            ).build()
            own = builder.add_certificate(made, ca._issuer.certificate, algorithm)
            for question, status in (
                (b"", "MALFORMED_REQUEST"),
                (bytes(MAX_OCSP + 1), "MALFORMED_REQUEST"),
                (builder.add_certificate(made, made, algorithm).build().public_bytes(Encoding.DER), "MALFORMED_REQUEST"),
                (unknown.public_bytes(Encoding.DER), "UNAUTHORIZED"),
                (own.add_extension(x509.OCSPNonce(bytes(129)), False).build().public_bytes(Encoding.DER), "MALFORMED_REQUEST"),
                (own.add_extension(x509.OCSPNonce(bytes(128)), False).build().public_bytes(Encoding.DER), "SUCCESSFUL"),
            ):
                assert ocsp.load_der_ocsp_response(await ca.ocsp(question)).response_status.name == status

    asyncio.run(story())


def _hashes(request: object) -> tuple[bytes, bytes]:
    return request.issuer_name_hash, request.issuer_key_hash  # type: ignore[attr-defined]


# ---- keys and database --------------------------------------------------------------------------------------------------


def test_another_key_for_the_same_order(tmp_path: Path) -> None:
    async def story() -> None:
        async with authority(tmp_path) as ca:
            await leaf(ca, order(new_key("p256")))
            with pytest.raises(Refused, match="issued for another key"):
                await leaf(ca, order(new_key("p256")))

    asyncio.run(story())


def test_a_foreign_certificate_is_not_revoked(tmp_path: Path) -> None:
    async def story() -> None:
        async with authority(tmp_path) as ca:
            with pytest.raises(Refused, match="none of this authority's"):
                await ca.revoke(ca.root, Reason.UNSPECIFIED)

    asyncio.run(story())


def test_an_order_at_two_managers_at_once(tmp_path: Path) -> None:
    async def story() -> None:
        async with authority(tmp_path) as one, authority(tmp_path) as other:
            assert one.root == other.root
            for number in range(5):
                wanted = order(new_key("p256"), id=str(number))
                first, second = await asyncio.gather(leaf(one, wanted), leaf(other, wanted))
                assert first == second

    asyncio.run(story())


def test_keys_that_are_lost_or_open_to_others(tmp_path: Path) -> None:
    async def story() -> None:
        async with authority(tmp_path):
            pass
        key = tmp_path / "keys" / "intermediate.key"
        for spoil, said in (
            (lambda: key.chmod(0o644), "can be read by others"),
            (lambda: key.write_text("nothing"), "no private key in PEM"),
            (lambda: key.write_bytes((tmp_path / "keys" / "root.key").read_bytes()), "not that of its certificate"),
            (lambda: key.unlink(), "is missing: restore it"),
        ):
            spoil()
            with pytest.raises(NoKey, match=said):
                async with authority(tmp_path):
                    pass
            if key.exists():
                key.chmod(0o600)

    asyncio.run(story())


def test_migrations_make_what_the_tables_say(tmp_path: Path) -> None:
    def described(connection: object) -> dict[str, object]:
        found = inspect(connection)
        return {
            name: (
                sorted((c["name"], str(c["type"]), c["nullable"]) for c in found.get_columns(name)),
                sorted((i["name"], tuple(i["column_names"]), i["unique"]) for i in found.get_indexes(name)),
            )
            for name in found.get_table_names()
            if name != "alembic_version"
        }

    async def story() -> None:
        migrated, made = Database(f"sqlite:///{tmp_path}/migrated.db"), Database(f"sqlite:///{tmp_path}/made.db")
        await migrated.migrate()
        await migrated.migrate()
        async with made.transaction() as connection:
            await connection.run_sync(tables.metadata.create_all)
        shapes = []
        for database in (migrated, made):
            async with database.transaction() as connection:
                shapes.append(await connection.run_sync(described))
            await database.close()
        assert shapes[0] == shapes[1] and shapes[0]

    asyncio.run(story())


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nonsense", "the database's URL is"),
        ("mysql://x/y", "kind 'mysql'"),
        ("sqlite:////nowhere/at/all.db", "unable to open database file"),
        ("postgresql://me:hunter2@127.0.0.1:1/x", r"postgresql://me:\*\*\*@127"),
    ],
)
def test_databases_that_cannot_be_used(url: str, said: str) -> None:
    async def story() -> None:
        database = Database(url)
        try:
            await database.migrate()
        finally:
            await database.close()

    with pytest.raises(DatabaseError, match=said) as caught:
        asyncio.run(story())
    assert "hunter2" not in str(caught.value)


def test_names_of_the_order_are_all_there(tmp_path: Path) -> None:
    told = ["web.example.net", "*.example.net", "192.0.2.1", "2001:db8::1"]

    async def story() -> None:
        async with authority(tmp_path) as ca:
            made = await leaf(ca, order(new_key("ed25519"), *told, csr_names=()))
            found = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            assert names.of_extension(found) == names.parse_all(told)

    asyncio.run(story())
