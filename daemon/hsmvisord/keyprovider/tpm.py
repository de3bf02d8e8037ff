"""A master key that the host's TPM keeps: sealed to this machine, so that a stolen disk has it not (TPM Library, part 1, 29).

It is sealed under a storage key that the TPM makes of its owner seed and a fixed template, anew each time (part 1, 27.6.3).
What stands on the disk is of no use to another TPM, nor to this one after TPM2_Clear.  On the wires between processor and TPM the
key is in the clear when it is unsealed, once at each start: whoever can solder there can read it.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from hsmvisord.keyprovider import keyfile
from hsmvisord.keyprovider.keyfile import KEY_SIZE, HeldKey, SourceError
from hsmvisord.wire import tpm2
from hsmvisord.wire.tpm2 import EMPTY_PASSWORD, OWNER, BadResponse, Code, Response, Tpm2Error, sized

DEVICE = "/dev/tpmrm0"  #: the kernel's resource manager
_MAGIC = b"hsmvisor master key, sealed by a TPM 1\0"
_MOST, _WITHIN = 4096, 30.0  #: bytes of a response; seconds for one


class Device(Protocol):
    def ask(self, command: bytes) -> bytes:
        """Raises OSError."""
        ...

    def close(self) -> None: ...


class _KernelDevice:
    """A character device of Linux (drivers/char/tpm): one command, one response."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def ask(self, command: bytes) -> bytes:
        os.write(self._descriptor, command)
        return os.read(self._descriptor, _MOST)

    def close(self) -> None:
        os.close(self._descriptor)


class _SocketDevice:
    """A software TPM at a port, as swtpm has it: a connection for each command."""

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port

    def ask(self, command: bytes) -> bytes:
        with socket.create_connection(self._address, _WITHIN) as sock:
            sock.sendall(command)
            data = b""
            while len(data) < tpm2.HEAD.size or len(data) < tpm2.HEAD.unpack_from(data)[1]:
                part = sock.recv(_MOST)
                if not part or len(data) > _MOST:
                    raise ConnectionError("the TPM ends its response early")
                data += part
            return data

    def close(self) -> None:
        pass


def opened(device: str) -> Device:
    """`device`: a path, or tcp:HOST:PORT.  Raises OSError, ValueError."""
    if device.startswith("tcp:"):
        host, _, port = device.removeprefix("tcp:").rpartition(":")
        return _SocketDevice(host, int(port))
    return _KernelDevice(Path(device))


class TpmSource(HeldKey):
    """`path` has what the TPM sealed.  Where it is missing, the key in the file beside it (`plain`) is sealed, or a new one."""

    def __init__(self, path: Path, device: str, plain: Path, told: Callable[[str], None]) -> None:
        """`told` gets what an operator should do.  Raises SourceError."""
        try:
            tpm = opened(device)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise SourceError(
                f"the TPM {device} cannot be used: {why}; see whether the machine has one (ls /dev/tpm*), or name it "
                "in provider.device"
            ) from None
        try:
            if not path.exists():
                self._seal(tpm, path, plain, told)
            super().__init__(self._unsealed(tpm, path))
        except (OSError, BadResponse) as error:
            raise SourceError(f"the TPM {device} does not answer as one: {error}") from None
        finally:
            tpm.close()

    def _seal(self, tpm: Device, path: Path, plain: Path, told: Callable[[str], None]) -> None:
        key = keyfile.read(plain) if plain.exists() else os.urandom(KEY_SIZE)
        try:
            public, private = _sealed(tpm, key)
        except Tpm2Error as error:
            raise SourceError(f"the TPM does not seal the master key ({error}): {_hint(error)}") from None
        keyfile.write(path, _MAGIC + sized(public) + sized(private))
        if plain.exists():
            told(f"the master key is sealed to this machine's TPM ({path}): take {plain} to a safe place, and from this disk")
        else:
            told(f"a master key was made and sealed to this machine's TPM ({path}): there is no copy of it")

    def _unsealed(self, tpm: Device, path: Path) -> bytes:
        data = keyfile.read_private(path)
        try:
            public, private = _parts(data)
            key = _unseal(tpm, public, private)
        except BadResponse:
            raise SourceError(f"{path} is no sealed master key: {_INSTEAD.format(path=path)}") from None
        except Tpm2Error as error:
            raise SourceError(
                f"this TPM does not unseal {path} ({error}): another one sealed it, or it was cleared; {_INSTEAD.format(path=path)}"
            ) from None
        if len(key) != KEY_SIZE:
            raise SourceError(f"{path} holds {len(key)} bytes instead of {KEY_SIZE}: {_INSTEAD.format(path=path)}")
        return key


_INSTEAD = "put your copy of the master key to master.key beside it, and take {path} away: then it is sealed anew"


def _hint(error: Tpm2Error) -> str:
    if error.code & 0xFF in (0xA2, 0x8E, 0x22):
        return "its owner hierarchy has a password, and this needs it without one"
    return "look at its state (tpm2_getcap properties-variable)"


def _parts(data: bytes) -> tuple[bytes, bytes]:
    """Raises BadResponse."""
    if not data.startswith(_MAGIC):
        raise BadResponse("not sealed by us")
    rest, found = data[len(_MAGIC) :], []
    for _ in range(2):
        size = int.from_bytes(rest[:2], "big")
        found.append(rest[2 : 2 + size])
        if len(rest) < 2 + size:
            raise BadResponse("it ends early")
        rest = rest[2 + size :]
    if rest:
        raise BadResponse("it goes on")
    return found[0], found[1]


def _sealed(tpm: Device, key: bytes) -> tuple[bytes, bytes]:
    """Returns TPM2B_PUBLIC's and TPM2B_PRIVATE's contents.  Raises Tpm2Error, BadResponse, OSError."""
    parent = _parent(tpm)
    try:
        sensitive = sized(sized(b"") + sized(key))
        parameters = sensitive + sized(tpm2.sealed_template()) + sized(b"") + struct.pack(">I", 0)
        answer = _do(tpm, Code.CREATE, (parent,), parameters)
        answer.parameters()
        private = answer.sized()
        return answer.sized(), private
    finally:
        _flush(tpm, parent)


def _unseal(tpm: Device, public: bytes, private: bytes) -> bytes:
    parent = _parent(tpm)
    try:
        loaded = _do(tpm, Code.LOAD, (parent,), sized(private) + sized(public)).number()
    finally:
        _flush(tpm, parent)
    try:
        answer = _do(tpm, Code.UNSEAL, (loaded,), b"")
        answer.parameters()
        return answer.sized()
    finally:
        _flush(tpm, loaded)


def _parent(tpm: Device) -> int:
    parameters = sized(sized(b"") + sized(b"")) + sized(tpm2.parent_template(b"")) + sized(b"") + struct.pack(">I", 0)
    return _do(tpm, Code.CREATE_PRIMARY, (OWNER,), parameters).number()


def _flush(tpm: Device, handle: int) -> None:
    Response(Code.FLUSH_CONTEXT, tpm.ask(tpm2.command(Code.FLUSH_CONTEXT, (), struct.pack(">I", handle))))


def _do(tpm: Device, code: Code, handles: tuple[int, ...], parameters: bytes) -> Response:
    return Response(code, tpm.ask(tpm2.command(code, handles, parameters, EMPTY_PASSWORD)))
