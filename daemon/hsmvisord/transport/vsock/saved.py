"""All that a successor needs to go on with a device: values, and descriptors.

Descriptors stand in it as numbers, -1 where there is none.  To be sent to another process: `encode()` and `descriptors()`, and
there `Saved.decode(data, descriptors)`.  Whoever keeps it in between need not understand it.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from hsmvisord import limits


@dataclass(frozen=True)
class SavedRegion:
    """Memory of the guest."""

    guest_address: int
    size: int
    user_address: int  #: where the front-end has it
    offset: int  #: in the file
    fd: int = -1


@dataclass(frozen=True)
class SavedRing:
    num: int = 0  #: descriptors
    table: int = 0  #: user addresses
    avail: int = 0
    used: int = 0
    base: int = 0  #: where it began; a successor goes on at used.idx of a ring that is started
    enabled: bool = False
    started: bool = False
    kick: int = -1
    call: int = -1


@dataclass(frozen=True)
class SavedStream:
    """A stream that lives on in a planned successor."""

    guest_port: int
    our_port: int
    slot: int  #: in StreamKeys
    state: str  #: of wire.virtio_vsock.State
    owed: int  #: of wire.virtio_vsock.Owed
    shutdown: int  #: flags that are told the guest
    buffer: int  #: bytes: our buf_alloc
    received: int  #: counters modulo 2**32
    forwarded: int
    told: int
    sent: int
    guest_buffer: int
    guest_forwarded: int
    pending: bytes  #: from the guest, not yet taken by the reader
    fd: int = -1  #: our end of its socketpair


@dataclass(frozen=True)
class SavedReset:
    """An RST that the guest has not got yet."""

    guest_port: int
    our_port: int
    type: int
    slot: int  #: in StreamKeys, cleared when it is sent; -1 = none


@dataclass(frozen=True)
class Saved:
    features: int = 0  #: acknowledged
    protocol_features: int = 0
    regions: tuple[SavedRegion, ...] = ()
    rings: tuple[SavedRing, ...] = (SavedRing(), SavedRing())  #: two: to the guest, from the guest
    streams: tuple[SavedStream, ...] = ()  #: only of `Device.suspend`
    resets: tuple[SavedReset, ...] = ()  #: likewise

    def descriptors(self) -> list[int]:
        """Returns those that there are, in the order that `decode` takes them: regions, kick and call of each ring, streams."""
        return [fd for fd in self._all() if fd >= 0]

    def _all(self) -> Iterator[int]:
        yield from (region.fd for region in self.regions)
        for ring in self.rings:
            yield from (ring.kick, ring.call)
        yield from (stream.fd for stream in self.streams)

    def with_descriptors(self, descriptors: Sequence[int]) -> Saved:
        """Returns the same with other numbers, in the order of `descriptors()`; raises ValueError when there are more or less."""
        if len(descriptors) != len(self.descriptors()):
            raise ValueError(f"{len(descriptors)} descriptors, {len(self.descriptors())} are named")
        given = iter(descriptors)

        def other(fd: int) -> int:
            return next(given) if fd >= 0 else -1

        regions = tuple(replace(region, fd=other(region.fd)) for region in self.regions)
        rings = tuple(replace(ring, kick=other(ring.kick), call=other(ring.call)) for ring in self.rings)
        streams = tuple(replace(stream, fd=other(stream.fd)) for stream in self.streams)
        return replace(self, regions=regions, rings=rings, streams=streams)

    def encode(self) -> bytes:
        return json.dumps(asdict(self), default=lambda value: b64encode(value).decode("ascii")).encode("ascii")

    @classmethod
    def decode(cls, data: bytes, descriptors: Sequence[int]) -> Saved:
        """Raises ValueError on anything that `encode` does not make; the descriptors are the caller's then."""
        raw = json.loads(data)
        if not isinstance(raw, dict) or raw.keys() != {field.name for field in fields(cls)}:
            raise ValueError("not a saved device")
        made = cls(
            _number(raw["features"]),
            _number(raw["protocol_features"]),
            _row(SavedRegion, raw["regions"], limits.MAX_REGIONS),
            _row(SavedRing, raw["rings"], 2),
            _row(SavedStream, raw["streams"], limits.MAX_STREAMS),
            _row(SavedReset, raw["resets"], 2 * limits.MAX_STREAMS + limits.MAX_RESETS),
        )
        if len(made.rings) != 2:
            raise ValueError("a device has two rings")
        return made.with_descriptors(descriptors)


def _number(value: Any) -> int:
    if type(value) is not int or not -1 <= value < 1 << 64:
        raise ValueError("not a number")
    return value


def _row(kind: type[Any], raw: Any, most: int) -> Any:
    if not isinstance(raw, list) or len(raw) > most:
        raise ValueError(f"not at most {most} {kind.__name__}")
    return tuple(_one(kind, item) for item in raw)


def _one(kind: type[Any], raw: Any) -> Any:
    if not isinstance(raw, dict) or raw.keys() != {field.name for field in fields(kind)}:
        raise ValueError(f"not a {kind.__name__}")
    made: dict[str, Any] = {}
    for field in fields(kind):
        value = raw[field.name]
        if field.type == "int":
            made[field.name] = _number(value)
        elif (field.type == "bool" and isinstance(value, bool)) or (field.type == "str" and isinstance(value, str)):
            made[field.name] = value
        elif field.type == "bytes" and isinstance(value, str) and len(value) <= 2 * limits.STREAM_BUFFER:
            made[field.name] = b64decode(value, validate=True)
        else:
            raise ValueError(f"{field.name} of a {kind.__name__}")
    return kind(**made)
