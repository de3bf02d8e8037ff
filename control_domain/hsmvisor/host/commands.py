"""Signed commands on their way to a module: carried out once, in the audit log and the events, whoever brings them."""

from __future__ import annotations

import hashlib
from typing import Any

from hsmvisor.host import reports
from hsmvisor.host.modules import Modules
from hsmvisor.host.state import State
from hsmvisor.serving.errors import Invalid
from hsmvisor.serving.events import Events
from hsmvisor.serving.requests import Origin, Requests, request
from hsmvisor.serving.text import clean
from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.sealed.commands import Action
from hsmvisor_rpc.sealed.limits import MAX_SIGNED


class Commands:
    def __init__(self, modules: Modules, requests: Requests, state: State, events: Events) -> None:
        self._modules, self._requests, self._state, self._events = modules, requests, state, events

    async def execute(self, origin: Origin, untrusted_request_id: str, name: str, untrusted_command: bytes) -> m.Executed:
        """Returns what the module says of a command that it has carried out, now or before.  Raises ServiceError."""
        command = untrusted_command
        asked = request(untrusted_request_id, "Execute", name.encode(), command)
        # who signed what is the module's to judge: refused, the line shows which bytes; carried out, the module's own words
        fields: dict[str, Any] = {"module": name, "command": hashlib.sha256(command).hexdigest()}

        async def work() -> bytes:
            if not 1 <= len(command) <= MAX_SIGNED:
                raise Invalid("TOO_LARGE" if command else "MALFORMED", f"signed_command has 1-{MAX_SIGNED} bytes")
            module = self._modules.get(name)
            done = await module.ask(m.Execute(module.ticket(asked), command), m.Executed)
            await self._state.record(asked, done.encode())  # the worker's own change carried it, where there was one
            if done.action == Action.CHANGE_ROOT:
                await module.refresh_root()
            fields.update(_told(done))
            self._events.emit("command-executed", name, _told(done))
            module.touched()
            return done.encode()

        answer = await self._requests.once(origin, "material.execute", asked, fields, work)
        done = m.Executed.decode(answer)
        if done.compromised:  # also when the call is repeated: the first one may have been cut short here
            await self._modules.get(name).forget_key()
        return done


def _told(done: m.Executed) -> dict[str, Any]:
    """What a module says of a command that it carried out, cleaned for a line.  Of a key that it made: which request came out."""
    csr = b""
    if done.action == Action.GENERATE:
        csr = reports.csr(reports.material(reports.parse(done.report)), done.generation)
    return {
        "action": clean(done.action),
        "material": clean(done.material),
        "generation": done.generation,
        "sequence": done.sequence,
        "signer": clean(done.signer),
        **({"compromised": True} if done.compromised else {}),
        **({"csr": hashlib.sha256(csr).hexdigest()} if csr else {}),
    }
