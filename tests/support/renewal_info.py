"""An ACME server with renewal information (RFC 9773): pebble, which has none, with an HTTPS server of the test's in front of it.

A test tells what it says of windows, and whether it takes an order that names what it replaces; all else is pebble's.
"""

from __future__ import annotations

import base64
import http.client
import http.server
import json
import ssl
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import trustme
from support.pebble import Pebble

_PATH = "/renewal-info"
_ITS_OWN = ("Content-Length", "Transfer-Encoding", "Date")


@dataclass(frozen=True)
class Answer:
    """Of the server, whatever it is asked."""

    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    status: int = HTTPStatus.OK


def rfc3339(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat().replace("+00:00", "Z")


def suggestion(start: float, end: float, url: str = "", headers: Mapping[str, str] | None = None) -> Answer:
    told: dict[str, Any] = {"suggestedWindow": {"start": rfc3339(start), "end": rfc3339(end)}}
    if url:
        told["explanationURL"] = url
    return Answer(json.dumps(told).encode(), headers or {})


def problem(kind: str, status: int) -> Answer:
    told = {"type": f"urn:ietf:params:acme:error:{kind}", "detail": f"of a test: {kind}", "status": status}
    return Answer(json.dumps(told).encode(), {"Content-Type": "application/problem+json"}, status)


class RenewalInfo:
    def __init__(self, pebble: Pebble, directory: Path) -> None:
        """`directory`: where the root of its own certificate is written."""
        self.window: Answer | None = None  #: None: the directory has no renewal information
        self.refusal: Answer | None = None  #: of each order that replaces something; None: they are taken
        self.asked: list[str] = []  #: the certificates of which it was asked
        self.replaced: list[str] = []  #: what each new order that was taken or refused said that it replaces; empty: nothing
        authority = trustme.CA()
        self.ca_file = directory / "renewal-info-ca.pem"
        authority.cert_pem.write_to_path(self.ca_file)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        outer, behind = self, ssl.create_default_context(cafile=str(pebble.ca_file))

        class Handler(http.server.BaseHTTPRequestHandler):
            timeout = 10

            def do_GET(self) -> None:
                if self.path.startswith(_PATH) and outer.window is not None:
                    outer.asked.append(self.path.removeprefix(f"{_PATH}/"))
                    self._answer(outer.window)
                else:
                    self._pass_on(b"")

            def do_HEAD(self) -> None:
                self._pass_on(b"")

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                replaced = _payload(body).get("replaces", "") if self.path == outer._orders else None
                if replaced and outer.refusal is not None:
                    self._answer(outer.refusal)
                elif self._pass_on(body) != HTTPStatus.CREATED:
                    return  # where the nonce was old it comes again
                if replaced is not None:
                    outer.replaced.append(replaced)

            def _pass_on(self, body: bytes) -> int:
                """Returns the status.  Under the name that the client called: it is part of what a client signs."""
                connection = http.client.HTTPSConnection(str(urlsplit(pebble.url).netloc), timeout=30, context=behind)
                connection.request(self.command, self.path, body or None, dict(self.headers.items()))
                answer = connection.getresponse()
                headers = {name: value for name, value in answer.getheaders() if name not in _ITS_OWN}
                content = answer.read()
                connection.close()
                if self.path == urlsplit(pebble.url).path:
                    content = outer._directory(content)
                self._answer(Answer(content, headers, answer.status))
                return answer.status

            def _answer(self, answer: Answer) -> None:
                self.send_response(answer.status)
                for name, value in {"Content-Type": "application/json", **answer.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.body)

            def log_message(self, format: str, *arguments: object) -> None:
                return

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._server.daemon_threads = True
        self._base, self._orders = f"https://127.0.0.1:{self._server.server_address[1]}", ""
        self.url = self._base + urlsplit(pebble.url).path
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _directory(self, content: bytes) -> bytes:
        told = json.loads(content)
        self._orders = urlsplit(told["newOrder"]).path
        if self.window is not None:
            told["renewalInfo"] = self._base + _PATH
        return json.dumps(told).encode()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _payload(jws: bytes) -> Any:
    text = json.loads(jws)["payload"]
    return json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
