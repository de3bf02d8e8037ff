"""Commands for modules: numbered, signed, and queued for their host."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hsmvisor.manager import limits
from hsmvisor.manager.store import commands, inventory
from hsmvisor.manager.store.lines import FAR
from hsmvisor.manager.store.rows import CommandRow, LineRow, ResourceRow
from hsmvisor_rpc.sealed.canonical import Record
from hsmvisor_rpc.sealed.commands import Action, Command, Signer
from sqlalchemy.ext.asyncio import AsyncConnection

SIGNER_KEPT = 60.0  #: seconds


@dataclass(frozen=True)
class Said:
    """One command before it is signed.  `expires_at`: 0 = as usual."""

    action: Action
    generation: int
    body: Record | None = None
    expires_at: int = 0


class Commands:
    def __init__(self, signer: Callable[[], Signer], clock: Callable[[], float]) -> None:
        self._signer, self._clock = signer, clock
        self._kept: Signer | None = None
        self._kept_until = 0.0

    async def queue(
        self, connection: AsyncConnection, resource: ResourceRow, line: LineRow, said: Sequence[Said], until: float = 0.0
    ) -> None:
        """They are carried out in this order.  `until`: the host is given them until then, or not at all; 0: whenever it comes.

        Raises AuthorityError.
        """
        now, signer = self._clock(), self._signer_now()
        first = await inventory.take_sequences(connection, resource.id, len(said))
        latest = until + limits.CARRIED_OUT_WITHIN if until else FAR
        rows = []
        for sequence, one in enumerate(said, first):
            expires = one.expires_at or int(min(now + limits.COMMAND_LIFETIME, latest))  # an envelope is bound to one of its own
            command = Command(
                action=one.action,
                host_id=bytes.fromhex(resource.host_id),
                module_id=bytes.fromhex(resource.module_id),
                sequence=sequence,
                issued_at=int(now),
                expires_at=expires,
                material=line.material,
                generation=one.generation,
                body=one.body.encode() if one.body is not None else b"",
            )
            rows.append(
                CommandRow(
                    id=uuid.uuid4().hex,
                    host_id=resource.host_id,
                    resource_id=resource.id,
                    module=resource.module,
                    line_id=line.id,
                    generation=one.generation,
                    action=str(one.action),
                    sequence=sequence,
                    signed=signer.sign(command),
                    created_at=now,
                    expires_at=int(min(expires, latest)),
                    give_until=until,
                )
            )
        await commands.add(connection, rows)

    def _signer_now(self) -> Signer:
        """As its files said it within the last minute.  Raises AuthorityError."""
        if self._kept is None or self._kept_until <= self._clock():
            self._kept, self._kept_until = self._signer(), self._clock() + SIGNER_KEPT
        return self._kept
