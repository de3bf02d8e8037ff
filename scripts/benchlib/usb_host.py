"""A module's USB device without a guest, beside its unix socket: what an importer of ours can ask of each."""

from __future__ import annotations

import hashlib
import itertools
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisord import ck
from hsmvisord.wire.calls import Call, Mechanism
from support.guest import free_port
from support.host import Module
from support.host_process import new_id
from support.native_client import NativeClient
from support.usb_guest import PIN, USBIP, USBREDIR, until
from support.usb_importers import Ccid, Importer, Socketed, Usbip, Usbredir, attached

from benchlib.usb_ways import DISCOVERY, LARGE, PLAIN, SELECT, SMALL

ROOM = 65536  #: bytes of one transfer from the device

Calls = dict[str, Callable[[], object]]


class Channel(Socketed):
    """Takes what there is in one transfer, as a driver does."""

    _coming = b""

    def recv(self, count: int) -> bytes:
        if not self._coming:
            self._coming = super().recv(ROOM)
        given, self._coming = self._coming[:count], self._coming[count:]
        return given


@contextmanager
def asked(modules: dict[str, Module]) -> Iterator[dict[str, Calls]]:
    """By way, all of which are open at once: its calls."""
    with _imported(modules) as importers, socket.socket(socket.AF_UNIX) as plain:
        plain.connect(modules[PLAIN].address.removeprefix("unix:path="))
        calls = {PLAIN: _over_channel(NativeClient(plain))}
        for way, importer in importers.items():
            card = _by_card(attached(importer))
            calls[way] = card | _over_channel(NativeClient(cast(socket.socket, Channel(importer, 1))))
        yield calls


@contextmanager
def _imported(modules: dict[str, Module]) -> Iterator[dict[str, Importer]]:
    redir, ip = modules[USBREDIR], modules[USBIP]
    services, port = ip.host.process.modules, free_port()
    asked = pb.AttachModuleRequest(request_id=new_id(), name=ip.name, face=pb.USB, usbip_listen=f"127.0.0.1:{port}")
    asked.usbip_peers.append("127.0.0.1")
    services.AttachModule(asked, timeout=30)
    path = Path(redir.status().device.usb.socket)
    importers: dict[str, Importer] = {USBREDIR: Usbredir(path), USBIP: Usbip(("127.0.0.1", port), ip.name)}
    yield importers
    for importer in importers.values():
        importer.close()
    services.DetachModule(pb.DetachModuleRequest(request_id=new_id(), name=ip.name, face=pb.USB), timeout=30)
    until(lambda: not redir.status().device.usb.protocol, "the module to see its importer go")


def _over_channel(client: NativeClient) -> Calls:
    client.hello()
    session = client.open_session()
    (key,) = client.find(session, (ck.CKA_CLASS, ck.CKO_PRIVATE_KEY), (ck.CKA_LABEL, b"p256"))
    mechanism, digests = Mechanism(ck.CKM_ECDSA, None), _digests()
    return {
        "small": lambda: client.call(Call.GENERATE_RANDOM, session, SMALL),
        "large": lambda: client.call(Call.GENERATE_RANDOM, session, LARGE),
        "p256": lambda: client.sign_once(session, mechanism, key, next(digests)),
    }


def _by_card(card: Ccid) -> Calls:
    """P-256 is in 9A (NIST SP 800-73-4, part 2)."""
    card.power_on()
    digests = _digests()

    def transmit(apdu: bytes) -> None:
        _, status = card.transmit(apdu)
        if status != 0x9000:
            raise RuntimeError(f"{apdu.hex()} is answered by {status:04X}")

    def sign() -> None:
        """GENERAL AUTHENTICATE (3.2.4): a template of an empty response, which is asked for, and the challenge."""
        transmit(bytes.fromhex("0087119A26 7C24 8200 8120") + next(digests) + b"\0")

    transmit(SELECT)
    transmit(bytes.fromhex("00CB3FFF055C035FC10500"))  # the certificate of 9A: the card signs for who has read it
    transmit(bytes.fromhex("0020008008") + PIN.encode().ljust(8, b"\xff"))  # VERIFY (3.2.1)
    return {"apdu": lambda: transmit(DISCOVERY), "card-p256": sign}


def _digests() -> Iterator[bytes]:
    return (hashlib.sha256(b"%d" % number).digest() for number in itertools.count())
