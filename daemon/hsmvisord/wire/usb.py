"""USB 2.0 as far as a device's function and its transports need it: requests, transfers, and how they end.  Sans-IO.

Numbers and names are those of the standard's chapter 9.
"""

from __future__ import annotations

import struct
from enum import Enum
from typing import NamedTuple

IN = 0x80  #: of bEndpointAddress and of bmRequestType

GET_STATUS, CLEAR_FEATURE, SET_FEATURE, SET_ADDRESS = 0, 1, 3, 5
GET_DESCRIPTOR, SET_DESCRIPTOR, GET_CONFIGURATION, SET_CONFIGURATION = 6, 7, 8, 9
GET_INTERFACE, SET_INTERFACE = 10, 11

DEVICE, CONFIGURATION, STRING, INTERFACE, ENDPOINT = 1, 2, 3, 4, 5  #: bDescriptorType

STANDARD, CLASS = 0x00, 0x20  #: bmRequestType, bits 5 and 6
TO_DEVICE, TO_INTERFACE, TO_ENDPOINT = 0, 1, 2  #: bits 0 to 4

CONTROL, ISOCHRONOUS, BULK, INTERRUPT = 0, 1, 2, 3  #: of endpoints

ENDPOINT_HALT = 0  #: feature selector

_SETUP = struct.Struct("<BBHHH")


class BrokenPeer(Exception):
    """The importer says what cannot be; the connection cannot go on.  The text says what."""


class Setup(NamedTuple):
    """The eight bytes that begin a control transfer (USB 2.0, 9.3)."""

    request_type: int
    request: int
    w_value: int
    w_index: int
    w_length: int

    @classmethod
    def decode(cls, data: bytes) -> Setup:
        """Of eight bytes."""
        return cls._make(_SETUP.unpack(data))

    def encode(self) -> bytes:
        return _SETUP.pack(*self)

    @property
    def to_host(self) -> bool:
        return bool(self.request_type & IN)


class Urb(NamedTuple):
    """One transfer that the importer asks for.  `length`: IN, the room for data; OUT, the length of `data`."""

    ident: int
    endpoint: int  #: bEndpointAddress; 0 for control
    length: int
    data: bytes = b""
    setup: Setup | None = None


class Status(Enum):
    OK = "ok"
    STALL = "stall"  #: the request is not known, or the endpoint is halted
    INVALID = "invalid"  #: there is no such endpoint now
    CANCELLED = "cancelled"  #: its endpoint went away: a reset, another configuration, another alternate setting


class Done(NamedTuple):
    """How a transfer ended.  `data`: what came IN; `length`: how much went OUT."""

    ident: int
    endpoint: int
    status: Status
    data: bytes = b""
    length: int = 0


class Submit(NamedTuple):
    urb: Urb


class Cancel(NamedTuple):
    ident: int


class Reset(NamedTuple):
    """The bus was reset."""


Event = Submit | Cancel | Reset
