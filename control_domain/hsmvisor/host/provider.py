"""The key provider, seen from the supervisor: it writes storage keys into pipes that end in workers."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os

from hsmvisor.host import reports
from hsmvisor.host.child import Child, HelperLost
from hsmvisor.host.config import Config
from hsmvisor.host.link import LinkClosed, PeerError
from hsmvisor.host.measures import Measure
from hsmvisor.serving.errors import Unavailable
from hsmvisor_rpc.internal import messages as m

MODULE = "hsmvisord.keyprovider.main"
_BACKUPS = hashlib.sha256(b"hsmvisor backups").digest()  #: in the place of a module's id, which has 16 bytes


class Provider:
    """As root it becomes a user of its own once it has the master key."""

    def __init__(self, config: Config, module: str = MODULE) -> None:
        self.kind = config.provider.kind
        uid = config.workers.provider_uid if os.geteuid() == 0 else 0
        words = ["--kind", self.kind, "--path", str(config.master_key), "--uid", str(uid)]
        if self.kind == "tpm":
            words += ["--device", config.provider.device, "--plain", str(config.plain_master_key)]
        self.child = Child("key provider", module, words)

    async def derive(self, module_id: bytes, pipe: int, within: float, purpose: str = m.STORAGE) -> None:
        """Has a key of the module written into `pipe`; raises HelperLost."""
        link = await self.child.link()
        try:
            await link.ask(m.DeriveKey(module_id, purpose), m.Done, [pipe], within=within)
        except (LinkClosed, PeerError, TimeoutError) as error:
            raise HelperLost(
                "KEY_PROVIDER", f"no storage key: {str(error) or 'no answer'}", "see the host's log for what it says"
            ) from None

    async def backup_key(self, within: float) -> bytes:
        """Returns the key that seals backups; raises HelperLost.  It is derived like a module's, for an id that no module has."""
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        try:
            try:
                await self.derive(_BACKUPS, write_end, within)
            finally:
                os.close(write_end)
            return os.read(read_end, 32)  # written before the answer came
        finally:
            os.close(read_end)

    async def status(self, within: float) -> tuple[str, tuple[Measure, ...]]:
        """Returns kind and fingerprint for people, and the measures of its sandbox; says so when it cannot be asked."""
        try:
            async with asyncio.timeout(within):
                link = await self.child.link()
                answer, _ = await link.ask(m.ProviderStatus(), m.Report, within=within)
            report = json.loads(answer.report)
            return f"{report['kind']} {report['fingerprint']}", reports.measures(report)
        except (Unavailable, LinkClosed, PeerError, TimeoutError, ValueError, KeyError, TypeError):
            return f"{self.kind} (does not answer)", ()
