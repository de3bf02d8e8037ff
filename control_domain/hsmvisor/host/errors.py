"""What the host refuses or cannot do: one tree, and the table to google.rpc.Status.

HostError
├── Invalid              what was asked cannot be
├── Unauthenticated      who is calling is not proved
├── Forbidden            the caller's roles do not allow it
├── NotFound
├── Exists
├── Conflict             a request id with other content
├── WrongState           not now, not in this state
├── Exhausted            a limit is reached
├── Unavailable          a part of the host is not there now; try again
│   └── StorageUnavailable   nothing was changed
├── Refused              a module refused what was signed or sealed
├── Lost                 a position in a stream is not kept any more
└── Broken               start-up cannot go on: a damaged state, another instance, a bad configuration
"""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2  # type: ignore[import-untyped]
from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.sealed.refusal import Reason

DOMAIN = "hsmvisor"


class HostError(Exception):
    """`reason` is stable and for programs, `detail` one sentence for people, `hint` what to do; none holds a secret."""

    def __init__(self, reason: str, detail: str, hint: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.hint = reason, detail, hint
        self.noted = False  #: it stands in the audit log


class Invalid(HostError): ...


class Unauthenticated(HostError): ...


class Forbidden(HostError): ...


class NotFound(HostError): ...


class Exists(HostError): ...


class Conflict(HostError): ...


class WrongState(HostError): ...


class Exhausted(HostError): ...


class Unavailable(HostError): ...


class StorageUnavailable(Unavailable): ...


class Refused(HostError): ...


class Lost(HostError): ...


class Broken(HostError): ...


#: A class that is not here has its parent's code.
_CODES: dict[type[Any], int] = {
    Invalid: code_pb2.INVALID_ARGUMENT,
    Unauthenticated: code_pb2.UNAUTHENTICATED,
    Forbidden: code_pb2.PERMISSION_DENIED,
    NotFound: code_pb2.NOT_FOUND,
    Exists: code_pb2.ALREADY_EXISTS,
    Conflict: code_pb2.ABORTED,
    WrongState: code_pb2.FAILED_PRECONDITION,
    Exhausted: code_pb2.RESOURCE_EXHAUSTED,
    Unavailable: code_pb2.UNAVAILABLE,
    Lost: code_pb2.OUT_OF_RANGE,
    Broken: code_pb2.INTERNAL,
}

#: A worker's reasons.  Who asked wrongly: PERMISSION_DENIED; what cannot be: INVALID_ARGUMENT; not now: FAILED_PRECONDITION.
_REFUSALS: dict[str, int] = {
    Reason.WRONG_MODULE: code_pb2.PERMISSION_DENIED,
    Reason.WRONG_HOST: code_pb2.PERMISSION_DENIED,
    Reason.UNKNOWN_MANAGER: code_pb2.PERMISSION_DENIED,
    Reason.ALTERED: code_pb2.PERMISSION_DENIED,
    Reason.EXPIRED: code_pb2.FAILED_PRECONDITION,
    Reason.NOT_YET_VALID: code_pb2.FAILED_PRECONDITION,
    Reason.REPLAY: code_pb2.FAILED_PRECONDITION,
    Reason.STALE_SEQUENCE: code_pb2.FAILED_PRECONDITION,
    Reason.STALE_GENERATION: code_pb2.FAILED_PRECONDITION,
    Reason.UNKNOWN_MATERIAL: code_pb2.FAILED_PRECONDITION,
    Reason.UNKNOWN_GENERATION: code_pb2.FAILED_PRECONDITION,
    Reason.WRONG_STATE: code_pb2.FAILED_PRECONDITION,
    Reason.LIMIT: code_pb2.FAILED_PRECONDITION,
    Reason.KEY_MISMATCH: code_pb2.INVALID_ARGUMENT,
    Reason.BAD_CHAIN: code_pb2.INVALID_ARGUMENT,
    Reason.UNSUPPORTED_KEY: code_pb2.INVALID_ARGUMENT,
    Reason.TOO_LARGE: code_pb2.INVALID_ARGUMENT,
    Reason.MALFORMED: code_pb2.INVALID_ARGUMENT,
    "INVALID": code_pb2.INVALID_ARGUMENT,
    m.REASON_STORAGE: code_pb2.UNAVAILABLE,
    m.REASON_PHASE: code_pb2.UNAVAILABLE,
    m.REASON_INTERNAL: code_pb2.INTERNAL,
    m.REASON_UNSEALED: code_pb2.INTERNAL,
    m.REASON_HSM: code_pb2.UNAVAILABLE,
}

_STATUS_CODES = {c.value[0]: c for c in grpc.StatusCode}

_HINTS: dict[str, str] = {
    Reason.STALE_SEQUENCE: "fetch the module's identity again and use a higher sequence number",
    Reason.REPLAY: "fetch the module's identity again and use a higher sequence number",
    Reason.EXPIRED: "sign the command again; compare the clocks of manager and host",
    Reason.NOT_YET_VALID: "compare the clocks of manager and host",
    Reason.UNKNOWN_MANAGER: "the module obeys the root it was created with: sign with that root or a signer it certified",
    Reason.WRONG_HOST: "fetch the module's identity from this host and check it against the pinned host key",
    m.REASON_HSM: "see hsmvisor module show; hsmvisor doctor looks at library and token",
    m.REASON_STORAGE: "nothing was changed; look at the host's log and disk, then try again",
}


def refused(error: m.Error) -> HostError:
    """Returns the error for what a worker refused; a reason that is not in the table is the worker's fault."""
    if error.reason not in _REFUSALS:
        return Unavailable("WORKER", "the module answered what it may not; see the host's log")
    return Refused(error.reason, error.detail, _HINTS.get(error.reason, ""))


def code(error: HostError) -> grpc.StatusCode:
    if isinstance(error, Refused):
        return _STATUS_CODES[_REFUSALS[error.reason]]
    return _STATUS_CODES[next(_CODES[cls] for cls in type(error).__mro__ if cls in _CODES)]


def trailer(error: HostError) -> tuple[str, bytes]:
    """Returns the metadata entry that carries the google.rpc.Status with its ErrorInfo; the hint is in its metadata."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata={"hint": error.hint} if error.hint else {})
    detail = any_pb2.Any()
    detail.Pack(info)
    status = status_pb2.Status(code=code(error).value[0], message=error.detail, details=[detail])
    return "grpc-status-details-bin", status.SerializeToString()
