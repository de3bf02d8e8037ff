"""What the supervisor knows of a USB device's importer when it adopts a worker that an earlier supervisor left."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest
from hsmvisor.host.config import Config
from hsmvisor.host.places import Places
from hsmvisor.host.usb import Usb
from hsmvisor.host.usb_ids import OWN
from hsmvisor.host.worker import WorkerProcess
from hsmvisor_rpc.internal import messages as m


class Worker:
    """Says what `tells` are before its answer is read, as notifications do that come right behind it."""

    def __init__(self, usb: Usb, state: m.UsbState, tells: tuple[m.UsbGone | m.UsbShown, ...]) -> None:
        self._usb, self._state, self._tells = usb, state, tells

    async def usb(self, within: float) -> m.UsbState:
        for record in self._tells:
            self._usb.told(record, [])
        return self._state


def adopted(tmp_path: Path, state: m.UsbState, *tells: m.UsbGone | m.UsbShown) -> Usb:
    happened: list[Any] = []

    async def scenario() -> Usb:
        usb = Usb(Places(tmp_path), Config(), "web-1", lambda: OWN, lambda kind, detail: happened.append(kind))
        await usb.adopt(cast(WorkerProcess, Worker(usb, state, tells)), 1.0)
        return usb

    return asyncio.run(scenario())


@pytest.mark.parametrize(("plug", "protocol"), [(0, ""), (7, "usbip")])
def test_the_importer_that_the_worker_has_is_known(tmp_path: Path, plug: int, protocol: str) -> None:
    usb = adopted(tmp_path, m.UsbState(plug, protocol, b"{}"))
    assert usb.protocol == protocol and usb.plugged == bool(plug)


def test_one_that_went_meanwhile_is_not_there(tmp_path: Path) -> None:
    """Else its place would be taken for ever."""
    assert not adopted(tmp_path, m.UsbState(7, "usbip", b""), m.UsbGone(7, "the importer is gone")).plugged
    assert adopted(tmp_path, m.UsbState(8, "usbip", b""), m.UsbGone(7, "the importer is gone")).plugged


def test_what_its_card_showed_meanwhile_counts(tmp_path: Path) -> None:
    assert adopted(tmp_path, m.UsbState(7, "usbip", b"old"), m.UsbShown(7, b"new"))._shown == b"new"
    assert adopted(tmp_path, m.UsbState(7, "usbip", b"old"))._shown == b"old"
