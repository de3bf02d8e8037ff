"""The log of a guest's measured boot: what its firmware measured, and what PCRs that leads to.

TCG PC Client Platform Firmware Profile 1.05 (PFP), section 10: the crypto agile log, as Linux gives it in
/sys/kernel/security/tpm0/binary_bios_measurements.  It comes from the guest: nothing in it is true before it leads to PCRs that the
TPM has signed, and then of an event the digest, and the words that this is of.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hsmvisor.attestation.event_types import NO_ACTION, described, name

MAX_LOG = 4 << 20  #: bytes
MAX_EVENTS = 16384
MAX_EVENT = 1 << 20  #: bytes of what was measured in one event
MAX_ALGORITHMS = 16

SHA256 = 0x000B  #: TPM_ALG_ID
_DIGEST = 32
_PCRS = 24
_FIRMWARE = range(8)  #: PCRs that the firmware alone extends, and each of them with a separator (PFP 1.05, 3.3.4)
_DYNAMIC = range(17, 23)  #: begin with all bits set (PC Client Platform TPM Profile, 4.6.2)
#: PCRs that a running system goes on extending, with logs of its own: IMA's, systemd's, and those for debugging and applications
#: (UAPI Linux TPM PCR registry), and the dynamic ones.
_SYSTEM = frozenset({10, 11, 15, 16, *_DYNAMIC, 23})
_SIGNATURE = b"Spec ID Event03\0"
_LOCALITY = b"StartupLocality\0"
_LOCALITIES = (0, 3, 4)  #: at which a TPM may be started; 4: H-CRTM events came first (PFP 1.05, 10.4.5.3)

_EVENT1 = struct.Struct("<II20sI")  #: TCG_PCClientPCREvent up to its data: PCR, type, SHA-1, size of the data
_SPEC_ID = struct.Struct("<I4BI")  #: after the signature: platform class, versions, size of UINTN; number of algorithms
_EVENT2 = struct.Struct("<III")  #: TCG_PCR_EVENT2 up to its digests: PCR, type, number of digests
_U8, _U16, _U32, _ALGORITHM = struct.Struct("B"), struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<HH")


class BadLog(Exception):
    """It is no event log; the text says where and why."""


@dataclass(frozen=True)
class Event:
    pcr: int
    type: str  #: as the specification names it
    digest: bytes  #: SHA-256
    description: str  #: what was measured, for people: printable ASCII
    description_measured: bool  #: the digest is of the bytes that the description is made of; else it is the guest's word


@dataclass(frozen=True)
class Log:
    events: tuple[Event, ...]  #: that were measured
    locality: int  #: at which the TPM was started: PCR 0 begins with it


def parse(untrusted_data: bytes) -> Log:
    """Raises BadLog."""
    if len(untrusted_data) > MAX_LOG:
        raise BadLog(f"it has {len(untrusted_data)} bytes, a log has at most {MAX_LOG}")
    reader = _Reader(untrusted_data)
    sizes = _begin(reader)
    events: list[Event] = []
    locality: int | None = None
    while not reader.at_end:
        reader.event += 1
        if reader.event > MAX_EVENTS:
            raise reader.bad(f"a log has at most {MAX_EVENTS} events")
        pcr, kind, digest, data = _event(reader, sizes)
        if kind != NO_ACTION:
            if pcr >= _PCRS:
                raise reader.bad(f"it is of PCR {pcr}, there are {_PCRS}")
            events.append(Event(pcr, name(kind), digest, described(kind, data), hashlib.sha256(data).digest() == digest))
        elif data.startswith(_LOCALITY):
            if locality is not None or any(event.pcr == 0 for event in events):
                raise reader.bad("the locality at startup stands there once, and before what is measured into PCR 0")
            locality = _locality(reader, data[len(_LOCALITY) :])
        # another EV_NO_ACTION says something, and is not measured (PFP 1.05, 10.4.5)
    return Log(tuple(events), locality or 0)


def _begin(reader: _Reader) -> dict[int, int]:
    """Returns the bytes of a digest of each algorithm: the first event, in the form of TPM 1.2, says so (PFP 1.05, 10.4.5.1)."""
    _, kind, _, size = reader.take(_EVENT1)
    end = reader.at + _bounded(reader, size)
    if kind != NO_ACTION or size < len(_SIGNATURE) or reader.bytes(len(_SIGNATURE)) != _SIGNATURE:
        raise reader.bad("it is not a Spec ID Event03, so this is no crypto agile log")
    *_, count = reader.take(_SPEC_ID)
    if not 1 <= count <= MAX_ALGORITHMS:
        raise reader.bad(f"there are digests of {count} algorithms, 1 to {MAX_ALGORITHMS} may be")
    sizes: dict[int, int] = {}
    for _ in range(count):
        algorithm, length = reader.take(_ALGORITHM)
        if algorithm in sizes:
            raise reader.bad(f"it names algorithm {algorithm:#06x} twice")
        sizes[algorithm] = length
    reader.bytes(*reader.take(_U8))  # the vendor's
    if reader.at != end:
        raise reader.bad(f"it is to have {size} bytes, and is of others")
    if sizes.get(SHA256) != _DIGEST:
        raise reader.bad("the log has no digests of SHA-256")
    return sizes


def _event(reader: _Reader, sizes: Mapping[int, int]) -> tuple[int, int, bytes, bytes]:
    """TCG_PCR_EVENT2 (PFP 1.05, 10.2.2); returns its PCR, type, SHA-256 digest and data."""
    pcr, kind, count = reader.take(_EVENT2)
    if count > len(sizes):
        raise reader.bad(f"it has {count} digests, the log is of {len(sizes)} algorithms")
    digests: dict[int, bytes] = {}
    for _ in range(count):
        (algorithm,) = reader.take(_U16)
        if algorithm not in sizes:
            raise reader.bad(f"it has a digest of algorithm {algorithm:#06x}, which the log does not name")
        if algorithm in digests:
            raise reader.bad(f"it has two digests of algorithm {algorithm:#06x}")
        digests[algorithm] = reader.bytes(sizes[algorithm])
    if SHA256 not in digests:
        raise reader.bad("it has no digest of SHA-256")
    (size,) = reader.take(_U32)
    return pcr, kind, digests[SHA256], reader.bytes(_bounded(reader, size))


def _bounded(reader: _Reader, size: int) -> int:
    if size > MAX_EVENT:
        raise reader.bad(f"it is of {size} bytes, at most {MAX_EVENT} may be")
    return size


def _locality(reader: _Reader, data: bytes) -> int:
    if len(data) != 1 or data[0] not in _LOCALITIES:
        raise reader.bad(f"the locality at startup is one byte, {', '.join(map(str, _LOCALITIES))}")
    return data[0]


# ---- and the PCRs -----------------------------------------------------------------------------------------------------------


def replay(log: Log) -> dict[int, bytes]:
    """Returns the PCRs of the SHA-256 bank that the log leads to: those that it names."""
    pcrs: dict[int, bytes] = {}
    for event in log.events:
        before = pcrs.get(event.pcr) or _begun(event.pcr, log.locality)
        pcrs[event.pcr] = hashlib.sha256(before + event.digest).digest()
    return pcrs


def compared(log: Log, pcrs: Iterable[int]) -> list[int]:
    """Returns those of `pcrs` that the log has to lead to, ascending: the firmware's (0 to 7), and others that it names.

    Not those that the running system extends further (10, 11, 15 and higher ones), for which that keeps logs of its own.  What the
    log says of a PCR that is not compared, or not attested, nobody has vouched for.
    """
    named = {event.pcr for event in log.events} - _SYSTEM
    return [pcr for pcr in sorted(set(pcrs)) if pcr in _FIRMWARE or pcr in named]


def compare(log: Log, pcrs: Mapping[int, bytes]) -> list[int]:
    """Returns those of the `compared` PCRs that are not what the log leads to.  One that no event names has to be as it began."""
    led = replay(log)
    return [pcr for pcr in compared(log, pcrs) if pcrs[pcr] != (led.get(pcr) or _begun(pcr, log.locality))]


def _begun(pcr: int, locality: int) -> bytes:
    if pcr in _DYNAMIC:
        return b"\xff" * _DIGEST
    return bytes(_DIGEST - 1) + bytes([locality if pcr == 0 else 0])


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data, self.at = data, 0  #: where it reads
        self._padded = min(len(data.rstrip(b"\0")), len(data.rstrip(b"\xff")))
        self.event = 0  #: which one is read

    @property
    def at_end(self) -> bool:
        """Nothing follows but what the firmware had filled the log's room with: SeaBIOS zeros, edk2 ones.  Linux leaves it out."""
        return self.at >= self._padded

    def bad(self, why: str) -> BadLog:
        return BadLog(f"event {self.event}, up to byte {self.at}: {why}")

    def bytes(self, size: int) -> bytes:
        part = self._data[self.at : self.at + size]
        if len(part) < size:
            raise self.bad(f"{size} bytes are to follow, {len(part)} do")
        self.at += size
        return part

    def take(self, form: struct.Struct) -> tuple[int, ...]:
        return form.unpack(self.bytes(form.size))
