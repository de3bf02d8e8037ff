"""Why a caller does what it does: a reason that goes with each call, for the host's audit log."""

from __future__ import annotations

import grpc
from hsmvisor.client.metadata import with_metadata
from hsmvisor_rpc.v1.request_signing import WHY


def with_reason(channel: grpc.Channel, why: str) -> grpc.Channel:
    """Returns a channel whose every call says `why`."""
    return with_metadata(channel, WHY, why.encode("ascii", "replace").decode())  # what metadata may hold
