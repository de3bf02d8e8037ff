"""What OpenSC 0.23 and ykcs11 2.2 do when the key or the certificate of a card changes under them: each row of the table in
control_domain/docs/usb.md, "When a key is renewed".

Whatever a library does, a signature fits the certificate that its program holds, or there is none: CardClient checks each.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisord import limits
from support.card_client import CardClient, Certificates
from support.certificates import Authority, PrivateKey, new_key
from support.guest_machine import GuestMachine
from support.host import Host
from support.host_process import new_id
from support.usb_guest import IDS, OPENSC, PIN, USBIP, USBREDIR, YKCS11, CardGuest, Plug, until

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(600)]

MESSAGE = b"what a guest has to sign"
SELECT, VERIFY = "00A4040005A000000308", f"0020008008{PIN.encode().ljust(8, bytes([255])).hex()}"
SIGN = "0087119A267C2482008120" + "11" * 32  #: a digest, by P-256 in 9A


@dataclass(frozen=True)
class Library:
    name: str
    path: str
    ids: str  #: of the device
    gone: str  #: what C_Sign returns once the card was out
    refused: str  #: and when the device came back with another key
    after_watching: str  #: what a program gets that has seen the card go
    reopens: str  #: what a program does that was asleep meanwhile
    caches: bool  #: the certificate, until it is initialized again
    goes_on: bool  #: when the device comes back


OF_OPENSC = Library(
    name="OpenSC",
    path=OPENSC,
    ids=IDS,
    gone="C_Sign: CKR_DEVICE_REMOVED",
    refused="C_Sign: CKR_FUNCTION_FAILED",
    after_watching="C_SignInit: CKR_SESSION_HANDLE_INVALID",
    reopens="slots open sign",
    caches=True,
    goes_on=True,
)
OF_YKCS11 = Library(
    name="ykcs11",
    path=YKCS11,
    ids="1050:0404",
    gone="C_Sign: CKR_DEVICE_ERROR",
    refused="C_Sign: CKR_DEVICE_ERROR",
    after_watching="C_SignInit: CKR_USER_NOT_LOGGED_IN",
    reopens="close open sign",
    caches=False,
    goes_on=False,
)


class Stand:
    """A module with one key in 9A, a machine that has its card, and programs there with one of the libraries."""

    def __init__(self, host: Host, machine: GuestMachine, library: Library, protocol: str) -> None:
        self.machine, self.library, self._authority = machine, library, Authority()
        self.certificates, self._numbers, self._clients = Certificates(), itertools.count(1), list[CardClient]()
        self.module = host.create("web-1", card=pb.Card(slots={"9a": "web"}, yubikey=library is OF_YKCS11))
        pin = pb.SetPinRequest(request_id=new_id(), name="web-1", pin=PIN.encode())
        host.process.modules.SetPin(pin, timeout=10)
        self.change_key()
        self.guest, self.plug = CardGuest(machine), Plug(host, self.module, machine, protocol)

    # ---- the host -----------------------------------------------------------------------------------------------

    def change_key(self) -> None:
        """Returns when the card has gone out, or is about to."""
        self.key = new_key("p256")
        self._push(self.key)

    def renew_certificate(self) -> None:
        self._push(None)

    def _push(self, key: PrivateKey | None) -> None:
        chain = self._authority.chain(self.key)
        self.certificate = self.certificates.add(chain[0])
        self.pem = chain[0].public_bytes(serialization.Encoding.PEM)
        self.module.push("web", key, chain, profile="card")

    def replug_for_keys(self, replug: bool) -> None:
        """Returns when the device has come back under its other serial number."""
        before = self.device()
        card = pb.Card(slots={"9a": "web"}, yubikey=self.library is OF_YKCS11, replug=replug)
        settings = pb.ModuleSettings(card=card)
        update = pb.UpdateModuleRequest(request_id=new_id(), name=self.module.name, settings=settings)
        self.module.host.process.modules.UpdateModule(update, timeout=10)
        self.plug.come_back()
        self.wait_for_device(before)

    def kill_worker(self) -> None:
        pid = self.module.pid
        os.kill(pid, signal.SIGKILL)
        self.module.serving(not_pid=pid)

    def replace_worker(self) -> None:
        upgrade = pb.UpgradeModuleRequest(request_id=new_id(), name=self.module.name)
        self.module.host.process.modules.UpgradeModule(upgrade, timeout=30)

    # ---- the machine --------------------------------------------------------------------------------------------

    def wait_for_card(self) -> None:
        """After another key.  No certificate is read."""
        time.sleep(limits.CARD_OUT_SECONDS)
        until(lambda: self.transmit(SELECT) == "9000", "the card")

    def device(self) -> str:
        """Its number on the bus, "" while there is none: another one each time."""
        found = re.search(rf"Device (\d+): ID {self.library.ids}", self.guest.devices())
        return found[1] if found else ""

    def wait_for_device(self, before: str) -> None:
        until(lambda: self.device() not in ("", before), "the device to come back")
        until(lambda: self.transmit(SELECT) == "9000", "its card")

    def transmit(self, *commands: str) -> str:
        """Returns the last one's status word, as the card gives it, "" where there is no card."""
        words = " ".join(f"-s {command}" for command in commands)
        said = self.guest.run(f"opensc-tool --card-driver default {words}", check=False)
        found = re.findall(r"SW1=0x(..), SW2=0x(..)", said)
        return "".join(found[-1]) if len(found) == len(commands) else ""

    def client(self) -> CardClient:
        """A program that has signed."""
        client = CardClient(self.machine, f"client{next(self._numbers)}", self.library.path, self.certificates)
        self._clients.append(client)
        assert client.does("open sign").certificate == self.certificate
        return client

    def end_clients(self) -> None:
        while self._clients:
            self._clients.pop().end()

    def check_pkcs11_tool(self) -> None:
        """A program that begins now signs with the newest key."""
        public = self.key.public_key()
        assert isinstance(public, ec.EllipticCurvePublicKey)
        public.verify(self.guest.sign("01", MESSAGE, library=self.library.path), MESSAGE, ec.ECDSA(hashes.SHA256()))


