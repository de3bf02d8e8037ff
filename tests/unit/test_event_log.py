"""Logs of measured boot: those of real firmware lead to the PCRs that a TPM had; a guest's own lead nowhere else than they say."""

from __future__ import annotations

import hashlib
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hsmvisor.attestation import event_log, event_types
from hsmvisor.attestation.event_log import BadLog, compare, compared, parse, replay
from hypothesis import given, settings
from hypothesis import strategies as st
from support import event_logs as e
from support.event_logs import ACTION, EVENT_TAG, IPL, NO_ACTION, SEPARATOR, SHA1, SHA256, SHA384, begun, event, real, started_at
from support.tpm_guest import Machine, started

SEABIOS, EDK2 = (hashlib.sha256(bytes(32) + hashlib.sha256(data).digest()).hexdigest() for data in (b"\xff" * 4, bytes(4)))
_SEABIOS = dict.fromkeys(range(8), SEABIOS) | {
    1: "245d19b3ccd97b3caeb0f3cc4f62a5732c6a8703c753dc432789240658c529bf",
    2: "1af0310df024efe57440f26d56d1c52769dc9366c286924bc373593aac9ebd13",
}
#: What the TPM quoted when the log was taken, where that is not as it began.
QUOTED = {
    "seabios-1.16-without-disk": _SEABIOS | {4: "1eb9aa21337cc1fa31ce5f56900d7bf59b9dda366823095aed06544caa2557ca"},
    "seabios-1.16-with-disk": _SEABIOS
    | {
        4: "64c4192db60c3e64840c8e8f6e697e4b7fa9929121a7f2d0fedc3edf4e3bb884",
        5: "4eb8a03f4c69f8123b5edd7aff883fd700f5a9e263a820cf335de4f31a3b23e2",
    },
    "ovmf-2022.11-with-secure-boot": dict.fromkeys(range(8), EDK2)
    | {
        0: "93612d5bc15239e350066a96e91a2e0b723f4763258cc9b8c99825f6646c0ec6",
        1: "f08db701388178a1767e45b4fa657bcc83c05706c9ee1a645b2329d94929175e",
        4: "56d482228bf9654b1515d51b17ce49125655a09551ed105bf01d87ce0929ac9e",
        7: "4387f18f9308e9a61cf5cd7685196e15b8c410ee1405d0f07fb3bee71530619d",
    },
    "ovmf-2022.11-with-linux-6.1": dict.fromkeys(range(8), EDK2)
    | {
        0: "ce729d0e02d46cecb9baa54228e55d1be49de54981fe6485a59bf9b222bcc061",
        1: "8e9d1fe23131f12d6a523e9c32eb3223d4dc25e14eb5fd60163e7ba8de0f248c",
        4: "8b86e87990abddcaf958360e70401762100567a4c312988a68f03c4db1c2a3a5",
        5: "a5ceb755d043f32431d63e39f5161464620a3437280494b5850dc1b47cc074e0",
        7: "65caf8dd1e0ea7a6347b635d2b379c93b9a1351edc2afc3ecda700e534eb3068",
        9: "645a268e99b9a7d5ce462cd02410031ef706f96a8bd810ec07e42b4394fe60a0",
        10: "cbe80cbbff3dcec22ef24be4f1425202866f66d942419f22fa6c5afd78fe4e24",  # IMA's, which has a log of its own
    },
}


def quoted(name: str) -> dict[int, bytes]:
    begun = {pcr: (b"\xff" if 17 <= pcr <= 22 else b"\0") * 32 for pcr in range(24)}
    return begun | {pcr: bytes.fromhex(value) for pcr, value in QUOTED[name].items()}


@pytest.fixture
def machine() -> Iterator[Machine]:
    yield from started()


