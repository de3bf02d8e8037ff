"""hsmvisor-host whose modules answer QEMU by a script (vhost_backend.py): a device that is plugged in, and no more."""

from __future__ import annotations

import asyncio

from hsmvisor.host import limits, module
from hsmvisor.host.config import Config
from hsmvisor.host.main import main
from hsmvisor.host.places import Places
from support.vhost_backend import Backend


class ScriptedDevice:
    def __init__(self, where: Places, config: Config, name: str, number: int) -> None:
        self.path, self.cid = where.device(name), limits.FIRST_CID + number
        self._backend: Backend | None = None

    @property
    def plugged(self) -> bool:
        return self._backend is not None and self._backend.connected

    async def wait_plugged(self, within: float) -> None:
        await self._wait(True, within)

    async def wait_unplugged(self, within: float) -> None:
        await self._wait(False, within)

    async def _wait(self, plugged: bool, within: float) -> None:
        async with asyncio.timeout(within):
            while self.plugged is not plugged:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    def listen(self) -> None:
        if self._backend is None:
            self.path.unlink(missing_ok=True)
            self._backend = Backend(self.path, self.cid)

    def close(self) -> None:
        if self._backend is not None:
            self._backend.close()
            self._backend = None


if __name__ == "__main__":
    module.Device = ScriptedDevice  # type: ignore[assignment,misc]
    main()
