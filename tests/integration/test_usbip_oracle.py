"""Somebody else's USB/IP client (PyPI's usbip) with a module's device: written from the same documents, by another hand."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator

import pytest
import usbip
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisord import limits
from support.certificates import Authority, new_key
from support.guest import free_port
from support.host import Host, Module, wait_for
from support.host_process import new_id
from support.usb_importers import Ccid
from usbip.core import iter_descriptors
from usbip.host import list_devices

VENDOR, PRODUCT = 0x1209, 0x0001
DIGEST = hashlib.sha256(b"message").digest()
KEY = new_key("p256")


@pytest.fixture(scope="module")
def module(shared_host: Host) -> Iterator[Module]:
    module = shared_host.create("oracle")
    module.push("web", KEY, Authority().chain(KEY))
    yield module
    module.destroy()


@pytest.fixture(scope="module")
def way(module: Module) -> usbip.USBIP:
    port = free_port()
    asked = pb.AttachModuleRequest(request_id=new_id(), name=module.name, face=pb.USB, usbip_listen=f"127.0.0.1:{port}")
    asked.usbip_peers.append("127.0.0.1")
    module.host.process.modules.AttachModule(asked, timeout=10)
    return usbip.USBIP("127.0.0.1", port)


@pytest.fixture
def handle(way: usbip.USBIP, module: Module) -> Iterator[usbip.Handle]:
    free(module)
    with usbip.open(VENDOR, PRODUCT, busid=module.name, transport=way) as handle:
        yield handle


def free(module: Module) -> None:
    """The host learns a moment later that an importer has gone."""
    wait_for(lambda: not module.status().device.usb.protocol, what="the end of the importer before")


class Adapter:
    """The oracle's handle, as our smart card driver wants an importer."""

    def __init__(self, handle: usbip.Handle) -> None:
        self.handle = handle

    def write(self, endpoint: int, data: bytes) -> int:
        return int(self.handle.bulk_out(endpoint, data))

    def read(self, endpoint: int, length: int) -> bytes:
        return bytes(self.handle.bulk_in(endpoint, length))


def test_it_lists_the_device(way: usbip.USBIP, module: Module) -> None:
    free(module)
    (found,) = list_devices(way)
    assert (found["busid"], found["idVendor"], found["idProduct"]) == (module.name, VENDOR, PRODUCT)
    assert (found["speed"], found["bNumConfigurations"], found["bNumInterfaces"]) == (3, 1, 1 + limits.USB_CHANNELS)
    assert found["interfaces"] == [(0x0B, 0, 0), *[(0xFF, 0x48, 0x01)] * limits.USB_CHANNELS]


def test_it_finds_it_by_its_ids(way: usbip.USBIP, module: Module) -> None:
    """It asks for the list on a connection of its own, and imports on the next one at once."""
    for _ in range(5):
        free(module)
        with usbip.open(VENDOR, PRODUCT, transport=way) as handle:
            assert handle.control(0x80, 8, 0, 0, 1) == b"\x01"


def test_its_parsers_read_the_descriptors(handle: usbip.Handle, module: Module) -> None:
    device = handle.device_descriptor
    assert (device.bcdUSB, device.bMaxPacketSize0, device.bNumConfigurations) == (0x0200, 64, 1)
    assert (device.idVendor, device.idProduct) == (VENDOR, PRODUCT)
    total = usbip.ConfigurationDescriptor.parse(handle.control(0x80, 6, 0x0200, 0, 9)).wTotalLength
    whole = handle.control(0x80, 6, 0x0200, 0, total)
    assert len(whole) == total and usbip.ConfigurationDescriptor.parse(whole).bNumInterfaces == 1 + limits.USB_CHANNELS
    parts = list(iter_descriptors(whole, 9))
    interfaces = [usbip.InterfaceDescriptor.parse(part) for part in parts if part[1] == 4]
    endpoints = [usbip.EndpointDescriptor.parse(part) for part in parts if part[1] == 5]
    assert len(interfaces) == 1 + 2 * limits.USB_CHANNELS
    assert sum(interface.bNumEndpoints for interface in interfaces) == len(endpoints) == 3 + 2 * limits.USB_CHANNELS
    serial = handle.control(0x80, 6, 0x0300 | device.iSerialNumber, 0x0409, 255)
    assert serial[2:].decode("utf-16-le") == module.name


def test_the_card_answers_and_signs(handle: usbip.Handle) -> None:
    assert handle.interrupt_in(0x82, 8) == b"\x50\x02", "an empty reader, until its driver has asked for the card"
    card = Ccid(Adapter(handle))  # type: ignore[arg-type]
    assert card.power_on()[:1] == b"\x3b"
    card.select()
    assert card.transmit(bytes.fromhex("0020008008313233343536FFFF")) == (b"", 0x9000)
    assert card.transmit(bytes.fromhex("00CB3FFF055C035FC10500"))[1] == 0x9000
    data, status = card.transmit(bytes.fromhex("0087119A267C2482008120") + DIGEST + b"\0")
    assert status == 0x9000
    assert (data[0], data[2]) == (0x7C, 0x82)
    public = KEY.public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    public.verify(data[4:], DIGEST, ec.ECDSA(Prehashed(hashes.SHA256())))


def test_a_channel_is_a_stream(handle: usbip.Handle) -> None:
    handle.control(0x01, 11, 1, 1, b"")
    assert handle.bulk_out(0x03, b"\x81") == 1
    assert handle.bulk_in(0x83, 512) == b"\x81", "the dialect"
    handle.control(0x01, 11, 0, 1, b"")


def test_what_stalls_is_told_so(handle: usbip.Handle) -> None:
    for asked in ((0x80, 6, 0x0600, 0, 10), (0x80, 6, 0x0F00, 0, 5), (0xC0, 1, 0, 0, 4), (0x81, 10, 0, 99, 1)):
        with pytest.raises(usbip.Stall, match="-32"):
            handle.control(*asked)
    with pytest.raises(usbip.Stall, match="-71"):
        handle.bulk_in(0x83, 64)  # alternate setting 0
    with pytest.raises(usbip.Stall, match="-32"):
        handle.bulk_out(0x01, b"\x6f\xff\xff\xff\xff" + bytes(5))
    with pytest.raises(usbip.Stall, match="-32"):
        handle.bulk_out(0x01, b"\x65" + bytes(9))
    handle.clear_halt(0x01)
    assert handle.bulk_out(0x01, b"\x65" + bytes(9)) == 10
    assert handle.bulk_in(0x81, 64)[:1] == b"\x81"


def test_another_device_and_a_second_importer(handle: usbip.Handle, way: usbip.USBIP, module: Module) -> None:
    with pytest.raises((usbip.NotFound, ConnectionError)):
        usbip.open(busid=module.name, transport=way)
    assert struct.unpack("<H", handle.control(0x80, 0, 0, 0, 2)) == (1,)
    handle.close()
    free(module)
    with pytest.raises(usbip.NotFound, match="status 4"):
        usbip.open(busid="1-1", transport=way)
