"""An owner brings its own key to a fleet without processes."""

from __future__ import annotations

from hsmvisor.bundle import Bundle
from hsmvisor.client.importing import seal_import
from hsmvisor.manager.importing import Importing
from hsmvisor.manager.store.rows import RequestRow
from support.certificates import Authority, chain_pem, new_key, pkcs8
from support.fleet import Fleet


def importing_of(fleet: Fleet) -> Importing:
    parts = fleet.parts
    return Importing(fleet.database, fleet.history, fleet.judge, fleet.issuer, parts.pins, lambda _: b"", parts.draw, fleet.clock)


async def import_key(fleet: Fleet, request: RequestRow, name: str = "www.example.net") -> None:
    """A new key, with a certificate that lasts thirty days from this very moment, whatever the fleet's clock says."""
    importing = importing_of(fleet)
    key = new_key("p256")
    bundle = Bundle.make(pkcs8(key), chain_pem(Authority().chain(key, name=name)))
    envelope = seal_import(bundle, fleet.issuer.recipient, request.id)
    taken = await importing.take(request, envelope, bundle.public_key, bundle.certificates)
    async with fleet.database.transaction() as connection:
        await importing.store(connection, request, taken)
