"""Times as messages have them."""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp

_LAST = 253402300799  #: 9999-12-31T23:59:59Z, the last second of a Timestamp


def timestamp(seconds: float) -> Timestamp | None:
    """Returns None (no timestamp) for 0; what is later than a Timestamp may be is its last second."""
    if not seconds:
        return None
    whole = int(seconds)
    return Timestamp(seconds=min(whole, _LAST), nanos=int((seconds - whole) * 1e9))
