"""Metadata that goes with each call of a channel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import grpc


class _Details(NamedTuple):
    method: str
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: Any
    compression: Any


class _Metadata(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):  # type: ignore[type-arg]
    """Its repr shows no value."""

    def __init__(self, name: str, value: str) -> None:
        self._entry = (name, value)

    def _pass(self, go_on: Callable[[Any, Any], Any], details: Any, request: Any) -> Any:
        more = (details.credentials, details.wait_for_ready, details.compression)
        return go_on(_Details(details.method, details.timeout, [*(details.metadata or ()), self._entry], *more), request)

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return self._pass(continuation, client_call_details, request)

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return self._pass(continuation, client_call_details, request)


def with_metadata(channel: grpc.Channel, name: str, value: str) -> grpc.Channel:
    """Returns a channel whose every call carries this entry."""
    return grpc.intercept_channel(channel, _Metadata(name, value))
