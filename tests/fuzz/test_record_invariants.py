"""Properties of the canonical encoding: one record, one encoding; and of the frames in which records travel inside a host."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from fuzz.targets import commands, event_log, internal
from hsmvisor_rpc.internal.frames import Frame, Kind, encode_frame
from hsmvisor_rpc.sealed.canonical import MalformedRecord, Record
from hsmvisord.keystore import records
from hypothesis import given, settings
from hypothesis import strategies as st

RECORDS: list[type[Record]] = [
    *commands.RECORDS,
    *internal.RECORDS.values(),
    *event_log.RECORDS,
    records.MetaRecord,
    records.KeyRecord,
    records.RequestRecord,
    records.CertificateRecord,
    records.GenerationRecord,
    records.MaterialRecord,
]
_SCALARS: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(0, (1 << 64) - 1),
    bool: st.booleans(),
    str: st.text(max_size=20),
    bytes: st.binary(max_size=40),
}


def of_type(hint: Any) -> st.SearchStrategy[Any]:
    if hint in _SCALARS:
        return _SCALARS[hint]
    return st.lists(_SCALARS[typing.get_args(hint)[0]], max_size=4).map(tuple)


def of_class(kind: type[Record]) -> st.SearchStrategy[Record]:
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{f.name: of_type(hints[f.name]) for f in dataclasses.fields(kind)})


any_record = st.sampled_from(RECORDS).flatmap(of_class)


@settings(max_examples=300, deadline=None)
@given(any_record)
def test_a_record_is_read_as_written(record: Record) -> None:
    assert type(record).decode(record.encode()) == record


@settings(max_examples=500, deadline=None)
@given(any_record, st.data())
def test_a_bent_record_is_malformed_or_another(record: Record, draw: st.DataObject) -> None:
    data = record.encode()
    place, cut = draw.draw(st.integers(0, len(data))), draw.draw(st.integers(0, 4))
    bent = data[:place] + draw.draw(st.binary(max_size=4)) + data[place + cut :]
    try:
        read = type(record).decode(bent)
    except MalformedRecord:
        return
    assert read.encode() == bent
    assert (read == record) == (bent == data)


@settings(max_examples=100, deadline=None)
@given(any_record, any_record)
def test_no_encoding_is_of_two_types(one: Record, other: Record) -> None:
    if type(one) is not type(other):
        try:
            type(other).decode(one.encode())
        except MalformedRecord:
            return
        raise AssertionError(f"a {one.TYPE} was read as a {other.TYPE}")


one_frame = st.tuples(st.integers(0, (1 << 32) - 1), st.sampled_from(Kind), st.binary(max_size=30))
some_frames = st.lists(one_frame, max_size=4)


@settings(max_examples=200, deadline=None)
@given(some_frames, st.binary(max_size=20))
def test_frames_do_not_depend_on_pieces(frames: list[tuple[int, Kind, bytes]], rest: bytes) -> None:
    internal.frames(b"".join([encode_frame(Frame(*frame)) for frame in frames]) + rest)
