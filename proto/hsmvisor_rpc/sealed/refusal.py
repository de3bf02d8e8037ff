"""Why a module or a host refuses something that was signed or sealed: stable names, each with one sentence."""

from __future__ import annotations

import enum


class Reason(enum.StrEnum):
    """Stable reasons; they travel as google.rpc.ErrorInfo.reason and stand in the audit log."""

    WRONG_MODULE = "WRONG_MODULE"  # addressed to another module
    WRONG_HOST = "WRONG_HOST"  # addressed to another host, or not signed by the pinned host
    UNKNOWN_MANAGER = "UNKNOWN_MANAGER"  # the signer is not certified by this module's root
    EXPIRED = "EXPIRED"
    NOT_YET_VALID = "NOT_YET_VALID"
    REPLAY = "REPLAY"  # this very sequence number was used, or a quote answers another nonce
    STALE_SEQUENCE = "STALE_SEQUENCE"  # a lower sequence number than the last one
    STALE_GENERATION = "STALE_GENERATION"  # not newer than every generation of this material
    ALTERED = "ALTERED"  # a signature or a seal does not fit its bytes
    KEY_MISMATCH = "KEY_MISMATCH"  # the private key does not belong to the certificate
    BAD_CHAIN = "BAD_CHAIN"  # certificates are not ordered leaf to root, or one does not certify the one before
    UNSUPPORTED_KEY = "UNSUPPORTED_KEY"
    TOO_LARGE = "TOO_LARGE"
    MALFORMED = "MALFORMED"
    UNKNOWN_MATERIAL = "UNKNOWN_MATERIAL"
    UNKNOWN_GENERATION = "UNKNOWN_GENERATION"
    WRONG_STATE = "WRONG_STATE"  # the generation's state does not allow this step
    LIMIT = "LIMIT"  # a count would pass its limit


class Refusal(Exception):
    """A signed or sealed thing is refused and nothing has changed.

    `reason` is stable and for programs, `detail` is one sentence for people; neither holds a secret.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