# ---- of real firmware -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUOTED)
@pytest.mark.parametrize("room", [b"", bytes(70_000), b"\xff" * 70_000, b"\xff"], ids=["no room", "zeros", "ones", "one"])
def test_real_logs_lead_to_what_was_quoted(name: str, room: bytes) -> None:
    log, pcrs = parse(real(name) + room), quoted(name)
    assert compare(log, pcrs) == []
    for pcr, value in replay(log).items():
        assert pcrs[pcr] == value
        assert compare(log, pcrs | {pcr: bytes(32)}) == [pcr]


@pytest.mark.real
@pytest.mark.parametrize("name", QUOTED)
def test_tpm2_tools_replay_the_same(name: str) -> None:
    told = subprocess.run(["tpm2_eventlog", e.REAL / name], capture_output=True, text=True, check=True).stdout
    lines = [line.split(":") for line in told.partition("pcrs:\n  sha256:\n")[2].splitlines()]
    assert replay(parse(real(name))) == {int(pcr): bytes.fromhex(value.strip()[2:]) for pcr, value in lines}
    kinds = [line.split(": ")[1] for line in told.splitlines() if line.startswith("  EventType:")]
    assert [found.type for found in parse(real(name)).events] == [kind for kind in kinds if kind != "EV_NO_ACTION"]


def test_what_people_are_told() -> None:
    told = {name: [(f.pcr, f.type, f.description, f.description_measured) for f in parse(real(name)).events] for name in QUOTED}
    assert told["seabios-1.16-with-disk"] == [
        (1, "EV_EVENT_TAG", "0x00000001, 20 bytes", True),
        (2, "EV_ACTION", "Start Option ROM Scan", True),
        (2, "EV_EVENT_TAG", "0x00000007, 24 bytes", True),
        (4, "EV_ACTION", "Calling INT 19h", True),
        *[(pcr, "EV_SEPARATOR", "end of the firmware's part", True) for pcr in range(8)],
        (4, "EV_ACTION", "Booting BCV device 80h (HDD)", True),
        (4, "EV_IPL", "MBR", False),
        (5, "EV_IPL_PARTITION_DATA", "19 bytes", False),
    ]
    names = [(2, what) for what in ("SecureBoot", "PK", "KEK", "db", "dbx")]
    secure = told["ovmf-2022.11-with-secure-boot"]
    assert [(2, what) for pcr, kind, what, _ in secure if kind == "EV_EFI_VARIABLE_DRIVER_CONFIG" and pcr == 7] == names
    assert [what for _, kind, what, _ in secure if kind == "EV_EFI_VARIABLE_BOOT"] == ["BootOrder", "Boot0000", "Boot0001"]
    assert secure[-1] == (4, "EV_EFI_BOOT_SERVICES_APPLICATION", "76 bytes", False), "a file of the firmware's own, without a name"
    linux = told["ovmf-2022.11-with-linux-6.1"]
    assert linux[9] == (4, "EV_EFI_BOOT_SERVICES_APPLICATION", "kernel", False)
    assert linux[-4:] == [
        (9, "EV_EVENT_TAG", "0x8f3b22ed LOADED_IMAGE::LoadOptions", False),
        (9, "EV_EVENT_TAG", "0x8f3b22ec Linux initrd", False),
        (5, "EV_EFI_ACTION", "Exit Boot Services Invocation", True),
        (5, "EV_EFI_ACTION", "Exit Boot Services Returned with Success", True),
    ]


@pytest.mark.parametrize("name", QUOTED)
def test_a_log_that_is_cut_is_bad_or_leads_elsewhere(name: str) -> None:
    """It ends with an event: what was left of the next one is room, where that begins with zeros."""
    data, whole = real(name), parse(real(name))
    seen = set()
    for end in range(len(data)):
        try:
            log = parse(data[:end])
        except BadLog:
            continue
        seen.add(len(log.events))
        assert log.events == whole.events[: len(log.events)]
        assert compare(log, quoted(name))
    assert seen == set(range(len(whole.events)))


# ---- and a real TPM ---------------------------------------------------------------------------------------------------------


