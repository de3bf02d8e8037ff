"""A module's USB device on a real host, by importers without a kernel: QEMU's end of usbredir, and a kernel's of USB/IP."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature
from grpc import StatusCode
from hsmvisor.host import limits as limits_of_host
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisord import ck, limits
from hsmvisord.wire.calls import Call, Mechanism
from support.certificates import Authority, new_key
from support.guest import free_port
from support.host import Host, Module, wait_for
from support.host_process import new_id, refused
from support.native_client import NativeClient
from support.usb_importers import Ccid, Lost, Socketed, Stalled, Usbip, Usbredir, attached

EC_KEY, RSA_KEY = new_key("p256"), new_key("rsa2048")
AUTHORITY = Authority()
DIGEST = hashlib.sha256(b"message").digest()
SHA256_INFO = bytes.fromhex("3031300d060960864801650304020105000420")
USBREDIR, USBIP = "usbredir", "usbip"
DESCRIPTORS = 477  #: bytes of the configuration
CHANNELS = range(1, 1 + limits.USB_CHANNELS)
READER_IN, READER_INTERRUPT = 0x81, 0x82
XFR_BLOCK = 0x6F
CONTROL, BULK = 100, 101  #: types of usbredir
NUMBERS = itertools.count(1)

Importer = Usbredir | Usbip


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


def new_module(host: Host) -> Module:
    """With a P-256 key in 9A and an RSA one in 82."""
    module = host.create(f"card-{next(NUMBERS)}", card={"slots": {"9a": "web", "82": "mail"}})
    for name, key in (("web", EC_KEY), ("mail", RSA_KEY)):
        module.push(name, key, AUTHORITY.chain(key))
    return module


@dataclass
class Way:
    """How one module is imported."""

    module: Module
    protocol: str
    port: int = 0

    @property
    def host(self) -> Host:
        return self.module.host

    @property
    def path(self) -> Path:
        return Path(self.module.status().device.usb.socket)

    def listen(self, *peers: str) -> None:
        """For USB/IP; usbredir is always there."""
        self.port = free_port()
        asked = pb.AttachModuleRequest(request_id=new_id(), name=self.module.name, face=pb.USB)
        asked.usbip_listen = f"127.0.0.1:{self.port}"
        asked.usbip_peers.extend(peers)
        self.host.process.modules.AttachModule(asked, timeout=10)

    def raw(self, source: str = "127.0.0.1") -> socket.socket:
        """A connection on which nothing was said."""
        if self.protocol == USBIP:
            return socket.create_connection(("127.0.0.1", self.port), 20, (source, 0))
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(20)
        sock.connect(str(self.path))
        return sock

    def importer(self) -> Importer:
        """Raises Lost."""
        return Usbip(("127.0.0.1", self.port), self.module.name) if self.protocol == USBIP else Usbredir(self.path)

    def again(self) -> Importer:
        """After another importer: the host learns a moment later that it has gone."""

        def one() -> Importer | None:
            try:
                return self.importer()
            except (Lost, ConnectionError):
                return None

        found: Importer = wait_for(one, 15, "an importer")
        return found

    def detach(self) -> None:
        asked = pb.DetachModuleRequest(request_id=new_id(), name=self.module.name, face=pb.USB)
        self.host.process.modules.DetachModule(asked, timeout=20)

    def notes(self, kind: str) -> list[dict[str, Any]]:
        """What the host has noted of this module's USB device."""
        told = [json.loads(line) for line in self.host.process.audit_lines()]
        return [note["detail"] for note in told if note["kind"] == f"module.{kind}" and note.get("module") == self.module.name]


@pytest.fixture(params=[USBREDIR, USBIP])
def way(host: Host, request: pytest.FixtureRequest) -> Iterator[Way]:
    module = new_module(host)
    way = Way(module, request.param)
    if way.protocol == USBIP:
        way.listen("127.0.0.1")
    yield way
    module.destroy()


# ---- what a working importer does --------------------------------------------------------------------------------------


def powered(importer: Importer) -> Ccid:
    card = attached(importer)
    assert card.power_on()[:1] == b"\x3b"
    enters(card)
    return card


