"""To which modules keys may be sealed, whatever stands in the database: those whose identity a host has signed that has joined.

Whoever writes to the database, and to it alone, would else put a recipient key of his own in a module's place, and read from the
same database the keys that are sealed to it.
"""

from __future__ import annotations

import hmac
import logging

from hsmvisor.manager.store.rows import HostRow, ResourceRow
from hsmvisor_rpc.sealed.commands import fingerprint
from hsmvisor_rpc.sealed.identity import verify_identity
from hsmvisor_rpc.sealed.refusal import Refusal

_log = logging.getLogger(__name__)

_REMEMBERED = 20_000  #: identities that were verified


class Pins:
    """Its repr shows nothing."""

    def __init__(self, token_key: bytes, root: bytes) -> None:
        """`token_key`: a secret of the fleet that its database does not hold; `root`: raw Ed25519, what modules obey."""
        self._key, self._root = hmac.digest(token_key, b"hsmvisor host pin\0", "sha256"), fingerprint(root)
        self._known: set[tuple[object, ...]] = set()

    def __repr__(self) -> str:
        return "Pins()"

    def pin(self, host_id: str, name: str) -> bytes:
        """Returns what is stored with a host that has joined."""
        return hmac.digest(self._key, f"{host_id} {name}".encode(), "sha256")

    def vouch(self, resource: ResourceRow, host: HostRow | None) -> bool:
        """Whether what stands in the database of a resource's module is what its host has signed."""
        if host is None:
            return False
        told = (host.id, host.name, host.host_key, host.pin, resource.host_id, resource.host, resource.identity)
        what = (*told, resource.module_id, resource.recipient)
        if what in self._known:
            return True
        if wrong := self._wrong(resource, host):
            _log.error("%s: nothing is sealed to its module: %s; who has changed the database?", resource.id, wrong)
            return False
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        self._known.add(what)
        return True

    def _wrong(self, resource: ResourceRow, host: HostRow) -> str:
        if not hmac.compare_digest(self.pin(host.id, host.name), host.pin) or fingerprint(host.host_key).hex() != host.id:
            return f"no host has joined as {host.name} with this key"
        if (resource.host_id, resource.host) != (host.id, host.name):
            return "it is another host's"
        try:
            identity = verify_identity(resource.identity, host.host_key)
        except Refusal as error:
            return error.detail
        told = (identity.module_id.hex(), identity.recipient, identity.root)
        return "" if told == (resource.module_id, resource.recipient, self._root) else "its identity is another one"
