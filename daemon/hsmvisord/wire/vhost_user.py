"""vhost-user messages, as far as a vsock device needs them (QEMU docs/interop/vhost-user.rst).  Sans-IO.

A message is `u32 request, u32 flags, u32 size` and a payload, in the processor's byte order (little-endian here); descriptors come
with it.  `decode` gives one that can be: its payload has the size that is its own, and it has as many descriptors as it may have.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import NamedTuple

from hsmvisord import limits

HEADER = struct.Struct("<III")
VERSION, VERSION_MASK, REPLY, NEED_REPLY = 1, 3, 4, 8

VIRTIO_F_VERSION_1 = 1 << 32
F_PROTOCOL_FEATURES = 1 << 30
FEATURES = VIRTIO_F_VERSION_1 | F_PROTOCOL_FEATURES
QUEUES = 2  #: to the guest, from the guest; the event queue stays in QEMU
MAX_CONFIG = 256  #: bytes

_U64 = struct.Struct("<Q")
_STATE = struct.Struct("<II")
_ADDRESSES = struct.Struct("<IIQQQQ")
_TABLE = struct.Struct("<II")
_REGION = struct.Struct("<QQQQ")
_CONFIG = struct.Struct("<III")


class ProtocolFeature(IntFlag):
    MQ = 1 << 0
    REPLY_ACK = 1 << 3
    CONFIG = 1 << 9


PROTOCOL_FEATURES = int(ProtocolFeature.MQ | ProtocolFeature.REPLY_ACK | ProtocolFeature.CONFIG)  #: int: its ~ has all bits


class Request(IntEnum):
    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    GET_CONFIG = 24
    SET_STATUS = 39


ANSWERED = {Request.GET_FEATURES, Request.GET_VRING_BASE, Request.GET_PROTOCOL_FEATURES, Request.GET_QUEUE_NUM, Request.GET_CONFIG}


class BrokenMessage(Exception):
    """The front-end says what cannot be; the connection cannot go on."""


class Head(NamedTuple):
    request: int
    flags: int
    size: int  #: bytes of the payload


class RingState(NamedTuple):
    """SET_VRING_NUM, SET_VRING_BASE, GET_VRING_BASE, SET_VRING_ENABLE."""

    ring: int
    number: int


class RingAddresses(NamedTuple):
    """User addresses."""

    ring: int
    table: int
    used: int
    avail: int


class RingFile(NamedTuple):
    """SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR."""

    ring: int
    fd: int  #: -1: none


class Region(NamedTuple):
    guest_address: int
    size: int
    user_address: int
    offset: int
    fd: int


class Config(NamedTuple):
    offset: int
    size: int
    flags: int


@dataclass(frozen=True)
class Message:
    request: Request
    need_reply: bool  #: and it has no answer of its own
    body: object  #: an int, a tuple of Regions, or one of the classes above; None where there is no payload


def decode_head(data: bytes) -> Head:
    """Takes HEADER.size bytes; raises BrokenMessage."""
    head = Head(*HEADER.unpack(data))
    if head.flags & VERSION_MASK != VERSION or head.flags & REPLY:
        raise BrokenMessage(f"flags 0x{head.flags:x} of message {head.request}")
    if head.size > limits.MAX_VHOST_PAYLOAD:
        raise BrokenMessage(f"message {head.request} of {head.size} bytes")
    return head


def has_descriptors(head: Head, payload: bytes) -> bool:
    """Whether descriptors belong to the message."""
    if head.request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
        return len(payload) > 1 and not payload[1] & 1
    return head.request == Request.SET_MEM_TABLE


def decode(head: Head, payload: bytes, descriptors: list[int]) -> Message:
    """Raises BrokenMessage; then the descriptors are the caller's still, else they are the message's."""
    try:
        request = Request(head.request)
    except ValueError:
        raise BrokenMessage(f"message {head.request} is not known, and was not offered") from None
    try:
        body = _BODIES[request](payload, descriptors)
    except struct.error:
        raise BrokenMessage(f"{request.name} with {len(payload)} bytes") from None
    return Message(request, bool(head.flags & NEED_REPLY) and request not in ANSWERED, body)


def reply(request: Request, payload: bytes) -> bytes:
    return HEADER.pack(request, VERSION | REPLY, len(payload)) + payload


def reply_number(request: Request, number: int) -> bytes:
    """The answer that is one u64; of REPLY_ACK, 0 is "done"."""
    return reply(request, _U64.pack(number))


def reply_state(request: Request, index: int, number: int) -> bytes:
    return reply(request, _STATE.pack(index, number))


def reply_config(config: Config, content: bytes) -> bytes:
    """`content`: all of the device's configuration.  What lies beyond is refused by an answer without payload."""
    if config.offset + config.size > len(content):
        return reply(Request.GET_CONFIG, b"")
    part = content[config.offset : config.offset + config.size]
    return reply(Request.GET_CONFIG, _CONFIG.pack(*config) + part)


