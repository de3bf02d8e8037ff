"""Descriptors of USB devices as libhsmvisor-pkcs11.so reads them, built with sanitizers: a device may say anything."""

from __future__ import annotations

import random
import struct
import subprocess
from collections.abc import Callable, Sequence

import pytest
from support.usb_bus import (
    CCID,
    CHANNEL,
    CHANNELS,
    SHIM,
    channel,
    configuration,
    device,
    endpoint,
    interface,
    module_descriptors,
    with_channels,
)

Channels = list[tuple[int, int, int]]  #: interface, endpoint in, endpoint out
Read = Callable[[Sequence[bytes]], list[Channels]]
MOST = 32


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Read:
    program = tmp_path_factory.mktemp("descriptors") / "read"
    sources = [SHIM.parent / "tests/support/usb_descriptors.c", SHIM / "src/usb_modules.c"]
    flags = ["-std=c11", "-D_GNU_SOURCE", "-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover", f"-I{SHIM}/src"]
    subprocess.run(["cc", *flags, *sources, "-o", program], check=True)

    def run(inputs: Sequence[bytes]) -> list[Channels]:
        stdin = b"".join(struct.pack("<H", len(data)) + data for data in inputs)
        result = subprocess.run([program], input=stdin, capture_output=True, check=False)
        assert result.returncode == 0, result.stderr.decode()
        return [
            [tuple(map(int, word.split(":"))) for word in line.split()]  # type: ignore[misc]
            for line in result.stdout.decode().splitlines()
        ]

    return run


def expected(data: bytes) -> Channels:
    """The same by other means."""
    found: Channels = []
    wanted, ends, configurations = None, dict[bool, int](), 0
    while len(data) >= 2 and 2 <= data[0] <= len(data):
        one, data = data[: data[0]], data[data[0] :]
        match one[1]:
            case 2:
                configurations += 1
                if configurations == 2:
                    break
            case 4:
                wanted, ends = None, {}
                if len(one) >= 9 and one[3] == 1 and tuple(one[5:8]) == CHANNEL and len(found) < MOST:
                    wanted = one[2]
            case 5 if wanted is not None and len(one) >= 7 and one[3] & 3 == 2:
                ends[bool(one[2] & 0x80)] = one[2]
                if all(ends.get(way) for way in (True, False)):
                    found.append((wanted, ends[True], ends[False]))
                    wanted = None
    return found


def test_a_module(read: Read) -> None:
    all_of_them = [(n, 0x82 + n, 2 + n) for n in range(1, CHANNELS + 1)]
    assert read([module_descriptors(), with_channels(1)]) == [all_of_them, all_of_them[:1]]


BOTH = [endpoint(0x83), endpoint(0x03)]


@pytest.mark.parametrize(
    "interfaces",
    [
        b"",
        CCID,
        interface(1, 0, CHANNEL, BOTH),
        interface(1, 2, CHANNEL, BOTH),
        interface(1, 1, (0xFF, 0x48, 2), BOTH),
        interface(1, 1, (0xFF, 0x47, 1), BOTH),
        interface(1, 1, (0xFE, 0x48, 1), BOTH),
        interface(1, 1, CHANNEL),
        interface(1, 1, CHANNEL, [endpoint(0x83)]),
        interface(1, 1, CHANNEL, [endpoint(0x83), endpoint(0x84)]),
        interface(1, 1, CHANNEL, [endpoint(0x83), endpoint(0x03, 3)]),
        interface(1, 1, CHANNEL, [endpoint(0x83), endpoint(0x03, 1)]),
        interface(1, 1, CHANNEL, [endpoint(0x83)]) + interface(2, 1, CHANNEL, [endpoint(0x04)]),
        interface(1, 1, CHANNEL, BOTH)[:-1],
        interface(1, 1, CHANNEL, BOTH)[1:],
    ],
)
def test_what_is_no_module(read: Read, interfaces: bytes) -> None:
    assert read([device(configuration(interfaces, 2))]) == [[]]


def test_32_channels_and_one_more(read: Read) -> None:
    many = [device(configuration(b"".join(channel(n) for n in range(count)), count)) for count in (31, 32, 33, 99)]
    assert [len(channels) for channels in read(many)] == [31, 32, 32, 32]


def test_the_first_configuration_alone(read: Read) -> None:
    both = [configuration(CCID, 1), configuration(channel(1), 1)]
    assert read([device(b"".join(both), 2), device(b"".join(reversed(both)), 2)]) == [[], [(1, 0x83, 3)]]


def test_anything(read: Read) -> None:
    chance = random.Random(7)
    good = module_descriptors()
    inputs = [good[:end] for end in range(len(good) + 1)]
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(chance.choice((1, 1, 2, 5, 50))):
            at = chance.randrange(len(data))
            match chance.randrange(4):
                case 0:
                    data[at] = chance.randrange(256)
                case 1:
                    data[at] ^= 1 << chance.randrange(8)
                case 2:
                    del data[at : at + chance.randrange(1, 30)]
                case 3:
                    data[at:at] = data[chance.randrange(len(data)) :][: chance.randrange(1, 60)]
            data = data or bytearray(1)
        inputs.append(bytes(data))
    inputs += [chance.randbytes(chance.randrange(300)) for _ in range(500)]
    assert read(inputs) == [expected(data) for data in inputs]
