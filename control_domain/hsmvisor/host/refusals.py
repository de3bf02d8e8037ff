"""What a worker refuses, as an error of the control API: its code, and what to do about it."""

from __future__ import annotations

import grpc
from hsmvisor.serving.errors import Refused, ServiceError, Unavailable
from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.sealed.refusal import Reason

#: A worker's reasons.  Who asked wrongly: PERMISSION_DENIED; what cannot be: INVALID_ARGUMENT; not now: FAILED_PRECONDITION.
_REFUSALS: dict[str, grpc.StatusCode] = {
    Reason.WRONG_MODULE: grpc.StatusCode.PERMISSION_DENIED,
    Reason.WRONG_HOST: grpc.StatusCode.PERMISSION_DENIED,
    Reason.UNKNOWN_MANAGER: grpc.StatusCode.PERMISSION_DENIED,
    Reason.ALTERED: grpc.StatusCode.PERMISSION_DENIED,
    Reason.EXPIRED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.NOT_YET_VALID: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.REPLAY: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.STALE_SEQUENCE: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.STALE_GENERATION: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.UNKNOWN_MATERIAL: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.UNKNOWN_GENERATION: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.WRONG_STATE: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.LIMIT: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.KEY_MISMATCH: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.BAD_CHAIN: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.UNSUPPORTED_KEY: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.TOO_LARGE: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.MALFORMED: grpc.StatusCode.INVALID_ARGUMENT,
    "INVALID": grpc.StatusCode.INVALID_ARGUMENT,
    m.REASON_STORAGE: grpc.StatusCode.UNAVAILABLE,
    m.REASON_PHASE: grpc.StatusCode.UNAVAILABLE,
    m.REASON_INTERNAL: grpc.StatusCode.INTERNAL,
    m.REASON_UNSEALED: grpc.StatusCode.INTERNAL,
    m.REASON_HSM: grpc.StatusCode.UNAVAILABLE,
    m.REASON_TPM: grpc.StatusCode.FAILED_PRECONDITION,
}

_HINTS: dict[str, str] = {
    Reason.STALE_SEQUENCE: "fetch the module's identity again and use a higher sequence number",
    Reason.REPLAY: "fetch the module's identity again and use a higher sequence number",
    Reason.EXPIRED: "sign the command again; compare the clocks of manager and host",
    Reason.NOT_YET_VALID: "compare the clocks of manager and host",
    Reason.UNKNOWN_MANAGER: "the module obeys the root it was created with: sign with that root or a signer it certified",
    Reason.WRONG_HOST: "fetch the module's identity from this host and check it against the pinned host key",
    m.REASON_HSM: "see hsmvisor module show; hsmvisor doctor looks at library and token",
    m.REASON_TPM: "see hsmvisor module show; a TPM answers while its guest runs",
    m.REASON_STORAGE: "nothing was changed; look at the host's log and disk, then try again",
}


def refused(error: m.Error) -> ServiceError:
    """Returns the error for what a worker refused; a reason that is not in the table is the worker's fault."""
    if error.reason not in _REFUSALS:
        return Unavailable("WORKER", "the module answered what it may not; see the host's log")
    return Refused(error.reason, error.detail, _HINTS.get(error.reason, ""), _REFUSALS[error.reason])