def enters(card: Ccid) -> None:
    """The PIN, and the certificates: what a client has not read is not signed for."""
    card.select()
    assert card.transmit(bytes.fromhex("0020008008313233343536FFFF")) == (b"", 0x9000)
    for tag in ("5FC105", "5FC10D"):
        assert card.transmit(bytes.fromhex(f"00CB3FFF055C03{tag}00"))[1] == 0x9000


def authenticate(slot: int, algorithm: int, block: bytes) -> bytes:
    """GENERAL AUTHENTICATE as one extended APDU (SP 800-73-4, part 2, 3.2.4)."""
    inner = b"\x82\x00" + length_of(0x81, block)
    template = length_of(0x7C, inner)
    return bytes([0, 0x87, algorithm, slot, 0]) + struct.pack(">H", len(template)) + template + b"\0\0"


def length_of(tag: int, value: bytes) -> bytes:
    size = len(value)
    coded = bytes([size]) if size < 0x80 else bytes([0x81, size]) if size < 0x100 else b"\x82" + struct.pack(">H", size)
    return bytes([tag]) + coded + value


def value_of(data: bytes, tag: int) -> bytes:
    assert data[0] == tag
    size, at = (data[1], 2) if data[1] < 0x80 else (int.from_bytes(data[2 : 2 + (data[1] & 0x7F)], "big"), 2 + (data[1] & 0x7F))
    assert len(data) == at + size
    return data[at:]


def check(signature: bytes) -> None:
    public = EC_KEY.public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    public.verify(signature, DIGEST, ec.ECDSA(Prehashed(hashes.SHA256())))


def card_signs(card: Ccid) -> None:
    data, status = card.transmit(authenticate(0x9A, 0x11, DIGEST))
    assert status == 0x9000
    check(value_of(value_of(data, 0x7C), 0x82))


def rsa_block() -> bytes:
    return b"\0\1" + b"\xff" * (256 - 3 - len(SHA256_INFO) - 32) + b"\0" + SHA256_INFO + DIGEST


def check_rsa(data: bytes) -> None:
    public = RSA_KEY.public_key()
    assert isinstance(public, rsa.RSAPublicKey)
    public.verify(value_of(value_of(data, 0x7C), 0x82), DIGEST, padding.PKCS1v15(), Prehashed(hashes.SHA256()))


def greeted(channel: Socketed | socket.socket) -> NativeClient:
    client = NativeClient(channel)  # type: ignore[arg-type]
    client.hello()
    return client


def client_signs(client: NativeClient) -> None:
    session = client.open_session()
    (key,) = client.find(session, (ck.CKA_CLASS, ck.CKO_PRIVATE_KEY), (ck.CKA_LABEL, b"web"))
    half = len(made := client.sign(session, Mechanism(ck.CKM_ECDSA), key, DIGEST)) // 2
    check(encode_dss_signature(int.from_bytes(made[:half], "big"), int.from_bytes(made[half:], "big")))


def works(importer: Importer) -> None:
    """Card and channels."""
    card_signs(powered(importer))
    with Socketed(importer, 3) as channel:
        client_signs(greeted(channel))


def closed_at_once(sock: socket.socket) -> bool:
    """Nothing was told before."""
    with sock:
        try:
            return sock.recv(1) == b""
        except ConnectionResetError:
            return True


def loses(importer: Importer) -> None:
    """Its connection ends; what was on its way is of no account."""
    with pytest.raises(Lost):
        while True:
            importer.exactly(1)


# ---- it works ----------------------------------------------------------------------------------------------------------


