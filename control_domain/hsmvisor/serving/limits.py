"""Limits of every service, and the checks of what every call may carry."""

from __future__ import annotations

from hsmvisor.serving.errors import Invalid
from hsmvisor.serving.text import clean

MAX_REQUEST_ID = 64  #: characters
MAX_WHY = 256  #: characters of a caller's reason

DEFAULT_PAGE = 100
MAX_PAGE = 1000

MAX_MESSAGE = 4 * 1024 * 1024  #: bytes of one control API request
MAX_ANSWER = 16 * 1024 * 1024  #: bytes of one control API answer

REQUEST_KEPT = 7 * 86400  #: seconds that the answer to a request id is kept
EVENT_RING = 10_000  #: events that can be resumed from
MAX_UNIX_PATH = 107  #: bytes of sun_path without its end (unix(7))


def request_id(untrusted_id: str) -> str:
    """Returns a valid request id; raises Invalid."""
    if not 1 <= len(untrusted_id) <= MAX_REQUEST_ID or not untrusted_id.isascii() or not untrusted_id.isprintable():
        raise Invalid(
            "REQUEST_ID", f"request_id is 1-{MAX_REQUEST_ID} printable ASCII characters: send a new UUID with each new request"
        )
    return untrusted_id


def page_size(untrusted_size: int) -> int:
    if untrusted_size < 0:
        raise Invalid("PAGE_SIZE", "page_size is not negative; 0 is the default")
    return min(untrusted_size or DEFAULT_PAGE, MAX_PAGE)


def why(untrusted_why: str) -> str:
    """Returns a caller's reason for the audit log, cut and made printable."""
    return clean(untrusted_why, MAX_WHY)
