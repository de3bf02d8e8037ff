"""Which HTTP status an error is told with."""

from __future__ import annotations

from hsmvisor.serving.errors import (
    Conflict,
    Exhausted,
    Exists,
    Forbidden,
    Invalid,
    NotFound,
    ServiceError,
    Unauthenticated,
    Unavailable,
    WrongState,
)

_STATUS: tuple[tuple[type[ServiceError], int], ...] = (
    (Invalid, 400),
    (Unauthenticated, 401),
    (Forbidden, 403),
    (NotFound, 404),
    (Exists, 409),
    (Conflict, 409),
    (WrongState, 409),
    (Exhausted, 429),
    (Unavailable, 503),
)


def status_of(error: ServiceError | None) -> int:
    """None: there is no error."""
    if error is None:
        return 200
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