# ---- payloads -------------------------------------------------------------------------------------------------------------


def _no_descriptors(descriptors: list[int]) -> None:
    if descriptors:
        raise BrokenMessage(f"{len(descriptors)} descriptors where there are none")


def _nothing(payload: bytes, descriptors: list[int]) -> None:
    _no_descriptors(descriptors)
    if payload:
        raise BrokenMessage(f"{len(payload)} bytes where there are none")


def _u64(payload: bytes, descriptors: list[int]) -> int:
    _no_descriptors(descriptors)
    return int(_U64.unpack(payload)[0])


def _index(index: int) -> int:
    if index >= QUEUES:
        raise BrokenMessage(f"ring {index}")
    return index


def _state(payload: bytes, descriptors: list[int]) -> RingState:
    _no_descriptors(descriptors)
    index, number = _STATE.unpack(payload)
    return RingState(_index(index), number)


def _size(payload: bytes, descriptors: list[int]) -> RingState:
    state = _state(payload, descriptors)
    if not 0 < state.number <= limits.MAX_RING or state.number & (state.number - 1):
        raise BrokenMessage(f"a ring of {state.number} descriptors")
    return state


def _base(payload: bytes, descriptors: list[int]) -> RingState:
    state = _state(payload, descriptors)
    if state.number > 0xFFFF:
        raise BrokenMessage(f"a ring that begins at {state.number}")
    return state


def _enable(payload: bytes, descriptors: list[int]) -> RingState:
    state = _state(payload, descriptors)
    if state.number > 1:
        raise BrokenMessage(f"SET_VRING_ENABLE {state.number}")
    return state


def _addresses(payload: bytes, descriptors: list[int]) -> RingAddresses:
    _no_descriptors(descriptors)
    index, flags, table, used, avail, _log = _ADDRESSES.unpack(payload)
    if flags:
        raise BrokenMessage(f"flags 0x{flags:x} of a ring")  # VHOST_VRING_F_LOG: not offered
    return RingAddresses(_index(index), table, used, avail)


def _file(payload: bytes, descriptors: list[int]) -> RingFile:
    value = _U64.unpack(payload)[0]
    if value & ~0x1FF:
        raise BrokenMessage(f"ring 0x{value:x}")
    if len(descriptors) != (0 if value & 0x100 else 1):
        raise BrokenMessage(f"{len(descriptors)} descriptors of a ring")
    return RingFile(_index(value & 0xFF), descriptors[0] if descriptors else -1)


def _kick(payload: bytes, descriptors: list[int]) -> RingFile:
    file = _file(payload, descriptors)
    if file.fd < 0:
        raise BrokenMessage("a ring without a kick descriptor, to be polled")
    return file


def _table(payload: bytes, descriptors: list[int]) -> tuple[Region, ...]:
    count, _ = _TABLE.unpack_from(payload)
    if not 0 < count <= limits.MAX_REGIONS:
        raise BrokenMessage(f"{count} regions of memory")
    if len(descriptors) != count:
        raise BrokenMessage(f"{count} regions of memory with {len(descriptors)} descriptors")
    if len(payload) < _TABLE.size + count * _REGION.size:  # some front-ends send all eight
        raise BrokenMessage(f"{count} regions of memory in {len(payload)} bytes")
    rows = (_REGION.unpack_from(payload, _TABLE.size + number * _REGION.size) for number in range(count))
    return tuple(Region._make((*row, fd)) for row, fd in zip(rows, descriptors, strict=True))


def _config(payload: bytes, descriptors: list[int]) -> Config:
    _no_descriptors(descriptors)
    config = Config(*_CONFIG.unpack_from(payload))
    if config.size > MAX_CONFIG or config.offset > MAX_CONFIG or len(payload) != _CONFIG.size + config.size:
        raise BrokenMessage(f"GET_CONFIG of {config.size} bytes at {config.offset} in {len(payload)}")
    return config


_BODIES: dict[Request, Callable[[bytes, list[int]], object]] = {
    Request.GET_FEATURES: _nothing,
    Request.SET_FEATURES: _u64,
    Request.SET_OWNER: _nothing,
    Request.SET_MEM_TABLE: _table,
    Request.SET_VRING_NUM: _size,
    Request.SET_VRING_ADDR: _addresses,
    Request.SET_VRING_BASE: _base,
    Request.GET_VRING_BASE: _state,
    Request.SET_VRING_KICK: _kick,
    Request.SET_VRING_CALL: _file,
    Request.SET_VRING_ERR: _file,
    Request.GET_PROTOCOL_FEATURES: _nothing,
    Request.SET_PROTOCOL_FEATURES: _u64,
    Request.GET_QUEUE_NUM: _nothing,
    Request.SET_VRING_ENABLE: _enable,
    Request.GET_CONFIG: _config,
    Request.SET_STATUS: _u64,
}
