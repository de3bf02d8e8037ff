"""What the module's worker says: which keys are wanted in the TPM, and that the machine moves."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from functools import partial

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_der_private_key, load_der_public_key
from hsmvisor_rpc.internal import hsm, tpm
from hsmvisor_rpc.sealed.canonical import MalformedRecord, Record
from hsmvisor_rpc.sealed.commands import MOVE_IDENT, MOVE_KEY

from hsmvisord import memory
from hsmvisord.tpm.engine import TpmFault
from hsmvisord.tpm.managed import Asleep, ManagedTpm, Wanted
from hsmvisord.tpm.platform import PublicKey
from hsmvisord.tpm.seals import Seals
from hsmvisord.tpm.wanted import public_name
from hsmvisord.wire.tpm2 import BadResponse, Tpm2Error


class Keys:
    """`told` is called with why the keys are not as wanted, or "" when they are, or will be when the guest starts."""

    def __init__(self, managed: ManagedTpm, seals: Seals, told: Callable[[str], None]) -> None:
        self._managed, self._seals, self._told = managed, seals, told
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None

    def take(self, sock: socket.socket) -> None:
        """Hears the worker at the other end, in the background, in the place of an earlier one."""
        with self._lock:
            before, self._sock = self._sock, sock
        if before is not None:
            with contextlib.suppress(OSError):
                before.shutdown(socket.SHUT_RDWR)
        memory.start_thread("keys", partial(self._serve, sock))

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError, MalformedRecord, _Superseded):
            while (question := hsm.receive(sock, tpm.QUESTIONS)) is not None:
                hsm.send(sock, self._answer(sock, question))

    def _answer(self, sock: socket.socket, question: Record) -> tpm.KeysWanted:
        if isinstance(question, tpm.Move):
            return self._move(sock, question)
        assert isinstance(question, tpm.WantKeys)
        return self._want(sock, question)

    def _counts(self, sock: socket.socket) -> None:
        """Raises _Superseded: what an earlier worker wants counts no more."""
        with self._lock:
            if self._sock is not sock:
                raise _Superseded

    def _want(self, sock: socket.socket, question: tpm.WantKeys) -> tpm.KeysWanted:
        result, failures = tpm.DONE, list[str]()
        try:
            wanted, impossible = _wanted(question)
            failures += [f"{handle:#x}: {why}" for handle, why in impossible.items()]
            with self._managed.turn():
                self._counts(sock)  # another one may have come while the keys were read, and have its turn after this
                self._managed.want(wanted)
        except Asleep:
            result = tpm.LATER
        except (ValueError, Tpm2Error, BadResponse, TpmFault, OSError) as error:
            failures.append(str(error))
        failure = "; ".join(failures)
        self._told(failure)
        return tpm.KeysWanted(tpm.FAILED if failure else result, failure)

    def _move(self, sock: socket.socket, asked: tpm.Move) -> tpm.KeysWanted:
        self._counts(sock)
        if len(asked.ident) != MOVE_IDENT or len(asked.key) not in (0, MOVE_KEY):
            return tpm.KeysWanted(tpm.FAILED, f"a move has {MOVE_IDENT} bytes that name it, and a key of {MOVE_KEY}")
        self._seals.move(asked.leaves, asked.ident, asked.key)
        return tpm.KeysWanted(tpm.DONE, "")


class _Superseded(Exception):
    """Another worker has come."""


def _wanted(asked: tpm.WantKeys) -> tuple[dict[int, Wanted], dict[int, str]]:
    """Returns what of it can be read, and why the rest, by handle, is not wanted.  Raises ValueError for no question at all."""
    count = len(asked.handles)
    if count > tpm.MAX_KEYS or {len(asked.keys), len(asked.decrypt), len(asked.certificates)} != {count}:
        raise ValueError(f"at most {tpm.MAX_KEYS} keys, each with a handle")
    if len(set(asked.handles)) != count:
        raise ValueError("a handle has one key")
    earlier = _earlier(asked)
    found, failures = dict[int, Wanted](), dict[int, str]()
    for handle, der, decrypt, certificate in zip(asked.handles, asked.keys, asked.decrypt, asked.certificates, strict=True):
        try:
            key = load_der_private_key(der, None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            failures[handle] = f"its key cannot be read: {error}"
            continue
        if not isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey):
            failures[handle] = "a TPM has RSA keys, and keys on curves of NIST"
            continue
        names = set[bytes]()
        for public in earlier.get(handle, ()):
            with contextlib.suppress(KeyError, ValueError):  # such a one was never in a TPM
                names.add(public_name(handle, public, decrypt))
        found[handle] = Wanted(key, decrypt, certificate, frozenset(names))
    return found, failures


def _earlier(asked: tpm.WantKeys) -> dict[int, list[PublicKey]]:
    """By handle; what cannot be read was never in a TPM, nor was another kind of key.  Raises ValueError."""
    if len(asked.earlier) > tpm.MAX_EARLIER or len(asked.earlier) != len(asked.earlier_handles):
        raise ValueError(f"at most {tpm.MAX_EARLIER} earlier generations, each with a handle")
    found: dict[int, list[PublicKey]] = {}
    for handle, der in zip(asked.earlier_handles, asked.earlier, strict=True):
        with contextlib.suppress(ValueError, TypeError, UnsupportedAlgorithm):
            key = load_der_public_key(der)
            if isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey):
                found.setdefault(handle, []).append(key)
    return found
