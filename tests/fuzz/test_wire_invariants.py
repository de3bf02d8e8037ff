"""Properties of the wire codecs: what a client writes is what the server reads, and nothing else can be raised."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from fuzz.targets import wire
from hsmvisord import ck
from hsmvisord.wire.attributes import KINDS, Kind
from hsmvisord.wire.calls import INVALID, MORE_FOLLOWS, SENSITIVE, Attribute, Call, Mechanism, Needed, Request
from hsmvisord.wire.frames import frame
from hsmvisord.wire.native import NativeCodec
from hsmvisord.wire.p11kit import MAGIC, P11KitCodec
from hsmvisord.wire.table import CALLS, NATIVE_CALLS, P11KIT_CALLS, SIGNATURES
from hypothesis import given, settings
from hypothesis import strategies as st
from support.native_client import NativeEncoding
from support.p11kit_client import IV, PSS, RELEASES, P11KitEncoding

ulongs = st.integers(0, (1 << 64) - 1)
small = st.integers(0, (1 << 31) - 1)
data = st.binary(max_size=80)
rooms = st.one_of(st.none(), st.integers(0, 1 << 20))

_VALUES: dict[Kind, st.SearchStrategy[Any]] = {
    Kind.BOOL: st.booleans(),
    Kind.ULONG: ulongs,
    Kind.ULONGS: st.lists(ulongs, max_size=5).map(tuple),
    Kind.BYTES: data,
}
_BYTE_KINDS = st.sampled_from([ck.CKA_LABEL, ck.CKA_ID, ck.CKA_VALUE, ck.CKA_START_DATE, 0x80001234])


def of_kind(kind: int) -> st.SearchStrategy[Attribute]:
    return _VALUES[KINDS.get(kind, Kind.BYTES)].map(lambda value: Attribute(kind, value))


_plain_kinds = [kind for kind, which in KINDS.items() if which is not Kind.TEMPLATE]
flat = st.one_of(st.sampled_from(_plain_kinds), _BYTE_KINDS).flatmap(of_kind)
_template_kinds = st.sampled_from([kind for kind, which in KINDS.items() if which is Kind.TEMPLATE])
attributes = st.recursive(
    flat,
    lambda inner: st.builds(Attribute, _template_kinds, st.lists(inner, max_size=3).map(tuple)),
    max_leaves=6,
).filter(lambda attribute: depth(attribute) <= 4)
templates = st.lists(attributes, max_size=6).map(tuple)


def depth(attribute: Attribute) -> int:
    if KINDS.get(attribute.type) is not Kind.TEMPLATE:
        return 0
    return 1 + max((depth(inner) for inner in attribute.value), default=0)


native_mechanisms = st.builds(
    Mechanism,
    ulongs,
    st.one_of(st.none(), data, st.lists(st.one_of(ulongs, data), max_size=8).map(tuple)),
)
bare = st.sampled_from([0x1, 0x1041, 0x1044, 0x250, 0x40, 0x350])
p11kit_mechanisms = st.one_of(
    bare.map(Mechanism),
    st.builds(Mechanism, st.sampled_from(PSS), st.tuples(ulongs, ulongs, ulongs)),
    st.builds(Mechanism, st.sampled_from(IV), data),
    st.builds(Mechanism, st.just(0x9), st.tuples(ulongs, ulongs, ulongs, data)),
    st.builds(Mechanism, st.just(0x1087), st.tuples(data, ulongs, data, ulongs)),
)


def fields_of(call: Call, mechanisms: st.SearchStrategy[Mechanism]) -> st.SearchStrategy[tuple[Any, ...]]:
    plain_rooms = st.lists(st.tuples(st.sampled_from(_plain_kinds), st.one_of(st.none(), st.integers(1, 1 << 20))), max_size=5)
    by_code: dict[str, st.SearchStrategy[Any]] = {
        "u": ulongs,
        "y": st.integers(0, 255),
        "s": st.just(b"label".ljust(32)),
        "z": data.map(lambda text: text.replace(b"\0", b"")),
        "ay": st.one_of(st.none(), data),
        "au": st.lists(ulongs, max_size=9).map(tuple),
        "fy": rooms,
        "Ny": st.one_of(rooms, st.just(MORE_FOLLOWS)),
        "fu": st.one_of(st.none(), st.integers(1, 1 << 20)),
        "aA": templates,
        "fA": plain_rooms.map(tuple),
        "M": mechanisms,
    }
    return st.tuples(*[by_code[code] for code in CALLS[call][0]])


def requests(calls: frozenset[Call], mechanisms: st.SearchStrategy[Mechanism]) -> st.SearchStrategy[tuple[Call, tuple[Any, ...]]]:
    return st.sampled_from(sorted(calls)).flatmap(lambda call: st.tuples(st.just(call), fields_of(call, mechanisms)))


@settings(max_examples=400, deadline=None)
@given(requests(NATIVE_CALLS, native_mechanisms))
def test_native_requests_are_read_as_written(request: tuple[Call, tuple[Any, ...]]) -> None:
    call, args = request
    assert NativeCodec().decode(1, b"", NativeEncoding().request(call, *args)) == Request(1, call, args)


@pytest.mark.parametrize("release", RELEASES)
@settings(max_examples=150, deadline=None)
@given(request=requests(P11KIT_CALLS - {Call.INITIALIZE}, p11kit_mechanisms))
def test_p11kit_requests_are_read_as_written(release: str, request: tuple[Call, tuple[Any, ...]]) -> None:
    call, args = request
    said = RELEASES[release]
    codes = CALLS[call][0]
    if not said.tells_empty_room:
        args = tuple([value or None if code in ("fy", "Ny") else value for code, value in zip(codes, args, strict=True)])
    expected = args
    if call is Call.INIT_TOKEN:
        expected = (*args[:2], args[2][:32])
    assert P11KitCodec(said.first).decode(1, b"client", P11KitEncoding(said).request(call, *args)) == Request(1, call, expected)


outputs = st.one_of(data, st.integers(0, 1 << 20).map(Needed))
arrays = st.one_of(st.lists(ulongs, max_size=9).map(tuple), st.integers(0, 1 << 20).map(Needed))
_REPLIES: dict[str, st.SearchStrategy[Any]] = {
    "u": ulongs,
    "y": st.integers(0, 255),
    "v": st.tuples(st.integers(0, 255), st.integers(0, 255)),
    "s": st.just(b"text".ljust(32)),
    "ay": outputs,
    "au": arrays,
}


def replies(calls: frozenset[Call]) -> st.SearchStrategy[tuple[Call, tuple[Any, ...]]]:
    plain = sorted(calls - {Call.GET_ATTRIBUTE_VALUE, Call.DERIVE_KEY2})
    return st.sampled_from(plain).flatmap(
        lambda call: st.tuples(st.just(call), st.tuples(*[_REPLIES[code] for code in CALLS[call][1]]))
    )


@settings(max_examples=300, deadline=None)
@given(replies(NATIVE_CALLS))
def test_native_replies_are_read_as_written(reply: tuple[Call, tuple[Any, ...]]) -> None:
    call, values = reply
    written = NativeCodec().reply(Request(1, call, ()), *values)
    assert NativeEncoding().reply(call, written[12:]) == values


@settings(max_examples=300, deadline=None)
@given(replies(P11KIT_CALLS))
def test_p11kit_replies_are_read_as_written(reply: tuple[Call, tuple[Any, ...]]) -> None:
    call, values = reply
    written = P11KitCodec(2).reply(Request(1, call, ()), *values)
    assert P11KitEncoding(RELEASES["0.26.4"]).reply(call, written[12:]) == values


unreadable = st.sampled_from([SENSITIVE, INVALID])
asked = st.lists(st.tuples(attributes, st.one_of(st.none(), st.integers(1, 100)), st.one_of(st.none(), unreadable)), max_size=6)


def expected_rv(codec_rvs: set[int]) -> int:
    return next((rv for rv in (0x11, 0x12, 0x150) if rv in codec_rvs), 0)


@settings(max_examples=300, deadline=None)
@given(asked)
def test_attribute_values_are_read_as_written(items: list[tuple[Attribute, int | None, Any]]) -> None:
    values = [(attribute.type, attribute.value if why is None else why) for attribute, _, why in items]
    wanted = tuple([(attribute.type, room) for attribute, room, _ in items])
    request = Request(1, Call.GET_ATTRIBUTE_VALUE, (1, 2, wanted))
    read, rv = NativeEncoding().reply(Call.GET_ATTRIBUTE_VALUE, NativeCodec().reply(request, values)[12:])
    rvs = set()
    for (kind, value), (attribute, room, why) in zip(read, items, strict=True):
        assert kind == attribute.type
        if why is not None:
            assert value is None
            rvs.add(why.value)
        elif isinstance(value, Needed):
            assert room is None or room < value.size
            rvs.add(0 if room is None else 0x150)
        else:
            assert value == attribute.value
    assert rv == expected_rv(rvs)

    reply = P11KitCodec(2).reply(request, values)
    read, rv = P11KitEncoding(RELEASES["0.26.4"]).reply(Call.GET_ATTRIBUTE_VALUE, reply[12:])
    assert [kind for kind, _ in read] == [attribute.type for attribute, _, _ in items]
    assert all((value is None) == (why is not None) for (_, value), (_, _, why) in zip(read, items, strict=True))
    assert rv in (0, 0x11, 0x12, 0x150)


first_bytes = st.sampled_from([0, 1, 2, 3, 0x7F, 0x80, 0x81, 0xFF])


@settings(max_examples=300, deadline=None)
@given(first_bytes, st.lists(st.tuples(small, st.binary(max_size=40)), max_size=4), st.binary(max_size=20))
def test_streams(first: int, whole: list[tuple[int, bytes]], rest: bytes) -> None:
    wire.connection(bytes((first,)) + b"".join([frame(ident, message) for ident, message in whole]) + rest)


@settings(max_examples=500, deadline=None)
@given(first_bytes, st.sampled_from(sorted(CALLS)), st.binary(max_size=120))
def test_any_fields_of_any_call(first: int, call: Call, fields: bytes) -> None:
    signature = SIGNATURES[call][0]
    head = struct.pack(">I", call) if first >= 0x80 else struct.pack(">II", call, len(signature)) + signature
    wire.message(bytes((first,)) + head + fields)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(list(RELEASES)), requests(P11KIT_CALLS - {Call.INITIALIZE}, p11kit_mechanisms), st.data())
def test_bent_p11kit_requests(release: str, request: tuple[Call, tuple[Any, ...]], draw: st.DataObject) -> None:
    said = RELEASES[release]
    message = bent(P11KitEncoding(said).request(request[0], *request[1]), draw)
    wire.message(bytes((said.first,)) + message)


@settings(max_examples=400, deadline=None)
@given(requests(NATIVE_CALLS, native_mechanisms), st.data())
def test_bent_native_requests(request: tuple[Call, tuple[Any, ...]], draw: st.DataObject) -> None:
    wire.message(b"\x81" + bent(NativeEncoding().request(request[0], *request[1]), draw))


def bent(message: bytes, draw: st.DataObject) -> bytes:
    """A message with one byte changed, or cut, or with bytes put in."""
    place = draw.draw(st.integers(0, len(message)))
    cut = draw.draw(st.integers(0, 4))
    return message[:place] + draw.draw(st.binary(max_size=4)) + message[place + cut :]


def test_p11kits_words() -> None:
    said = RELEASES["0.26.4"]
    message = P11KitEncoding(said).request(Call.INITIALIZE, MAGIC, 0, b"\0")
    assert P11KitCodec(2).decode(1, b"client", message).args == (MAGIC, 0, b"\0")