WAYS = [(library, protocol) for library in (OF_OPENSC, OF_YKCS11) for protocol in (USBREDIR, USBIP)]


@pytest.fixture(scope="module", params=WAYS, ids=lambda way: f"{way[0].name}-{way[1]}")
def machine_of(request: pytest.FixtureRequest) -> Iterator[Stand]:
    with Host() as host, GuestMachine() as machine:
        stand = Stand(host, machine, *request.param)
        stand.guest.start_pcscd(stand.library.ids)
        stand.plug.plug_in()
        stand.guest.wait_for_card()
        yield stand


@pytest.fixture
def stand(machine_of: Stand) -> Iterator[Stand]:
    yield machine_of
    machine_of.end_clients()


def test_a_certificate_is_renewed_in_silence(stand: Stand) -> None:
    """Who has it open goes on with the old one; who begins reads the new one."""
    before = stand.certificate
    open_, looping = stand.client(), stand.client()
    looping.loop()
    stand.renew_certificate()
    looping.goes_on()
    assert all(said.signed for said in looping.end_loop())
    assert open_.does("sign").certificate == before
    stand.client()  # which reads the new one
    looping.does("sign")
    assert open_.does("sign").certificate == before
    assert open_.does("close open sign").certificate == (before if stand.library.caches else stand.certificate)
    assert open_.does("renew open sign").certificate == stand.certificate
    stand.check_pkcs11_tool()


def test_another_key(stand: Stand) -> None:
    """A program that sleeps through it with a session, one that signs on and on, one that sees the card go; and each recovers."""
    library, before = stand.library, stand.certificate
    asleep, looping, watching = stand.client(), stand.client(), stand.client()
    watching.say("watch")
    looping.loop()
    stand.change_key()
    stand.wait_for_card()
    signed = [said.signed for said in looping.end_loop()]
    assert signed == sorted(signed, reverse=True) and not signed[-1], "until it went, and not from then on"
    assert stand.transmit(SELECT, VERIFY, SIGN) == "6985", "the card itself, with the PIN"
    assert asleep.fails("sign") == library.gone
    asleep.do("login")
    assert asleep.fails("sign") == library.gone
    assert watching.look()[-1].word == "watch"
    assert watching.fails("sign") == library.after_watching
    if library is OF_YKCS11:
        assert watching.does("slots open").certificate == before, "the objects that it has, while a session is open"
        assert watching.fails("sign") == library.gone, "the card refuses"
    assert asleep.does(library.reopens).certificate == stand.certificate
    assert stand.transmit(SELECT, VERIFY, SIGN) == "9000", "the new certificate was read"
    if library is OF_OPENSC:
        assert looping.fails("sign") == library.gone, "another program has read it, this one has not"
    assert looping.does(library.reopens).certificate == stand.certificate
    assert watching.does(library.reopens).certificate == stand.certificate
    stand.check_pkcs11_tool()


