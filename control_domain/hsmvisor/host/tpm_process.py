"""The living process of one module's TPM: what it is asked, and what it asks and tells."""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from hsmvisor.host import limits
from hsmvisor.host.forked import Forked, ProcessFault
from hsmvisor.host.link import Violation
from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.internal.frames import Frame
from hsmvisor_rpc.internal.phases import MAX_DESCRIPTORS, TPM_MAY, Phase, descriptors_of
from hsmvisor_rpc.sealed.canonical import Record

Store = Callable[[m.StoreTpm], Awaitable[None]]
Told = Callable[[m.Event], None]
Plugged = Callable[[m.TpmPlugged | m.TpmGone, list[int]], None]  #: the descriptors are its own to close

_MAX_KEY = 4096  #: bytes of a public key that it says


class TpmProcess(Forked):
    """One that runs."""

    WHAT: ClassVar[str] = "TPM"
    MAY: ClassVar[Mapping[Phase, frozenset[type[Record]]]] = TPM_MAY

    def __init__(self, name: str, pid: int, pidfd: int, phase: Phase | None) -> None:
        super().__init__(name, pid, pidfd, phase)
        self._store: Store | None = None
        self._told: Told | None = None
        self._plugged: Plugged | None = None
        self.firmware: bool | None = None  #: as it was told; None: that is not known

    def connect(self, path: Path, store: Store, told: Told, plugged: Plugged) -> None:
        """Connects to its control socket, which listens from before it was forked.  Raises OSError."""
        self._store, self._told, self._plugged = store, told, plugged
        self._connect(path, self._asked, self._notified)

    async def boot(self, boot: m.BootTpm | m.SucceedTpm, within: float, descriptors: Sequence[int] = ()) -> m.TpmBooted:
        """Raises as `ask` of a link, and ProcessFault."""
        self.phase, self.firmware = Phase.BOOTING, boot.firmware
        booted, _ = await self._ask(boot, m.TpmBooted, within, give=descriptors)
        _check(booted)
        self.phase = Phase.SERVING
        return booted

    async def identify(self, within: float) -> m.TpmBooted:
        """Raises as `boot`."""
        booted, _ = await self._ask(m.IdentifyTpm(), m.TpmBooted, within)
        _check(booted)
        return booted

    async def certify(self, certify: m.CertifyTpm, within: float) -> None:
        await self._ask(certify, m.Done, within)

    async def take_keys(self, sock: socket.socket, within: float) -> None:
        """Has it hear the worker at the other end of `sock`."""
        await self._ask(m.TakeKeys(), m.Done, within, give=[sock.fileno()])

    async def plug(self, plug: int, kind: str, descriptors: Sequence[int], within: float) -> None:
        """Hands somebody over who is connected; `descriptors`: as PlugTpm says."""
        await self._ask(m.PlugTpm(plug, kind, len(descriptors)), m.Done, within, give=descriptors)

    async def hand_over(self, within: float) -> tuple[m.TpmHandedOver, list[int]]:
        """Returns what a successor needs, with the guest's connections (the caller's to close); it ends then."""
        handed, descriptors = await self._ask(m.HandOverTpm(), m.TpmHandedOver, within, take=MAX_DESCRIPTORS)
        self.phase = Phase.LEAVING
        if len(handed.state) > limits.MAX_TPM_STATE:
            for descriptor in descriptors:
                os.close(descriptor)
            raise ProcessFault(f"it hands over {len(handed.state)} bytes")
        return handed, descriptors

    # ---- being asked --------------------------------------------------------------------------------------------

    def _asked(self, frame: Frame) -> Coroutine[Any, Any, Record]:
        record = self._allowed(frame)
        if not isinstance(record, m.StoreTpm) or self._store is None:
            raise Violation(f"{record.TYPE} as a request")
        return self._stored(self._store(record))

    def _notified(self, frame: Frame) -> None:
        record = self._allowed(frame)
        if isinstance(record, (m.TpmPlugged, m.TpmGone)) and self._plugged is not None and self._link is not None:
            self._plugged(record, self._link.claim(descriptors_of(record)))
        elif isinstance(record, m.Event) and record.kind in m.TPM_EVENT_KINDS and self._told is not None:
            self._told(record)
        else:
            raise Violation(f"{record.TYPE} as a notification")


def _check(booted: m.TpmBooted) -> None:
    """Raises ProcessFault."""
    if len(booted.certificates) not in (0, 3) or max(map(len, booted.certificates), default=0) > _MAX_KEY:
        raise ProcessFault("the certificates that it says cannot be")
    if len(booted.endorsement_keys) != 2 or max(map(len, (*booted.endorsement_keys, booted.attestation_key))) > _MAX_KEY:
        raise ProcessFault("the keys that it says cannot be")
