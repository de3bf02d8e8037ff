"""What a worker hands to its successor: the records on the socket between the two, in this order.

    SavedModule, SavedDevice if the module is one, then for each application SavedApplication and its SavedConnections (each
    with its socket as descriptor), then Pause.  Applications that could not be handed over at once follow, and then the end of
    the stream.

Each record is framed by its length, `u32` big-endian.  The successor trusts none of it further than it would its guest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from hsmvisor_rpc.sealed.canonical import Record

READY = b"\1"  #: the successor has opened the state and waits


@dataclass(frozen=True)
class SavedModule(Record):
    TYPE: ClassVar[str] = "saved-module"
    epoch: int
    slot_events: int


@dataclass(frozen=True)
class SavedDevice(Record):
    """Its state (hsmvisord/transport/vsock/saved.py) follows in DeviceParts: data that waits in streams may be more than a record.
    Descriptors: the connection of the front-end, the memory of stream keys, and those of the state; as many as one message
    bears, the others with Descriptors records that follow, before the parts.  The device stands still until Pause."""

    TYPE: ClassVar[str] = "saved-device"
    plug: int
    cid: int
    size: int  #: bytes of the state
    descriptors: int


@dataclass(frozen=True)
class DevicePart(Record):
    """The next bytes of a device's state."""

    TYPE: ClassVar[str] = "device-part"
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class Descriptors(Record):
    """More of them."""

    TYPE: ClassVar[str] = "descriptors"
    count: int


@dataclass(frozen=True)
class SavedApplication(Record):
    """One C_Initialize.  `sessions` are triples of handle, slot, flags; `objects` and `operations` are encoded records."""

    TYPE: ClassVar[str] = "saved-application"
    ticket: bytes
    program: str
    watermark: int
    logged_in: bool
    seen_slot_events: int
    next_session: int
    next_object: int
    connections: int  #: SavedConnections that follow
    sessions: tuple[int, ...]
    objects: tuple[bytes, ...] = field(repr=False)
    operations: tuple[bytes, ...] = field(repr=False)
    guest_role: int  #: who is logged in to slot 1: CKU_ and 1; 0: nobody
    guest_objects: tuple[bytes, ...] = field(repr=False)  #: session objects of slot 1


@dataclass(frozen=True)
class SavedObject(Record):
    """A session object.  An attribute's value is `u` and 8 bytes, `b` and one byte, or `y` and bytes."""

    TYPE: ClassVar[str] = "saved-object"
    session: int
    handle: int
    attributes: tuple[int, ...]
    values: tuple[bytes, ...] = field(repr=False)


@dataclass(frozen=True)
class SavedGuestObject(Record):
    """A session object of slot 1.  `object` is the record that the keystore keeps of a token object."""

    TYPE: ClassVar[str] = "saved-guest-object"
    session: int
    object: bytes = field(repr=False)


@dataclass(frozen=True)
class SavedOperation(Record):
    """An open operation, as the requests that made it; they are carried out again."""

    TYPE: ClassVar[str] = "saved-operation"
    frames: tuple[bytes, ...] = field(repr=False)


@dataclass(frozen=True)
class SavedConnection(Record):
    """Descriptor: its socket.  `application` is empty before C_Initialize."""

    TYPE: ClassVar[str] = "saved-connection"
    application: bytes
    number: int
    greeting: int  #: the client's first byte; NOT_GREETED when it has not come
    ulong_size: int
    peer: str
    program: str
    pid: int
    refused: bool
    used: str  #: JSON: what it was used for: operation, mechanism, material, generation
    received: bytes = field(repr=False)  #: not yet answered
    unsent: bytes = field(repr=False)
    parked: tuple[bytes, ...] = field(repr=False)  #: frames of requests that wait
    parked_ms: tuple[int, ...]  #: how long each still waits; 0 = for ever


NOT_GREETED = 256


@dataclass(frozen=True)
class Pause(Record):
    """All that could be handed over at once has been."""

    TYPE: ClassVar[str] = "pause"
    lingering: int  #: applications that follow
