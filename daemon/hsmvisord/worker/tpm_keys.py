"""Which of the module's keys its TPM is to have, by the operator's map, told to the TPM's process whenever that changes."""

from __future__ import annotations

import contextlib
import math
import queue
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from hsmvisor_rpc.internal import hsm, tpm
from hsmvisor_rpc.sealed.canonical import MalformedRecord, Record

from hsmvisord import memory
from hsmvisord.ck import CkError
from hsmvisord.keystore.state import Generation, Material
from hsmvisord.token.catalogue import Index
from hsmvisord.token.token import Token

TICK = 1.0  #: seconds between looks at certificates that end
RETRY = 30.0  #: seconds until what a TPM did not take is tried again
MOVE_SECONDS = 5.0  #: that the TPM's process may take to hear of a move
KINDS = ("RSA 2048", "RSA 3072", "EC P-256", "EC P-384", "EC P-521")  #: that a TPM of ours has

DECRYPT = "decrypt"  #: the profile of a key that signs nothing


@dataclass(frozen=True)
class TpmSettings:
    keys: tuple[tuple[int, str], ...] = ()  #: handle and material


def tpm_settings(values: Any) -> TpmSettings:
    """From JSON: {"keys": {"0x81800001": NAME, ...}}.  Raises ValueError that names the fault."""
    if not isinstance(values, Mapping) or set(values) - {"keys"}:
        raise ValueError("a TPM has keys")
    keys = values.get("keys") or {}
    if not isinstance(keys, Mapping) or len(keys) > tpm.MAX_KEYS:
        raise ValueError(f"a TPM's keys are an object of at most {tpm.MAX_KEYS}: handle and material")
    found: dict[int, str] = {}
    for text, material in keys.items():
        try:
            handle = int(str(text), 16)
        except ValueError:
            handle = 0
        if handle not in tpm.OWNER_HANDLES and handle not in tpm.PLATFORM_HANDLES:
            raise ValueError(
                f"{text!r:.20} is no persistent handle for a key: 0x81800000-0x8180ffff, the owner's 0x81000000-0x8100ffff"
            )
        if handle in found or not isinstance(material, str) or not material:
            raise ValueError(f"handle {handle:#x} of a TPM has one material's name")
        found[handle] = material
    return TpmSettings(tuple(sorted(found.items())))


class _Row(NamedTuple):
    handle: int
    material: str
    number: int  #: of the generation
    leaf: int  #: handle of its certificate
    earlier: tuple[int, ...]  #: numbers of those that clients may meet as well


@dataclass(frozen=True)
class _Picture:
    """What is to be there: by handle the material's generation and its certificate."""

    rows: tuple[_Row, ...]
    missing: str  #: why a material of the map is not among them
    ends: float  #: seconds since 1970 when it is another one


class TpmKeys:
    """`told` is called with why a key of the map is not in the TPM, "" when all are."""

    def __init__(self, told: Callable[[str], None]) -> None:
        self._told = told
        self.settings = TpmSettings()
        self._changed = threading.Condition()
        self._sock: socket.socket | None = None
        self._token: Token | None = None
        self._moves: queue.SimpleQueue[tuple[tpm.Move, queue.SimpleQueue[str]]] = queue.SimpleQueue()
        self._looks = 0
        self._failure = ""

    def serve(self, sock: socket.socket, token: Token) -> None:
        """Tells the TPM's process at the other end, in the background, in the place of an earlier one.  `sock` is its own."""
        with self._changed:
            before, self._sock, self._token = self._sock, sock, token
            self._changed.notify_all()
        if before is not None:
            with contextlib.suppress(OSError):
                before.shutdown(socket.SHUT_RDWR)
        memory.start_thread("tpm keys", lambda: self._serve(sock, token))

    def configure(self, settings: TpmSettings) -> None:
        self.settings = settings
        self.look()

    def look(self) -> None:
        """The token or the map may have changed."""
        with self._changed:
            self._looks += 1
            self._changed.notify_all()

    def move(self, leaves: bool, ident: bytes, key: bytes) -> None:
        """The guest's machine goes to another host, or comes from one (internal/tpm.py, Move).  Raises ValueError."""
        answer: queue.SimpleQueue[str] = queue.SimpleQueue()
        with self._changed:
            if self._sock is None:
                raise ValueError("the module has no TPM")
            self._moves.put((tpm.Move(leaves, ident, key), answer))
            self._looks += 1
            self._changed.notify_all()
        try:
            failure = answer.get(timeout=MOVE_SECONDS)
        except queue.Empty:
            raise ValueError("the module's TPM does not answer") from None
        if failure:
            raise ValueError(failure)

    # ---- the thread -------------------------------------------------------------------------------------------------

    def _serve(self, sock: socket.socket, token: Token) -> None:
        told: _Picture | None = None
        looks, again = -1, math.inf
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda n=looks: self._sock is not sock or self._looks != n, TICK)  # type: ignore[misc]
                    if self._sock is not sock:
                        return
                    due, looks = self._looks != looks, self._looks
                retry = token.wall() >= again
                if due or retry or (told is not None and token.wall() >= told.ends):
                    self._carry_moves(sock)
                    picture = _picture(token, self.settings)
                    if retry or told is None or (picture.rows, picture.missing) != (told.rows, told.missing):
                        failure, answered = _put(sock, token, picture)
                        again = token.wall() + RETRY if answered.result == tpm.FAILED else math.inf
                        self._tell(failure)
                    told = picture
        except (OSError, MalformedRecord):
            pass  # the supervisor connects us with another one
        finally:
            sock.close()

    def _carry_moves(self, sock: socket.socket) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                asked, answer = self._moves.get_nowait()
                answer.put(_ask(sock, asked).detail)

    def _tell(self, failure: str) -> None:
        if failure != self._failure:
            self._failure = failure
            self._told(failure)