def test_a_log_and_the_tpm_that_it_was_measured_into(machine: Machine) -> None:
    measured = [(pcr, SEPARATOR, bytes(4)) for pcr in range(8)]
    measured += [(4, IPL, b"loader"), (8, IPL, b"grub_cmd: linux"), (14, IPL, b"MokList"), (11, IPL, b"stub"), (0, ACTION, b"late")]
    for pcr, _, data in measured:
        machine.guest.extend(pcr, hashlib.sha256(data).digest())
    log = parse(begun() + b"".join(event(*one) for one in measured))
    pcrs = dict(enumerate(machine.managed.quote(bytes(8), tuple(range(24))).values))
    assert compare(log, pcrs) == []
    assert replay(log).items() <= pcrs.items()
    machine.guest.extend(8, bytes(32))
    machine.guest.extend(11, bytes(32))
    machine.guest.extend(3, bytes(32))
    assert compare(log, dict(enumerate(machine.managed.quote(bytes(8), tuple(range(24))).values))) == [3, 8]


# ---- what is compared -------------------------------------------------------------------------------------------------------


def test_which_pcrs_a_log_has_to_lead_to() -> None:
    log = parse(begun() + b"".join(event(pcr, SEPARATOR, bytes(4)) for pcr in range(24)))
    assert compared(log, range(24)) == [*range(10), 12, 13, 14]
    assert compared(log, [7, 14, 11, 0]) == [0, 7, 14]
    empty = parse(begun())
    assert compared(empty, range(24)) == list(range(8))


def test_a_pcr_that_no_event_names_is_as_it_began() -> None:
    pcrs = {pcr: bytes(32) for pcr in range(16)}
    assert compare(parse(begun()), pcrs) == []
    assert compare(parse(begun()), pcrs | {5: b"\1" * 32, 9: b"\1" * 32}) == [5]
    assert compare(parse(begun() + started_at(3)), pcrs) == [0]
    assert compare(parse(begun() + started_at(3)), pcrs | {0: bytes(31) + b"\3"}) == []


def test_only_given_pcrs_are_compared() -> None:
    log = parse(begun() + event(4, ACTION, b"a"))
    assert compare(log, {}) == []
    assert compare(log, {3: bytes(32)}) == []
    assert compare(log, {4: bytes(32)}) == [4]


@pytest.mark.parametrize("locality", [0, 3, 4])
def test_the_locality_at_startup(locality: int) -> None:
    log = parse(begun() + started_at(locality) + event(0, ACTION, b"a") + event(1, ACTION, b"a"))
    digest = hashlib.sha256(b"a").digest()
    assert log.locality == locality
    assert replay(log) == {
        0: hashlib.sha256(bytes(31) + bytes([locality]) + digest).digest(),
        1: hashlib.sha256(bytes(32) + digest).digest(),
    }


def test_dynamic_pcrs_begin_with_ones() -> None:
    log = parse(begun() + event(17, ACTION, b"a") + event(16, ACTION, b"a"))
    digest = hashlib.sha256(b"a").digest()
    assert replay(log) == {
        17: hashlib.sha256(b"\xff" * 32 + digest).digest(),
        16: hashlib.sha256(bytes(32) + digest).digest(),
    }


def test_what_is_said_and_not_measured() -> None:
    said = event(0, NO_ACTION, b"SP800-155 Event\0...") + event(0xFFFFFFFF, NO_ACTION, b"")
    log = parse(begun() + event(4, ACTION, b"a") + said)
    assert [found.description for found in log.events] == ["a"]
    assert replay(log) == replay(parse(begun() + event(4, ACTION, b"a")))