def test_another_key_and_a_program_that_is_initialized_again(stand: Stand) -> None:
    """C_Finalize and C_Initialize always do; and the tools, each of which begins anew."""
    asleep = stand.client()
    card_id, before = stand.guest.card_id(), stand.pem
    stand.change_key()
    stand.wait_for_card()
    if stand.library is OF_YKCS11:
        check_yubico_piv_tool(stand, before)
    assert asleep.does("renew open sign").certificate == stand.certificate
    assert stand.guest.card_id() != card_id
    stand.check_pkcs11_tool()


def check_yubico_piv_tool(stand: Stand, before: bytes) -> None:
    """Which has its certificate from a file."""
    tool, machine = "yubico-piv-tool -a verify-pin -P 123456", stand.machine
    machine.write("/root/before.pem", before)
    machine.write("/root/now.pem", stand.pem)
    for name in ("before", "now"):
        said = stand.guest.run(f"{tool} -a test-signature -s 9a -i /root/{name}.pem", check=False)
        assert "Successfully verified PIN" in said and "Failed signing" in said, "nobody has read the new one from the card"
    assert stand.certificate in stand.guest.run("yubico-piv-tool -a status")
    said = stand.guest.run(f"{tool} -a test-signature -s 9a -i /root/now.pem")
    assert "Successful ECDSA verification" in said


def test_a_device_that_comes_back_with_the_same_key(stand: Stand) -> None:
    """Its worker was killed, and replaced."""
    library, asleep, looping = stand.library, stand.client(), stand.client()
    for act in (stand.kill_worker, stand.replace_worker):
        looping.loop()
        before = stand.device()
        act()
        stand.plug.come_back()
        stand.wait_for_device(before)
        if library.goes_on:
            asleep.does("sign")
            looping.goes_on()
            looping.end_loop()
        else:
            assert asleep.fails("sign") == library.gone
            assert looping.end_loop()[-1].failed == library.gone
            for client in (asleep, looping):
                assert client.does("slots open sign").certificate == stand.certificate
    stand.check_pkcs11_tool()


def test_a_device_that_comes_back_with_another_key(stand: Stand) -> None:
    before, asleep = stand.device(), stand.client()
    stand.plug.pull_out()
    until(lambda: not stand.device(), "the device to go")
    stand.change_key()
    stand.plug.plug_in()
    stand.wait_for_device(before)
    assert stand.transmit(SELECT, VERIFY, SIGN) == "6985"
    for word in ("sign", "login", "sign"):
        said = asleep.do(word)
        assert word == "login" or said.failed == stand.library.refused
    assert asleep.does("renew open sign").certificate == stand.certificate
    stand.check_pkcs11_tool()


def test_a_card_that_is_another_device_for_another_key(stand: Stand) -> None:
    """Whoever holds the old certificate is cut off, whatever other programs have read."""
    stand.replug_for_keys(True)
    asleep, awake = stand.client(), stand.client()
    for _ in range(2):
        if stand.library is OF_YKCS11:  # OpenSC 0.23 may end with SIGSEGV where its reader goes while it signs
            awake.loop()
        before = stand.device()
        stand.change_key()
        stand.plug.come_back()
        stand.wait_for_device(before)
        if stand.library is OF_YKCS11:
            assert awake.end_loop()[-1].failed
        stand.client()  # reads the new certificate, and signs
        for client in (asleep, awake):
            for word in ("sign", "login", "sign"):
                said = client.do(word)
                assert word == "login" or said.failed
            assert client.does("renew open sign").certificate == stand.certificate
    before, device = stand.certificate, stand.device()
    stand.renew_certificate()
    assert asleep.does("sign").certificate == before and stand.device() == device, "a certificate alone is renewed in silence"
    stand.replug_for_keys(False)
    stand.check_pkcs11_tool()
