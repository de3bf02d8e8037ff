"""Those who are told of events: an HTTPS server that takes webhooks, and a mail server."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.server
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trustme
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult, Envelope, LoginPassword

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()


@dataclass
class Received:
    path: str
    headers: dict[str, str]
    body: bytes
    at: float

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def told(self) -> Any:
        return json.loads(self.body)

    def is_signed(self, secret: str = SECRET) -> bool:
        """As the specification tells receivers to do it, from its text alone."""
        key = base64.b64decode(secret.split("_", 1)[1])
        content = b".".join([self.headers["webhook-id"].encode(), self.headers["webhook-timestamp"].encode(), self.body])
        wanted = base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode()
        given = [part.split(",", 1) for part in self.headers["webhook-signature"].split(" ")]
        is_fresh = abs(int(self.headers["webhook-timestamp"]) - time.time()) < 300
        return is_fresh and any(version == "v1" and hmac.compare_digest(value, wanted) for version, value in given)


class HookServer:
    """`answer` tells the status for each request, and headers."""

    def __init__(self, directory: Path, answer: Callable[[Received], tuple[int, dict[str, str]]] | None = None) -> None:
        self.received: list[Received] = []
        self.answer = answer or (lambda request: (204, {}))
        authority = trustme.CA()
        self.ca_file = directory / "hooks-ca.pem"
        authority.cert_pem.write_to_path(self.ca_file)
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["content-length"]))
                if len(content) < int(self.headers["content-length"]):
                    return  # the sender was stopped
                told = {name.lower(): value for name, value in self.headers.items()}
                request = Received(self.path, told, content, time.time())
                outer.received.append(request)
                status, headers = outer.answer(request)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                return

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 100

            def finish_request(self, request: Any, address: Any) -> None:
                """The handshake is the connection's own thread's."""
                super().finish_request(context.wrap_socket(request, server_side=True), address)

            def handle_error(self, request: Any, address: Any) -> None:
                return

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("localhost", "127.0.0.1").configure_cert(context)
        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"https://127.0.0.1:{self._server.server_port}/hook?for=us"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def ids(self) -> list[int]:
        return [request.told["data"]["id"] for request in self.received]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class SlowServer:
    """Takes connections and sends `drip` again and again, which ends no answer."""

    def __init__(self, first: bytes = b"", drip: bytes = b"") -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.connections = self.ended = 0

        def serve(connection: socket.socket) -> None:
            try:
                connection.sendall(first)
                while True:
                    time.sleep(0.05)
                    connection.sendall(drip)
                    if not drip and connection.recv(65536) == b"":
                        break
            except OSError:
                pass
            self.ended += 1

        def accept() -> None:
            while True:
                try:
                    connection, _ = self._listener.accept()
                except OSError:
                    return
                self.connections += 1
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


class MailServer:
    """`refuse`: what it says to a mail, as "451 later"; empty: it takes it."""

    def __init__(self, directory: Path, tls: str = "starttls", user: str = "", password: str = "") -> None:
        self.mails: list[Envelope] = []
        self.refused: list[Envelope] = []
        self.logins: list[bool] = []
        self.refuse = ""
        self.refused_recipients: set[str] = set()
        authority = trustme.CA()
        self.ca_file = directory / "mail-ca.pem"
        authority.cert_pem.write_to_path(self.ca_file)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("localhost", "127.0.0.1").configure_cert(context)
        outer = self

        class Handler:
            async def handle_RCPT(self, server: Any, session: Any, envelope: Envelope, address: str, options: Any) -> str:
                if address in outer.refused_recipients:
                    return "550 no such user"
                envelope.rcpt_tos.append(address)
                return "250 OK"

            async def handle_DATA(self, server: Any, session: Any, envelope: Envelope) -> str:
                if outer.refuse:
                    outer.refused.append(envelope)
                    return outer.refuse
                outer.mails.append(envelope)
                return "250 OK"

        def authenticate(server: Any, session: Any, envelope: Any, mechanism: str, data: Any) -> AuthResult:
            is_right = isinstance(data, LoginPassword) and (data.login, data.password) == (user.encode(), password.encode())
            outer.logins.append(is_right)
            return AuthResult(success=is_right, handled=False)

        options: dict[str, Any] = {"auth_required": bool(user), "authenticator": authenticate} if user else {}
        if tls == "starttls":
            options |= {"tls_context": context, "require_starttls": True}
        elif tls == "none":
            options |= {"auth_require_tls": False}
        else:
            options |= {"auth_require_tls": False, "ssl_context": context}
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._controller = Controller(Handler(), "127.0.0.1", self.port, **options)
        self._controller.start()

    def close(self) -> None:
        self._controller.stop()