def _picture(token: Token, settings: TpmSettings) -> _Picture:
    index = token.index
    state, now = index.state, token.wall()
    rows, missing, ends = [], [], math.inf
    for handle, name in settings.keys if state.token_present else ():
        material = state.materials.get(name)
        current = material.current if material is not None else None
        if material is None or current is None:
            continue  # it comes when the material does
        kinds = {g.number: state.keys[g.key].private.kind.name for g in material.generations if g.live and g.key}
        until = {g.number: _refused_after(index, material, g) for g in material.generations if g.number in kinds}
        kind = kinds[current.number]
        if kind not in KINDS:
            missing.append(f"{name} is {kind}, which a TPM has not ({', '.join(KINDS)})")
        elif now >= until[current.number]:
            missing.append(f"the certificate of {name} has expired and its material refuses then")
        else:
            used = {number: end for number, end in until.items() if now < end and kinds[number] in KINDS}
            ends = min(ends, *used.values())
            rows.append(_Row(handle, name, current.number, current.leaf, tuple(sorted(used.keys() - {current.number}))))
    return _Picture(tuple(rows), "; ".join(missing), ends)


def _refused_after(index: Index, material: Material, generation: Generation) -> float:
    """Seconds since 1970."""
    use = index.objects_of(material, generation)[0].use
    assert use is not None, "a generation's first object is its private key"
    return use.refuse_after


def _put(sock: socket.socket, token: Token, picture: _Picture) -> tuple[str, tpm.KeysWanted]:
    """Has the TPM's process have what the picture says; returns what is not so, and its answer.  Raises as `_ask`."""
    state = token.index.state
    failures = [picture.missing] if picture.missing else []
    handles, keys, decrypt, certificates = [], [], [], []
    earlier = list[tuple[int, bytes]]()
    for row in picture.rows:
        material = state.materials.get(row.material)
        generation = material.generation(row.number) if material is not None else None
        if material is None or generation is None or not generation.key:
            continue  # the next look sees it
        try:
            keys.append(state.keys[generation.key].private.pkcs8())
        except CkError:
            failures.append(f"the key of {row.material} does not leave its HSM")
            continue
        handles.append(row.handle)
        decrypt.append(material.profile == DECRYPT)
        certificates.append(state.certificates[row.leaf].der if row.leaf else b"")
        earlier += [(row.handle, g.public_key) for g in material.generations if g.number in row.earlier and g.live]
    wanted = tpm.WantKeys(
        tuple(handles),
        tuple(keys),
        tuple(decrypt),
        tuple(certificates),
        tuple(handle for handle, _ in earlier),
        tuple(public for _, public in earlier),
    )
    answer = _ask(sock, wanted)
    return "; ".join([*failures, answer.detail] if answer.detail else failures), answer


def _ask(sock: socket.socket, question: Record) -> tpm.KeysWanted:
    """Raises OSError, MalformedRecord."""
    hsm.send(sock, question)
    answer = hsm.receive(sock, tpm.ANSWERS)
    if not isinstance(answer, tpm.KeysWanted):
        raise MalformedRecord("the TPM's process has ended")
    return answer