def test_it_is_enumerated(way: Way) -> None:
    importer = way.importer()
    told = way.module.status().device.usb
    assert (told.protocol, told.serial) == (way.protocol, way.module.name) and told.peer
    if isinstance(importer, Usbredir):
        for _ in range(5):  # as firmware and kernel do
            importer.reset()
    device = importer.control(0x80, 6, 0x0100, 0, 18)
    ids = f"{int.from_bytes(device[8:10], 'little'):04x}:{int.from_bytes(device[10:12], 'little'):04x}"
    assert (len(device), device[:2], ids) == (18, b"\x12\x01", told.usb_id)
    total = int.from_bytes(importer.control(0x80, 6, 0x0200, 0, 9)[2:4], "little")
    whole = importer.control(0x80, 6, 0x0200, 0, total)
    assert len(whole) == total and whole[4] == 1 + limits.USB_CHANNELS
    assert importer.control(0x80, 6, 0x0303, 0x0409, 255)[2:].decode("utf-16-le") == way.module.name
    for kind in (0x0600, 0x0A00):  # device qualifier and debug, which Linux asks for
        with pytest.raises(Stalled):
            importer.control(0x80, 6, kind, 0, 10)
    importer.configure()
    if isinstance(importer, Usbredir):
        importer.watch(READER_INTERRUPT)
    card = Ccid(importer)
    assert noticed(importer) == b"\x50\x02" and not card.present
    assert noticed(importer) == b"\x50\x03" and card.present, "a driver sees it come"
    importer.close()
    (note,) = way.notes("usb-plugged")
    assert note["protocol"] == way.protocol


def noticed(importer: Importer) -> bytes:
    """What the interrupt endpoint tells next."""
    return importer.interrupt() if isinstance(importer, Usbredir) else importer.read(READER_INTERRUPT, 8)


def test_the_card_signs(way: Way) -> None:
    card = powered(way.importer())
    card_signs(card)
    data, status = card.transmit(authenticate(0x82, 0x07, rsa_block()))
    assert status == 0x9000
    check_rsa(data)


def test_a_program_on_a_channel(way: Way) -> None:
    importer = way.importer()
    importer.configure()
    with Socketed(importer, 1) as channel:
        client_signs(greeted(channel))
    with pytest.raises(Stalled):
        importer.read(0x83, 512)  # alternate setting 0 has no endpoints


