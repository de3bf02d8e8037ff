"""What the module's worker says: which keys are wanted in the TPM, and that the machine moves."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from functools import partial

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
        with sock, contextlib.suppress(OSError, MalformedRecord):
            while (question := hsm.receive(sock, tpm.QUESTIONS)) is not None:
                with self._lock:
                    if self._sock is not sock:
                        return  # what an earlier worker wants counts no more
                hsm.send(sock, self._answer(question))

    def _answer(self, question: Record) -> tpm.KeysWanted:
        if isinstance(question, tpm.Move):
            return self._move(question)
        assert isinstance(question, tpm.WantKeys)
        result, failure = tpm.DONE, ""
        try:
            self._managed.want(_wanted(question))
        except Asleep:
            result = tpm.LATER
        except KeyError:
            failure = "a curve that TPMs do not have"
        except (ValueError, Tpm2Error, BadResponse, TpmFault, OSError) as error:
            failure = str(error)
        self._told(failure)
        return tpm.KeysWanted(tpm.FAILED if failure else result, failure)

    def _move(self, asked: tpm.Move) -> tpm.KeysWanted:
        if len(asked.ident) != MOVE_IDENT or len(asked.key) not in (0, MOVE_KEY):
            return tpm.KeysWanted(tpm.FAILED, f"a move has {MOVE_IDENT} bytes that name it, and a key of {MOVE_KEY}")
        self._seals.move(asked.leaves, asked.ident, asked.key)
        return tpm.KeysWanted(tpm.DONE, "")


def _wanted(asked: tpm.WantKeys) -> dict[int, Wanted]:
    """Raises ValueError; KeyError for a curve that TPMs do not have."""
    count = len(asked.handles)
    if count > tpm.MAX_KEYS or {len(asked.keys), len(asked.decrypt), len(asked.certificates)} != {count}:
        raise ValueError(f"at most {tpm.MAX_KEYS} keys, each with a handle")
    earlier = _earlier(asked)
    found = {}
    for handle, der, decrypt, certificate in zip(asked.handles, asked.keys, asked.decrypt, asked.certificates, strict=True):
        key = load_der_private_key(der, None)
        if not isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey):
            raise ValueError("a TPM has RSA keys, and keys on curves of NIST")
        names = frozenset(public_name(handle, public, decrypt) for public in earlier.get(handle, ()))
        found[handle] = Wanted(key, decrypt, certificate, names)
    if len(found) != count:
        raise ValueError("a handle has one key")
    return found


def _earlier(asked: tpm.WantKeys) -> dict[int, list[PublicKey]]:
    """By handle.  Raises ValueError."""
    if len(asked.earlier) > tpm.MAX_EARLIER or len(asked.earlier) != len(asked.earlier_handles):
        raise ValueError(f"at most {tpm.MAX_EARLIER} earlier generations, each with a handle")
    found: dict[int, list[PublicKey]] = {}
    for handle, der in zip(asked.earlier_handles, asked.earlier, strict=True):
        key = load_der_public_key(der)
        if isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey):  # another kind was never in a TPM
            found.setdefault(handle, []).append(key)
    return found
