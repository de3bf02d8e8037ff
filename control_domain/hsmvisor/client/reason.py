"""Why a caller does what it does: a reason that goes with each call, for the host's audit log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import grpc
from hsmvisor_rpc.v1.request_signing import WHY


class _Details(NamedTuple):
    method: str
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: Any
    compression: Any


class _Reason(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):  # type: ignore[type-arg]
    def __init__(self, why: str) -> None:
        self._why = why.encode("ascii", "replace").decode()  # what metadata may hold

    def _pass(self, go_on: Callable[[Any, Any], Any], details: Any, request: Any) -> Any:
        metadata = [*(details.metadata or ()), (WHY, self._why)]
        more = (details.credentials, details.wait_for_ready, details.compression)
        return go_on(_Details(details.method, details.timeout, metadata, *more), request)

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return self._pass(continuation, client_call_details, request)

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return self._pass(continuation, client_call_details, request)


def with_reason(channel: grpc.Channel, why: str) -> grpc.Channel:
    """Returns a channel whose every call says `why`."""
    return grpc.intercept_channel(channel, _Reason(why))
