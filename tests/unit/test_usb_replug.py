"""A card that is another USB device for other keys: programs lose their reader together with its keys."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator

import pytest
from hsmvisor import usb_probe
from hsmvisor.host import convert
from hsmvisor.host.settings import Settings
from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.sealed.canonical import Record
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisord.face.card.slots import CardSettings, card_settings
from hsmvisord.worker.usb_plug import UsbPlug
from support.certificates import new_key
from support.keystores import Bench
from support.usb_importers import Importer, Usbip, Usbredir

NAME, WITHIN = "web-1", 20.0
REPLUG = CardSettings(replug=True)
KEYED = re.compile(rf"{NAME}~[0-9a-f]{{8}}")


class Worker:
    """A worker's plug, and its supervisor: it plugs in whatever imports."""

    def __init__(self, settings: CardSettings) -> None:
        self.bench = Bench()
        self.token = self.bench.token()
        self.told: list[Record] = []
        self._gone = threading.Semaphore(0)
        self._plug, self._number = UsbPlug(lambda sock, peer: sock.close(), self._announce), 0
        self._plug.configure(settings)
        self.socks: list[socket.socket] = []

    def _announce(self, record: Record) -> None:
        self.told.append(record)
        if isinstance(record, m.UsbGone):
            self._gone.release()

    def importer(self, protocol: str = "usbredir") -> Importer:
        ours, theirs = socket.socketpair()
        self.socks.append(ours)
        self._number += 1
        self._plug.plug(m.PlugUsb(self._number, protocol, 0x1209, 1, NAME, b""), theirs, self.token)
        importer: Importer = Usbredir(ours) if protocol == "usbredir" else Usbip(ours, NAME)
        importer.configure()
        return importer

    def push(self, generation: int, **more: object) -> None:
        self.bench.push(generation, new_key("p256"), chained=True, **more)
        self._plug.look()

    def configure(self, settings: CardSettings) -> None:
        self._plug.configure(settings)

    def gone(self) -> str:
        """Waits until the device has ended; returns why."""
        assert self._gone.acquire(timeout=WITHIN), "it goes on"
        last = [record for record in self.told if isinstance(record, m.UsbGone)][-1]
        return last.why

    def goes_on(self) -> bool:
        return not self._gone.acquire(timeout=0.3)

    def close(self) -> None:
        self._plug.unplug()
        for sock in self.socks:
            sock.close()


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker(REPLUG)
    yield worker
    worker.close()


def serial(importer: Importer) -> str:
    return importer.control(0x80, 6, 0x0303, 0x0409, 255)[2:].decode("utf-16-le")


def test_without_it_the_serial_number_is_the_name(worker: Worker) -> None:
    worker.configure(CardSettings())
    importer = worker.importer()
    assert serial(importer) == NAME
    worker.push(1)
    worker.push(2)
    assert worker.goes_on() and serial(importer) == NAME


def test_another_key_is_another_device(worker: Worker) -> None:
    serials = []
    for generation in (1, 2, 3):
        worker.push(generation)
        if generation > 1:
            worker.gone()
        serials.append(serial(worker.importer()))
        worker.push(generation + 10, material="other")  # a key more: other keys
        assert worker.gone() == "the card has other keys: it comes back under another serial number"
        serials.append(serial(worker.importer()))
    assert len(set(serials)) == len(serials) and all(map(KEYED.fullmatch, serials))


def test_a_new_certificate_is_the_same_device(worker: Worker) -> None:
    key = new_key("p256")
    worker.bench.push(1, key, chained=True)
    importer = worker.importer()
    before = serial(importer)
    worker.bench.push(2, key, chained=True, renew=True)
    worker._plug.look()
    assert worker.goes_on() and serial(importer) == before
    assert serial(worker.importer()) == before, "and the next importer's is the same"


def test_another_setting_counts_at_once(worker: Worker) -> None:
    worker.configure(CardSettings())
    worker.push(1)
    assert serial(worker.importer()) == NAME
    worker.configure(REPLUG)
    worker.gone()
    assert KEYED.fullmatch(serial(worker.importer()))
    worker.configure(CardSettings())
    worker.gone()
    assert serial(worker.importer()) == NAME


def test_a_token_that_is_detached_ends_no_device(worker: Worker) -> None:
    worker.push(1)
    worker.importer()
    for present in (False, True):
        worker.bench.keystore.set_token_present(present)
        worker._plug.look()
        assert worker.goes_on()


def test_one_that_is_plugged_in_while_its_token_is_detached_stays(worker: Worker) -> None:
    worker.push(1)
    before = serial(worker.importer())
    worker.bench.keystore.set_token_present(False)
    assert serial(worker.importer()) == before
    worker.bench.keystore.set_token_present(True)
    worker._plug.look()
    assert worker.goes_on()


def test_usbip_calls_it_by_its_name(worker: Worker) -> None:
    worker.push(1)
    assert KEYED.fullmatch(serial(worker.importer("usbip")))  # imported as NAME


# ---- the setting, and the name --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replug", [False, True])
def test_the_setting_comes_to_the_worker_and_back(replug: bool) -> None:
    message = pb.ModuleSettings(card=pb.Card(slots={"9a": "web"}, replug=replug))
    settings = convert.settings(message)
    assert Settings.decode(settings.encode()) == settings
    assert card_settings(json.loads(settings.for_worker())["card"]).replug == replug
    assert convert.settings_message(settings).card.replug == replug


@pytest.mark.parametrize(
    ("wanted", "named"),
    [("", True), ("web-1", True), ("web-1~01234567", True), ("web", False), ("web-1~", False), ("web-12", False)],
)
def test_a_probe_knows_a_module_by_its_name(wanted: str, named: bool) -> None:
    assert usb_probe._is_named("web-1~01234567", wanted) == named
