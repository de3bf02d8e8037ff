"""Sends webhooks.

With http.client and not with `requests`: the connection is in our hands from its first byte, so that it can be cut when the time is
over, and nothing is followed, stored or taken from the environment (redirects, cookies, proxies, .netrc).
"""

from __future__ import annotations

import http.client
import socket
import ssl
from collections.abc import Callable, Sequence

from hsmvisor.manager.history import cleaning
from hsmvisor.manager.history.happened import Event
from hsmvisor.manager.notify import limits, secrets, signing
from hsmvisor.manager.notify.calls import Connection, call
from hsmvisor.manager.notify.channels import Webhook
from hsmvisor.manager.notify.errors import Gone, Undelivered


class WebhookSender:
    at_once = limits.AT_ONCE
    digests = False

    def __init__(self, channel: Webhook, clock: Callable[[], float], seconds: float = limits.WHOLE) -> None:
        self.channel, self._clock, self._seconds = channel, clock, seconds

    async def send(self, events: Sequence[Event]) -> None:
        """Sends the one event.  Raises Undelivered, Gone."""
        (event,) = events
        status, after = await call(lambda connection: self._post(connection, event), self._seconds)
        if status == http.client.GONE:
            raise Gone("the receiver wants no more (HTTP 410)")
        if 300 <= status < 400:
            raise Undelivered(f"the receiver redirects (HTTP {status}), which is not followed: change the url")
        if not 200 <= status < 300:
            raise Undelivered(f"the receiver answered with HTTP {status}", after)

    def _post(self, connection: Connection, event: Event) -> tuple[int, float]:
        """Returns the status, and the seconds that the receiver asks to wait.  In a thread."""
        content, name = signing.body(event), signing.message_id(event)
        keys = secrets.signing_keys(self.channel.secret_file)
        told = signing.headers(keys, name, int(self._clock()), content)
        told |= {"content-type": "application/json", "user-agent": "hsmvisor", "connection": "close"}
        parts = self.channel.parts
        is_tls = parts.scheme == "https"
        host, port = parts.hostname or "", parts.port or (443 if is_tls else 80)
        try:
            context = tls_context(self.channel.ca_file) if is_tls else None
            with connection.open(host, port) as plain:
                line = context.wrap_socket(plain, server_hostname=host) if context else plain
                with line:
                    client = (
                        http.client.HTTPSConnection(host, port, context=context)
                        if context
                        else http.client.HTTPConnection(host, port)
                    )
                    client.sock = line
                    client.request("POST", (parts.path or "/") + (f"?{parts.query}" if parts.query else ""), content, told)
                    answer = client.getresponse()  # its body is not read: the status says all
                    return answer.status, _seconds(answer.headers.get("retry-after", ""))
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise Undelivered(failure(error)) from None


def _seconds(text: str) -> float:
    return min(float(text), limits.LONGEST_PAUSE) if text.isascii() and text.isdigit() and len(text) < 10 else 0


def tls_context(ca_file: str) -> ssl.SSLContext:
    """Raises Undelivered."""
    try:
        return ssl.create_default_context(cafile=ca_file or None)
    except (OSError, ValueError) as error:
        raise Undelivered(f"ca_file {ca_file}: {getattr(error, 'strerror', '') or 'no certificates in PEM'}") from None


def failure(error: Exception) -> str:
    """Says what became of a connection."""
    match error:
        case http.client.RemoteDisconnected():
            return "the receiver closed the connection without an answer"
        case ssl.SSLCertVerificationError():
            return f"the other side's certificate: {cleaning.text(error.verify_message, limits.MAX_FAILURE)}"
        case ssl.SSLError():
            return f"TLS failed: {cleaning.text(error.reason or 'it did not say why', limits.MAX_FAILURE)}"
        case socket.gaierror():
            return "the other side's name cannot be resolved"
        case TimeoutError():
            return "the other side does not answer in time"
        case http.client.HTTPException():
            return f"the receiver's answer is no HTTP ({type(error).__name__})"
        case OSError():
            return f"no connection: {error.strerror or type(error).__name__}"
    return f"no connection ({type(error).__name__})"