def test_several_banks() -> None:
    data = b"what"
    digests = {a: e.HASHES[a](data).digest() for a in (SHA1, SHA256, SHA384)}
    alone = parse(begun() + event(4, ACTION, data))
    for order in ((SHA1, SHA256, SHA384), (SHA384, SHA1, SHA256)):
        made = begun(SHA1, SHA256, SHA384) + event(4, ACTION, data, {a: digests[a] for a in order})
        assert parse(made) == alone
    assert parse(begun(SHA1, SHA256) + event(4, ACTION, data, {SHA256: digests[SHA256]})) == alone, "not each bank was extended"


# ---- what is no log ---------------------------------------------------------------------------------------------------------

ONE = event(4, ACTION, b"a")
DIGEST = bytes(32)
BAD = {
    "empty": (b"", "event 0, up to byte 0: 32 bytes are to follow, 0 do"),
    "only room": (bytes(64), "no crypto agile log"),
    "text": (b"this is a text, and no log of a boot at all", "event 0"),
    "of TPM 1.2": (e.first(b"MBR", IPL), "no crypto agile log"),
    "of TPM 1.2, its name alone": (e.first(e.spec_id(), IPL), "no crypto agile log"),
    "an older form": (e.first(b"Spec ID Event02\0" + e.spec_id()[16:]), "no crypto agile log"),
    "no algorithms": (e.first(e.spec_id([])), "digests of 0 algorithms, 1 to 16"),
    "many algorithms": (e.first(e.spec_id([(n, 32) for n in range(17)])), "digests of 17 algorithms"),
    "very many algorithms": (e.first(e.spec_id(count=0xFFFFFFFF)), "digests of 4294967295 algorithms"),
    "more algorithms than told": (e.first(e.spec_id([(SHA1, 20), (SHA256, 32)], count=1)) + ONE, "it is to have 37 bytes"),
    "fewer algorithms than told": (e.first(e.spec_id(count=2)) + bytes(2), "bytes"),
    "one algorithm twice": (e.first(e.spec_id([(SHA256, 32), (SHA256, 32)])), "algorithm 0x000b twice"),
    "SHA-1 alone": (begun(SHA1), "the log has no digests of SHA-256"),
    "SHA-256 of another length": (e.first(e.spec_id([(SHA256, 20)])), "the log has no digests of SHA-256"),
    "something of the vendor's is missing": (e.first(e.spec_id() + b"x"), "it is to have 34 bytes"),
    "a long head": (struct.pack("<II20sI", 0, 3, bytes(20), 0xFFFFFFFF), "4294967295 bytes, at most 1048576"),
    "a PCR that no TPM has": (begun() + event(24, ACTION, b""), "event 1, up to byte 115: it is of PCR 24, there are 24"),
    "no digest": (begun() + event(4, ACTION, b"", {}), "event 1, up to byte 77: it has no digest of SHA-256"),
    "another digest": (begun(SHA1, SHA256) + event(4, ACTION, b"", {SHA1: bytes(20)}), "no digest of SHA-256"),
    "an unknown digest": (begun() + event(4, ACTION, b"", {SHA384: bytes(48)}), "algorithm 0x000c, which the log does not name"),
    "too many digests": (begun() + event(4, ACTION, b"", {SHA256: DIGEST, SHA1: bytes(20)}), "has 2 digests, the log is of 1"),
    "two digests": (
        begun(SHA1, SHA256) + struct.pack("<III", 4, 5, 2) + (struct.pack("<H", SHA256) + DIGEST) * 2 + bytes(4) + ONE,
        "two digests of algorithm 0x000b",
    ),
    "a large event": (begun() + event(4, ACTION, b"")[:-4] + b"\1\0\x10\0", "1048577 bytes, at most 1048576"),
    "an event that is cut": (begun() + ONE[:-1], "1 bytes are to follow, 0 do"),
    "a good event, and then a cut one": (begun() + ONE + ONE[:20], "event 2"),
    "something after the room": (begun() + ONE + bytes(60) + b"x", "no digest of SHA-256"),
    "ones and zeros": (begun() + ONE + b"\xff" * 20 + bytes(20), "4294967295 digests"),
    "localities, two": (begun() + started_at(0) + started_at(3), "stands there once"),
    "a locality too late": (begun() + event(0, ACTION, b"a") + started_at(3), "before what is measured into PCR 0"),
    "a locality that cannot be": (begun() + started_at(2), "is one byte, 0, 3, 4"),
    "a locality of two bytes": (begun() + event(0, NO_ACTION, b"StartupLocality\0\3\3"), "is one byte"),
    "no locality": (begun() + event(0, NO_ACTION, b"StartupLocality\0"), "is one byte"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_log(name: str) -> None:
    data, why = BAD[name]
    with pytest.raises(BadLog) as refused:
        parse(data)
    assert why in str(refused.value)


def test_limits() -> None:
    parse(begun() + event(4, ACTION, bytes(event_log.MAX_EVENT - 1) + b"x"))
    most = begun() + ONE * event_log.MAX_EVENTS
    assert len(parse(most).events) == event_log.MAX_EVENTS
    for more in (ONE, event(0, NO_ACTION, b"")):
        with pytest.raises(BadLog, match=r"event 16385, .* a log has at most 16384 events"):
            parse(most + more)
    full = begun() + bytes(event_log.MAX_LOG - len(begun()))
    assert parse(full).events == ()
    with pytest.raises(BadLog, match="it has 4194305 bytes, a log has at most 4194304"):
        parse(full + b"\0")


@pytest.mark.parametrize("what", [ONE, event(0, NO_ACTION, b""), event(4, 0x80000003, bytes(24) + b"\xff" * 8 + b"\4\4\4\0" * 60)])
def test_a_large_log_is_read_at_once(what: bytes) -> None:
    began = time.process_time()
    parse(begun() + what * min(event_log.MAX_EVENTS, (event_log.MAX_LOG - 100) // len(what)))
    assert time.process_time() - began < 5


# ---- what a guest says of an event ------------------------------------------------------------------------------------------

GUID = bytes(16)


def variable(name: str, characters: int | None = None) -> bytes:
    return GUID + struct.pack("<QQ", len(name) if characters is None else characters, 0) + name.encode("utf-16-le")


def image(*nodes: bytes, size: int | None = None) -> bytes:
    path = b"".join(nodes)
    return bytes(24) + struct.pack("<Q", len(path) if size is None else size) + path


def file(name: str) -> bytes:
    told = (name + "\0").encode("utf-16-le")
    return struct.pack("<HH", 0x0404, 4 + len(told)) + told


END = b"\x7f\xff\4\0"
TOLD = [
    (ACTION, b"Calling INT 19h\0\0", "Calling INT 19h"),
    (ACTION, b"a\x1b[2J\r\nb\xff\xc3\xa9c", "a?[2J?b?c"),
    (ACTION, b"", "0 bytes"),
    (ACTION, b"x" * 5000, "x" * 200),
    (SEPARATOR, bytes(4), "end of the firmware's part"),
    (SEPARATOR, b"\1\0\0\0", "an error of the firmware"),
    (SEPARATOR, b"", "an error of the firmware"),
    (EVENT_TAG, struct.pack("<II", 7, 5) + b"hello", "0x00000007 hello"),
    (EVENT_TAG, struct.pack("<II", 7, 10) + "hello".encode("utf-16-le"), "0x00000007 hello"),
    (EVENT_TAG, struct.pack("<II", 7, 0xFFFFFFFF) + b"\0\1\2", "0x00000007, 4294967295 bytes"),
    (EVENT_TAG, b"short", "5 bytes"),
    (0x80000001, variable("SecureBoot"), "SecureBoot"),
    (0x800000E0, variable("db", 0xFFFFFFFFFFFFFFFF), "db"),
    (0x80000001, variable("d\ud83d\x07b".encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")), "d?b"),
    (0x80000001, GUID, "16 bytes"),
    (0x80000002, variable(""), "32 bytes"),
    (0x08, "Version 1\0".encode("utf-16-le"), "Version 1"),
    (0x8000000A, b"\4DXE1" + bytes(16), "DXE1"),
    (0x8000000A, b"\xffDXE", "DXE"),
    (0x8000000A, b"", "0 bytes"),
    (0x80000003, image(b"\2\1\6\0xx", file("\\EFI\\BOOT\\BOOTX64.EFI"), END), "\\EFI\\BOOT\\BOOTX64.EFI"),
    (0x80000003, image(file("a"), file("b"), size=1 << 63), "ab"),
    (0x80000003, image(b"\4\4\0\0"), "36 bytes"),
    (0x80000003, image(b"\4\4\xff\xff"), "36 bytes"),
    (0x80000003, bytes(31), "31 bytes"),
    (0x77777777, b"abc", "3 bytes"),
]


@pytest.mark.parametrize(("kind", "data", "told"), TOLD)
def test_descriptions(kind: int, data: bytes, told: str) -> None:
    (found,) = parse(begun() + event(4, kind, data)).events
    assert found.description == told
    assert found.description_measured
    (lied,) = parse(begun() + event(4, kind, data, {SHA256: b"\1" * 32})).events
    assert lied == replace(found, digest=b"\1" * 32, description_measured=False)


def test_names_of_types() -> None:
    assert [event_types.name(kind) for kind in (0x04, 0x80000001, 0x800000E0, 0x77777777)] == [
        "EV_SEPARATOR", "EV_EFI_VARIABLE_DRIVER_CONFIG", "EV_EFI_VARIABLE_AUTHORITY", "0x77777777",
    ]  # fmt: skip


# ---- whatever a guest writes ------------------------------------------------------------------------------------------------

numbers = st.integers(0, 0xFFFFFFFF)
kinds = st.sampled_from([kind for kind in event_types._NAMES if kind != NO_ACTION]) | numbers.filter(lambda kind: kind != NO_ACTION)
made_events = st.lists(
    st.tuples(st.integers(0, 23), kinds, st.binary(max_size=80), st.binary(min_size=32, max_size=32)), max_size=12
)


@settings(max_examples=300, deadline=None)
@given(made_events, st.sampled_from([b"", bytes(100), b"\xff" * 100]))
def test_a_log_is_read_as_it_was_written(made: list[tuple[int, int, bytes, bytes]], room: bytes) -> None:
    log = parse(begun() + b"".join(event(pcr, kind, data, {SHA256: digest}) for pcr, kind, data, digest in made) + room)
    assert [(f.pcr, f.type, f.digest) for f in log.events] == [(pcr, event_types.name(kind), d) for pcr, kind, _, d in made]
    led = {pcr: (b"\xff" if 17 <= pcr <= 22 else b"\0") * 32 for pcr in range(24)}
    for pcr, _, _, digest in made:
        led[pcr] = hashlib.sha256(led[pcr] + digest).digest()
    assert replay(log) == {pcr: led[pcr] for pcr in {pcr for pcr, *_ in made}}
    assert compare(log, led) == []
    assert all(f.description.isascii() and f.description.isprintable() and 0 < len(f.description) <= 200 for f in log.events)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(QUOTED)), st.data())
def test_a_bent_log_is_bad_or_another(name: str, draw: st.DataObject) -> None:
    """Where it leads to the same PCRs, the same was measured, in each of them in the same order."""
    data = real(name)
    at, cut = draw.draw(st.integers(0, len(data))), draw.draw(st.integers(0, 8))
    bent = data[:at] + draw.draw(st.binary(max_size=8)) + data[at + cut :]
    try:
        log = parse(bent)
    except BadLog:
        return
    if compare(log, quoted(name)) == []:
        for pcr in compared(log, range(24)):
            true, found = ([f.digest for f in one.events if f.pcr == pcr] for one in (parse(data), log))
            assert found == true
