"""What a worker hears from its supervisor and answers, done once in the launcher (transport/rehearsal.py says why)."""

from __future__ import annotations

import json

from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.internal.frames import Frame, FrameReader, Kind, encode_frame
from hsmvisor_rpc.internal.phases import SUPERVISOR_MAY, by_type, descriptors_of
from hsmvisor_rpc.sealed.canonical import Record, record_type

from hsmvisord.transport.rehearsal import TIMES
from hsmvisord.worker.settings import parse_settings

_HEARD: tuple[Record, ...] = (
    m.Attach(m.PROTOCOL, 1),
    m.LoadState(("meta",), (bytes(100),)),
    m.Boot(bytes(32), bytes(32), 0, 1, "{}"),
    m.Execute("request", bytes(400)),
    m.QueryStatus(),
    m.Done(),
)
_SAID: tuple[Record, ...] = (
    m.Attached(m.PROTOCOL, "empty", bytes(16), "rehearsal", 1, b"", b"", json.dumps({"measures": []})),
    m.Booted(bytes(32), bytes(32), "{}"),
    m.StoreState(1, "", b"", ("meta",), (bytes(100),), ()),
    m.Event("rehearsal", 1, "{}"),
    m.Done(),
)


def run() -> None:
    known = by_type(frozenset().union(*SUPERVISOR_MAY.values())) | by_type(frozenset((m.Done,)))
    for _ in range(TIMES):
        reader = FrameReader()
        for record in _HEARD:
            for frame in reader.feed(encode_frame(Frame(1, Kind.REQUEST, record.encode()))):
                descriptors_of(known[record_type(frame.payload)].decode(frame.payload))
        for record in _SAID:
            encode_frame(Frame(1, Kind.REPLY, record.encode()))
        parse_settings(json.dumps({"policy": {"mechanisms": [], "rate": 0}, "cryptoprocessor": ""}))
