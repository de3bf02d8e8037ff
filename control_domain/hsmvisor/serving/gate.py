"""The gate in front of every method: who calls, whether it may, and one way for errors to leave.

It sees the request's bytes as they came, before they are parsed: a signature covers those and no others.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from typing import Any, Protocol

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from hsmvisor.serving import errors, limits
from hsmvisor.serving.access import Call, Caller, Table
from hsmvisor.serving.errors import Invalid, ServiceError, Unauthenticated
from hsmvisor.serving.refusals import Log, Refusals
from hsmvisor.serving.requests import Origin
from hsmvisor.serving.throttle import Throttle
from hsmvisor_rpc.v1.request_signing import WHY

_log = logging.getLogger(__name__)

_caller: ContextVar[Caller] = ContextVar("caller")
_why: ContextVar[str] = ContextVar("why")

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]


class Authenticator(Protocol):
    async def identify(self, call: Call) -> Caller:
        """Returns the caller; one whose identity is not proved has no roles.  Raises Unauthenticated for a wrong proof."""


def caller() -> Caller:
    """Returns who calls the method that runs."""
    return _caller.get()


def origin() -> Origin:
    """Returns who calls and why, for the audit log."""
    return Origin(_caller.get().name, _why.get())


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    def __init__(self, table: Table, authenticator: Authenticator, audit: Log) -> None:
        self.authenticator = authenticator  #: replaced when the configuration is read again
        self._table, self._refusals = table, Refusals(audit, table.service, Throttle(200, 20))
        self.refused = 0

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = str(handler_call_details.method)
        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(
                self._streaming(method, handler.stream_stream), handler.request_deserializer, handler.response_serializer
            )
        if handler.response_streaming:
            behaviour = self._answers(method, handler.request_deserializer, handler.unary_stream)
            return grpc.unary_stream_rpc_method_handler(behaviour, None, handler.response_serializer)
        single = self._answer(method, handler.request_deserializer, handler.unary_unary)
        return grpc.unary_unary_rpc_method_handler(single, None, handler.response_serializer)

    # ---- the three shapes of a method ---------------------------------------------------------------------------

    def _answer(self, method: str, parse: Callable[[bytes], Any], inner: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
        async def behaviour(body: bytes, context: Any) -> Any:
            try:
                request = await self._admit(method, body, parse, context)
                return await inner(request, context)
            except Exception as error:
                await self._abort(method, error, context)

        return behaviour

    def _answers(self, method: str, parse: Callable[[bytes], Any], inner: Callable[..., Any]) -> Callable[..., AsyncIterator[Any]]:
        async def behaviour(body: bytes, context: Any) -> AsyncIterator[Any]:
            try:
                request = await self._admit(method, body, parse, context)
                if (answers := inner(request, context)) is None or not hasattr(answers, "__aiter__"):
                    await answers  # it writes to the context by itself
                    return
                async for answer in answers:
                    yield answer
            except Exception as error:
                await self._abort(method, error, context)

        return behaviour

    def _streaming(self, method: str, inner: Callable[..., Any]) -> Callable[..., AsyncIterator[Any]]:
        async def behaviour(requests: Any, context: Any) -> AsyncIterator[Any]:
            try:
                await self._enter(method, None, context)
                async for answer in inner(requests, context):
                    yield answer
            except Exception as error:
                await self._abort(method, error, context)

        return behaviour

    # ---- in and out ---------------------------------------------------------------------------------------------

    async def _admit(self, method: str, body: bytes, parse: Callable[[bytes], Any], context: Any) -> Any:
        await self._enter(method, body, context)
        try:
            return parse(body)
        except DecodeError:
            raise Invalid("MALFORMED", "the request is not a message of this method") from None

    async def _enter(self, method: str, body: bytes | None, context: Any) -> None:
        """Identifies the caller and checks its roles; raises Unauthenticated, Forbidden."""
        metadata = dict(context.invocation_metadata() or ())
        call = Call(method, body, metadata, context.peer(), context.auth_context() or {})
        try:
            known = await self.authenticator.identify(call)
        except Unauthenticated as error:
            self._refuse(method, f"unknown:{call.peer}", error)
            raise
        if not self._table.may(method, known):
            denied = self._table.denied(method, known)
            self._refuse(method, known.name, denied)
            raise denied
        _caller.set(known)
        _why.set(limits.why(str(metadata.get(WHY, ""))))

    def _refuse(self, method: str, who: str, error: ServiceError) -> None:
        self.refused += 1
        self._refusals.note(who, method, error)

    async def _abort(self, method: str, error: Exception, context: Any) -> None:
        if isinstance(error, ServiceError):
            if method in self._table.changing:
                known = _caller.get(None)  # refused before it was a request that could be carried out
                self._refusals.note(known.name if known else f"unknown:{context.peer()}", method, error)
            await context.abort(errors.code(error), error.detail, (errors.trailer(error),))
        if isinstance(error, grpc.aio.AbortError):
            raise error
        _log.error("%s failed", method, exc_info=error)
        service = self._table.service
        internal = errors.Broken("INTERNAL", f"an error inside the {service} service", f"see the {service}'s log")
        await context.abort(errors.code(internal), internal.detail, (errors.trailer(internal),))
