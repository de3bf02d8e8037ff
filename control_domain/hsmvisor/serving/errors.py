"""What a service refuses or cannot do: one tree, and the table to google.rpc.Status.

ServiceError
├── Invalid              what was asked cannot be
├── Unauthenticated      who is calling is not proved
├── Forbidden            the caller's roles do not allow it
├── NotFound
├── Exists
├── Conflict             a request id with other content
├── WrongState           not now, not in this state
├── Exhausted            a limit is reached
├── Unavailable          a part of the service is not there now; try again
│   └── StorageUnavailable   nothing was changed
├── Refused              who carries it out refused what was signed or sealed, and knows the code of that
├── Lost                 a position in a stream is not kept any more
└── Broken               start-up cannot go on: a damaged state, another instance
    └── BadConfig        a configuration that cannot be used
"""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

DOMAIN = "hsmvisor"


class ServiceError(Exception):
    """`reason` is stable and for programs, `detail` one sentence for people, `hint` what to do; none holds a secret."""

    def __init__(self, reason: str, detail: str, hint: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.hint = reason, detail, hint
        self.noted = False  #: it stands in the audit log


class Invalid(ServiceError): ...


class Unauthenticated(ServiceError): ...


class Forbidden(ServiceError): ...


class NotFound(ServiceError): ...


class Exists(ServiceError): ...


class Conflict(ServiceError): ...


class WrongState(ServiceError): ...


class Exhausted(ServiceError): ...


class Unavailable(ServiceError): ...


class StorageUnavailable(Unavailable): ...


class Refused(ServiceError):
    """`status` comes from who refused: whether it was asked wrongly, cannot be or is not possible now is known there alone."""

    def __init__(self, reason: str, detail: str, hint: str, status: grpc.StatusCode) -> None:
        super().__init__(reason, detail, hint)
        self.status = status


class Lost(ServiceError): ...


class Broken(ServiceError): ...


class BadConfig(Broken):
    """A configuration that cannot be used; the message names the file, the key and what it may be."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__("CONFIG", f"{where}: {what}")


#: A class that is not here has its parent's code.
_CODES: dict[type[Any], grpc.StatusCode] = {
    Invalid: grpc.StatusCode.INVALID_ARGUMENT,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    Forbidden: grpc.StatusCode.PERMISSION_DENIED,
    NotFound: grpc.StatusCode.NOT_FOUND,
    Exists: grpc.StatusCode.ALREADY_EXISTS,
    Conflict: grpc.StatusCode.ABORTED,
    WrongState: grpc.StatusCode.FAILED_PRECONDITION,
    Exhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    Lost: grpc.StatusCode.OUT_OF_RANGE,
    Broken: grpc.StatusCode.INTERNAL,
}


def code(error: ServiceError) -> grpc.StatusCode:
    if isinstance(error, Refused):
        return error.status
    return next(_CODES[cls] for cls in type(error).__mro__ if cls in _CODES)


def trailer(error: ServiceError) -> tuple[str, bytes]:
    """Returns the metadata entry that carries the google.rpc.Status with its ErrorInfo; the hint is in its metadata."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata={"hint": error.hint} if error.hint else {})
    detail = any_pb2.Any()
    detail.Pack(info)
    status = status_pb2.Status(code=code(error).value[0], message=error.detail, details=[detail])
    return "grpc-status-details-bin", status.SerializeToString()


# ---- where a call has failed ------------------------------------------------------------------------------------------


def told(untrusted_error: grpc.RpcError) -> tuple[str, str]:
    """Returns the reason and the hint that a failed call's trailer carries; both empty where there is none that can be read."""
    try:
        status = rpc_status.from_call(untrusted_error)  # type: ignore[arg-type]
        for part in status.details if status else ():
            info = error_details_pb2.ErrorInfo()
            if part.Unpack(info):
                return str(info.reason), str(info.metadata.get("hint", ""))
    except (ValueError, DecodeError):  # it says something else than the call's code and message, or is none
        pass
    return "", ""


def last_words(detail: str) -> str:
    """Returns the end of gRPC's own words about a connection, which says why there is none."""
    return detail.rpartition("last error: ")[2].removeprefix("UNKNOWN: ")
