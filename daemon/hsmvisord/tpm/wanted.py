"""Which keys are to be in a TPM and at which handles, each with its certificate beside it; and how that comes about."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from hsmvisor_rpc.internal import tpm

from hsmvisord import limits
from hsmvisord.tpm.certificates import Certificates
from hsmvisord.tpm.engine import TpmFault
from hsmvisord.tpm.platform import FIRST, OWNERS_FIRST, NotLoaded, Platform, PrivateKey, PublicKey
from hsmvisord.wire import tpm2
from hsmvisord.wire.tpm2 import Tpm2Error

#: Persistent handles that a key may have; the rest of a handle names its certificate's index.
PLATFORMS, OWNERS = tpm.PLATFORM_HANDLES, tpm.OWNER_HANDLES
#: NV indices of the certificates, in the range of platform manufacturers (Registry of Reserved TPM 2.0 Handles and Localities).
PLATFORMS_INDEX, OWNERS_INDEX = 0x01400000, 0x01410000
_LAST_INDEX = OWNERS_INDEX + len(OWNERS) - 1
_NO_ROOM = 0x14B  #: TPM_RC_NV_SPACE


@dataclass(frozen=True)
class Wanted:
    """What is to be at a handle.  `decrypt`: it decrypts and agrees, and signs nothing; `certificate`: DER, empty: none; `earlier`:
    Names of keys of which one may stay there, with its certificate, as long as the TPM takes no other (but where the guest's owner
    keeps this one out it goes)."""

    key: PrivateKey = field(repr=False)
    decrypt: bool = False
    certificate: bytes = b""
    earlier: frozenset[bytes] = frozenset()


class NotPlaced(TpmFault):
    """Keys and certificates that are not there, and why; all else is, or will be when the guest starts."""

    def __init__(self, failures: Mapping[int, str]) -> None:
        super().__init__("; ".join(f"{handle:#x}: {why}" for handle, why in failures.items()))


def index_of(handle: int) -> int:
    """The NV index of its certificate."""
    return PLATFORMS_INDEX + handle - FIRST if handle >= FIRST else OWNERS_INDEX + handle - OWNERS_FIRST


def name_of(handle: int, one: Wanted) -> bytes:
    """Raises KeyError for a curve that TPMs do not have, ValueError for another key that they do not have."""
    return public_name(handle, one.key.public_key(), one.decrypt)


def public_name(handle: int, key: PublicKey, decrypt: bool) -> bytes:
    """As name_of."""
    return tpm2.name_of(Platform.public(handle, key, decrypt))


def possible(wanted: Mapping[int, Wanted]) -> tuple[dict[int, Wanted], dict[int, str]]:
    """Returns what of it a TPM can have, and why it has not the rest: that keeps no other one from coming or going."""
    found, failures = dict[int, Wanted](), dict[int, str]()
    for handle, one in wanted.items():
        if why := _impossible(handle, one):
            failures[handle] = why
            continue
        if len(one.certificate) > limits.MAX_TPM_CERTIFICATE:
            failures[handle] = f"its certificate has {len(one.certificate)} bytes, a TPM's at most {limits.MAX_TPM_CERTIFICATE}"
            one = replace(one, certificate=b"")
        found[handle] = one
    return found, failures


def _impossible(handle: int, one: Wanted) -> str:
    """Why there is no such key in a TPM; empty: there may be."""
    if handle not in PLATFORMS and handle not in OWNERS:
        return f"no handle for a key: {PLATFORMS[0]:#x} to {PLATFORMS[-1]:#x}, {OWNERS[0]:#x} to {OWNERS[-1]:#x}"
    try:
        name_of(handle, one)
        tpm2.sensitive_area(one.key)
    except KeyError:
        return "a curve that TPMs do not have"
    except ValueError as error:
        return str(error)
    return ""


def place(platform: Platform, certificates: Certificates, wanted: Mapping[int, Wanted]) -> dict[int, str]:
    """Has these keys and certificates there, and no others of ours.  What is right already stays as it is.

    Returns why a key at an owner's handle does not come, or a certificate for which a guest leaves no room; all else is done.
    Raises Tpm2Error, BadResponse, TpmFault: something of before may be gone.
    """
    there, failures = platform.names(), dict[int, str]()
    for handle in there.keys() - wanted.keys():
        platform.remove(handle)
    for handle, one in sorted(wanted.items()):
        if there.get(handle) != name_of(handle, one):
            try:
                _put(platform, handle, one, handle in there)
            except NotLoaded as error:
                if handle in PLATFORMS:
                    raise
                failures[handle] = str(error)
    beside = {handle: one.certificate for handle, one in wanted.items() if one.certificate and handle not in failures}
    indices = set(map(index_of, beside))
    for index in certificates.indices(PLATFORMS_INDEX, _LAST_INDEX):
        if index not in indices:
            certificates.remove(index)
    for handle, der in sorted(beside.items()):
        if certificates.at(index_of(handle)) != der:
            try:
                certificates.put(index_of(handle), der)
            except Tpm2Error as error:
                if error.code != _NO_ROOM:
                    raise
                failures[handle] = "there is no room for its certificate: the guest has filled its TPM's NV memory"
    return failures


def withdraw(platform: Platform, certificates: Certificates, wanted: Mapping[int, Wanted]) -> None:
    """Takes away what may not stay, and no more: that needs no room in the TPM.  Raises Tpm2Error, BadResponse."""
    there = platform.names()
    gone = unwanted(there, wanted)
    beside = {index_of(handle): one.certificate for handle, one in wanted.items() if handle not in gone}
    earlier = {index_of(handle) for handle in there.keys() - gone if there[handle] in wanted[handle].earlier}
    for handle in gone:
        platform.remove(handle)
    for index in certificates.indices(PLATFORMS_INDEX, _LAST_INDEX):
        if index not in earlier and certificates.at(index) != beside.get(index):
            with contextlib.suppress(Tpm2Error):  # no certificate keeps a key there
                certificates.remove(index)


def unwanted(there: Mapping[int, bytes], wanted: Mapping[int, Wanted]) -> frozenset[int]:
    """Handles of keys that may not stay, by the Names that are there."""
    return frozenset(
        handle
        for handle, name in there.items()
        if handle not in wanted or name not in (name_of(handle, wanted[handle]), *wanted[handle].earlier)
    )


def _put(platform: Platform, handle: int, one: Wanted, instead: bool) -> None:
    """`instead`: of one of ours, which goes even if this one does not come: it is not wanted any more."""
    if handle in OWNERS and not instead and platform.public_at(handle) is not None:
        raise NotLoaded("something of the guest's own is there")
    try:
        platform.put(handle, one.key, one.decrypt)
    except NotLoaded:
        if instead:
            platform.remove(handle)
        raise