def test_all_channels_at_once(way: Way) -> None:
    importer = way.importer()
    importer.configure()
    clients = [greeted(Socketed(importer, number)) for number in CHANNELS]
    for client in clients:
        client_signs(client)
    assert wait_for(lambda: way.module.status().connections == len(clients))
    for number in (len(clients) + 1, 255):
        with pytest.raises(Stalled):
            importer.set_interface(number, 1)
    for number in CHANNELS[::2]:  # a process that ends gives its interface back
        importer.set_interface(number, 0)
    wait_for(lambda: way.module.status().connections == len(clients) // 2)
    for client in clients[1::2]:
        client_signs(client)
    importer.configure()
    wait_for(lambda: way.module.status().connections == 0, what="the end of what was configured before")
    card_signs(powered(importer))


def test_a_large_message_both_ways(way: Way) -> None:
    """More than a socket holds, and more than one transfer."""
    importer = way.importer()
    importer.configure()
    with Socketed(importer, 2) as channel:
        client = greeted(channel)
        session = client.open_session()
        (key,) = client.find(session, (ck.CKA_CLASS, ck.CKO_PRIVATE_KEY), (ck.CKA_LABEL, b"mail"))
        data = os.urandom(700_000)
        signature = client.sign(session, Mechanism(ck.CKM_SHA256_RSA_PKCS), key, data)
        public = RSA_KEY.public_key()
        assert isinstance(public, rsa.RSAPublicKey)
        public.verify(signature, data, padding.PKCS1v15(), hashes.SHA256())


# ---- who gets it -------------------------------------------------------------------------------------------------------


def test_a_second_importer_is_refused(way: Way) -> None:
    first = way.importer()
    card = powered(first)
    for _ in range(3):
        assert closed_at_once(way.raw())
    other = Way(way.module, USBREDIR)  # by the other protocol as well
    assert closed_at_once(other.raw())
    card_signs(card)
    assert all("the device is" in note["why"] for note in wait_for(lambda: way.notes("usb-refused"), what="the note"))
    first.close()
    works(way.again())


def test_the_next_one_waits_a_moment_for_the_first_to_be_gone(way: Way) -> None:
    """One alone: the device is not lost to who comes before the host has heard of the end."""
    first = way.importer()
    second, third = way.raw(), way.raw()
    began = time.monotonic()
    assert closed_at_once(third) and time.monotonic() - began < limits_of_host.USB_TURN_SECONDS
    first.close()
    importer = Usbip(second, way.module.name) if way.protocol == USBIP else Usbredir(second)
    works(importer)
    began = time.monotonic()
    assert closed_at_once(way.raw()) and time.monotonic() - began < 10 * limits_of_host.USB_TURN_SECONDS
    works(importer)


def test_a_stranger_is_refused_before_a_byte(host: Host) -> None:
    module = new_module(host)
    way = Way(module, USBIP)
    way.listen("127.0.0.2", "127.0.1.0/24")
    for source in ("127.0.0.1", "127.0.0.3", "127.0.2.1"):
        with way.raw(source) as sock:
            assert closed_at_once(sock)
    assert way.notes("usb-plugged") == []
    assert all("none of those that may" in note["why"] for note in way.notes("usb-refused"))
    for source in ("127.0.0.2", "127.0.1.77"):

        def asked(source: str = source) -> bytes:
            with way.raw(source) as sock:
                sock.sendall(struct.pack(">HHI", 0x0111, 0x8005, 0))
                try:
                    return sock.recv(4)
                except ConnectionResetError:
                    return b""

        assert wait_for(asked) == b"\x01\x11\x00\x05"
    module.destroy()


def test_another_bus_id_is_not_imported(host: Host) -> None:
    module = new_module(host)
    way = Way(module, USBIP)
    way.listen("127.0.0.1")
    with pytest.raises(Stalled, match="4"):  # ST_NODEV
        Usbip(("127.0.0.1", way.port), "another")
    works(way.again())
    module.destroy()


@pytest.mark.slow
def test_nothing_is_imported(host: Host) -> None:
    """Neither protocol lets a connection sit there, whatever it says meanwhile."""
    ways = [Way(new_module(host), USBREDIR), Way(new_module(host), USBIP), Way(new_module(host), USBIP)]
    for way in ways[1:]:
        way.listen("127.0.0.1")
    began = time.monotonic()
    sockets = [way.raw() for way in ways]
    assert sockets[0].recv(4096)[:4] == bytes(4), "usbredir's host speaks first"
    sockets[2].sendall(struct.pack(">HHI", 0x0111, 0x8005, 0))
    sockets[2].recv(4096)
    for sock in sockets:
        assert sock.recv(1) == b""
        assert limits.USB_IMPORT_SECONDS - 1 < time.monotonic() - began < limits.USB_IMPORT_SECONDS + 3
        sock.close()
    for way in ways:
        (note,) = wait_for(lambda way=way: way.notes("usb-unplugged"))
        assert "nothing was imported" in note["why"]
        works(way.again())
        way.module.destroy()


# ---- ends at any time --------------------------------------------------------------------------------------------------


def begins_anew(importer: Importer) -> None:
    """As a reset of the bus: USB/IP has no word for it, there a kernel configures the device again."""
    if isinstance(importer, Usbredir):
        importer.reset()
    importer.configure()


def test_resets_while_a_signature_is_under_way(way: Way) -> None:
    importer = way.importer()
    card, chance = powered(importer), random.Random(1)
    for _ in range(20):
        card.begin(XFR_BLOCK, authenticate(0x82, 0x07, rsa_block()))
        time.sleep(chance.random() * 0.008)
        begins_anew(importer)
        card.power_on()  # the answer that comes is its own
    enters(card)
    card_signs(card)
    assert way.notes("usb-unplugged") == []


def asked_to_sign(importer: Importer, number: int) -> NativeClient:
    """A program that waits for a signature."""
    client = greeted(Socketed(importer, number))
    session = client.open_session()
    (key,) = client.find(session, (ck.CKA_CLASS, ck.CKO_PRIVATE_KEY), (ck.CKA_LABEL, b"mail"))
    client.send(Call.SIGN_ONCE, session, Mechanism(ck.CKM_SHA256_RSA_PKCS), key, b"data", 4096)
    return client


def test_it_goes_while_signatures_are_under_way(way: Way) -> None:
    pid, chance = way.module.pid, random.Random(2)
    for _ in range(6):
        importer = way.again()
        card = powered(importer)
        clients = [asked_to_sign(importer, number) for number in (1, 7, 12)]
        card.begin(XFR_BLOCK, authenticate(0x82, 0x07, rsa_block()))
        importer.submit(READER_IN, 4096)
        time.sleep(chance.random() * 0.008)
        importer.close()
        assert len(clients) == 3
    works(way.again())
    assert way.module.pid == pid
    wait_for(lambda: way.module.status().connections <= 1)


def test_a_channel_closes_while_a_signature_is_under_way(way: Way) -> None:
    importer = way.importer()
    importer.configure()
    for _ in range(10):
        asked_to_sign(importer, 5)
        waits = importer.submit(0x80 | 7, 512)
        importer.set_interface(5, 0)
        with contextlib.suppress(Stalled):  # the signature may have been quicker
            importer.finish(waits)
    works(importer)
    assert way.notes("usb-unplugged") == []


# ---- hostile importers -------------------------------------------------------------------------------------------------


def usbredir_lies() -> dict[str, bytes]:
    def message(kind: int, body: bytes, length: int | None = None) -> bytes:
        return struct.pack("<IIQ", kind, len(body) if length is None else length, 1) + body

    return {
        "a type": message(99, b""),
        "a length": message(BULK, b"", 0xFFFFFFFF),
        "parts": message(BULK, struct.pack("<BBHIH", 0x01, 0, 100, 0, 0)),
        "a second hello": struct.pack("<IIQ", 0, 68, 0) + bytes(68),
        "noise": random.Random(3).randbytes(4096),
        "too much": b"".join(struct.pack("<IIQBBHIH", BULK, 10, 100 + n, READER_IN, 0, 512, 0, 0) for n in range(300)),
    }


def usbip_lies() -> dict[str, bytes]:
    def submit(seqnum: int, endpoint: int, length: int, direction: int, packets: int = 0, command: int = 1) -> bytes:
        return struct.pack(">IIIIIIIIII8x", command, seqnum, 0x00010001, direction, endpoint, 0, length, 0, packets, 0)

    return {
        "a command": submit(1, 0, 0, 0, command=7),
        "a length": submit(1, 1, 0x7FFFFFFF, 0),
        "a negative length": submit(1, 1, 0xFFFFFFFF, 1),
        "isochronous": submit(1, 1, 64, 1, 8),
        "a seqnum twice": submit(100, 1, 64, 1) * 2,
        "noise": random.Random(3).randbytes(4096),
        "too much": b"".join(submit(100 + n, 1, 512, 1) for n in range(300)),
    }


def test_hostile_importers_end_their_own_device_alone(way: Way, host: Host) -> None:
    other = new_module(host)
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(other.address.removeprefix("unix:path="))
    client, ended, made = greeted(sock), threading.Event(), list[float]()

    def sign_on() -> None:
        while not ended.is_set():
            began = time.monotonic()
            client_signs(client)
            made.append(time.monotonic() - began)

    thread = threading.Thread(target=sign_on)
    thread.start()
    pids = way.module.pid, other.pid
    try:
        lies = usbredir_lies() if way.protocol == USBREDIR else usbip_lies()
        for lie in lies.values():
            importer = way.again()
            importer.configure()
            importer.say(lie)
            loses(importer)
            importer.close()
        works(way.again())
        count = len(made)
        wait_for(lambda: len(made) > count, what="another signature")
    finally:
        ended.set()
        thread.join(20)
    sock.close()
    assert not thread.is_alive()
    assert max(made) < 5
    assert (way.module.pid, other.pid) == pids
    whys = [note["why"] for note in way.notes("usb-unplugged")]
    assert len([why for why in whys if why != "the importer is gone"]) == len(lies), whys
    assert not [why for why in whys if why.startswith("fault")], whys
    other.destroy()


def asks_for_descriptors(importer: Importer, number: int) -> bytes:
    if isinstance(importer, Usbredir):
        head = struct.pack("<BBBBHHH", 0x80, 6, 0x80, 0, 0x0200, 0, DESCRIPTORS)
        return struct.pack("<IIQ", CONTROL, len(head), number) + head
    importer.reads[number] = True
    setup = struct.pack("<BBHHH", 0x80, 6, 0x0200, 0, DESCRIPTORS)
    return struct.pack(">IIIIIIIIII", 1, number, 0x00010001, 1, 0, 0, DESCRIPTORS, 0, 0, 0) + setup


def answer(importer: Importer, number: int) -> bytes:
    return importer.until(CONTROL, number)[10:] if isinstance(importer, Usbredir) else importer.ended(3, number)[1]


def test_who_does_not_read_is_not_read_from(way: Way) -> None:
    """Answers that nobody takes are bounded; they come whole and in order when he reads after all."""
    importer = way.importer()
    before, asked = resident(way.module.pid), list[int]()
    importer.sock.settimeout(0.5)
    rest = memoryview(b"")
    with contextlib.suppress(TimeoutError):
        for number in range(1000, 400_000):
            rest = memoryview(asks_for_descriptors(importer, number))
            asked.append(number)
            while rest:
                rest = rest[importer.sock.send(rest) :]
    assert 1000 < len(asked) < 350_000, "it reads on and on"
    assert resident(way.module.pid) - before < 16 << 20
    importer.sock.settimeout(20)
    assert all(len(answer(importer, number)) == DESCRIPTORS for number in asked[:-1])
    importer.say(bytes(rest))
    assert len(answer(importer, asked[-1])) == DESCRIPTORS
    works(importer)


def resident(pid: int) -> int:
    """Bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---- the host comes and goes -------------------------------------------------------------------------------------------


def test_the_host_takes_it_out(host: Host) -> None:
    """By USB/IP alone: QEMU's device is taken out where it is, by QMP."""
    module = new_module(host)
    way = Way(module, USBIP)
    way.listen("127.0.0.1")
    importer = way.importer()
    works(importer)
    waiting = way.raw()
    way.detach()
    loses(importer)
    assert closed_at_once(waiting) and len(way.notes("usb-plugged")) == 1
    with pytest.raises(ConnectionRefusedError):
        way.raw()
    (note,) = way.notes("usb-unplugged")
    assert "the host" in note["why"]
    assert module.status().device.usb.protocol == ""
    way.listen("127.0.0.1")
    works(way.importer())
    module.destroy()


def test_other_ids_come_with_the_next_import(way: Way) -> None:
    """They are changed in service: the importer loses the device, and finds another one."""
    importer = way.importer()
    works(importer)
    settings = pb.ModuleSettings(card=pb.Card(usb_id="20a0:42d4"))
    update = way.host.process.modules.UpdateModule
    update(pb.UpdateModuleRequest(request_id=new_id(), name=way.module.name, settings=settings), timeout=10)
    loses(importer)
    importer = way.again()
    assert importer.control(0x80, 6, 0x0100, 0, 18)[8:12] == bytes.fromhex("a020d442")
    settings.log_signatures = True
    update(pb.UpdateModuleRequest(request_id=new_id(), name=way.module.name, settings=settings), timeout=10)
    works(importer)  # another setting is none of its


def test_a_device_that_was_not_attached_is_not_detached(host: Host) -> None:
    module = new_module(host)
    way = Way(module, USBREDIR)
    importer = way.importer()
    assert refused(way.detach) == (StatusCode.FAILED_PRECONDITION, "NOT_ATTACHED")
    works(importer)
    module.destroy()
    loses(importer)


def test_it_stays_while_the_supervisor_is_another(way: Way) -> None:
    importer = way.importer()
    card = powered(importer)
    channel = Socketed(importer, 4)
    client = greeted(channel)
    for number in (signal.SIGTERM, signal.SIGKILL):
        way.host.stop(number)
        card_signs(card)
        way.host.start()
        way.module.serving()
        card_signs(card)
        client_signs(client)
        told = way.module.status().device.usb
        assert told.protocol == way.protocol and told.peer
        assert closed_at_once(way.raw())
    importer.close()
    works(way.again())


def upgrade(module: Module) -> None:
    asked = pb.UpgradeModuleRequest(request_id=new_id(), name=module.name)
    assert module.host.process.modules.UpgradeModule(asked, timeout=30).old_pid != module.pid


def kill(module: Module) -> None:
    pid = module.pid
    os.kill(pid, signal.SIGKILL)
    module.serving(pid)


@pytest.mark.parametrize("replace", [kill, upgrade])
def test_another_worker(way: Way, replace: Callable[[Module], None]) -> None:
    """The importer's connection ends with its worker, as a device that is pulled out; the next one is plugged in."""
    importer = way.importer()
    works(importer)
    greeted(Socketed(importer, 2))
    replace(way.module)
    loses(importer)
    works(way.again())
    assert len(way.notes("usb-plugged")) >= 2
    assert way.notes("usb-unplugged")
