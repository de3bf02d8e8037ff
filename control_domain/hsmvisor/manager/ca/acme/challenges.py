"""How control of a name is shown: http-01 by an answer on port 80, dns-01 by a TXT record (RFC 8555, 8.3 and 8.4).

http-01 is answered by a small server of the manager's own, or by a hook; dns-01 by a hook.  A hook is a program, run as

    PROGRAM present|remove http-01 NAME TOKEN CONTENT        serve CONTENT at http://NAME/.well-known/acme-challenge/TOKEN
    PROGRAM present|remove dns-01 NAME RECORD CONTENT        RECORD (_acme-challenge.NAME) has a TXT of CONTENT

`present` ends once it can be seen; exit status 0 says that it can.
"""

from __future__ import annotations

import http.server
import os
import subprocess
import threading
from collections.abc import Sequence
from http import HTTPStatus
from typing import Protocol

HTTP, DNS = "http-01", "dns-01"
_PATH = "/.well-known/acme-challenge/"


class ChallengeFailed(Exception):
    """It cannot be shown; the message says why."""


class Responder(Protocol):
    @property
    def kind(self) -> str: ...  #: HTTP or DNS

    def present(self, name: str, label: str, content: str) -> None:
        """`label`: the token, or the record's name.  Raises ChallengeFailed."""
        ...

    def remove(self, name: str, label: str, content: str) -> None: ...


class HttpServer:
    """Answers http-01 itself.  `address`: host and port; port 80 of the names has to come there."""

    kind = HTTP

    def __init__(self, host: str, port: int) -> None:
        """Raises ChallengeFailed."""
        self._contents: dict[str, bytes] = {}
        contents = self._contents

        class Handler(http.server.BaseHTTPRequestHandler):
            timeout = 10

            def do_GET(self) -> None:
                found = contents.get(self.path.removeprefix(_PATH)) if self.path.startswith(_PATH) else None
                self.send_response(HTTPStatus.OK if found else HTTPStatus.NOT_FOUND)
                self.send_header("Content-Type", "application/octet-stream")
                self.send_header("Content-Length", str(len(found or b"")))
                self.end_headers()
                self.wfile.write(found or b"")

            def log_message(self, format: str, *arguments: object) -> None:
                return

        try:
            self._server = http.server.ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            raise ChallengeFailed(f"http-01 cannot be answered on {host}:{port}: {error.strerror}") from None
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, name="http-01", daemon=True).start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def present(self, name: str, label: str, content: str) -> None:
        self._contents[label] = content.encode()

    def remove(self, name: str, label: str, content: str) -> None:
        self._contents.pop(label, None)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Hook:
    def __init__(self, kind: str, command: Sequence[str], seconds: float = 300) -> None:
        """`seconds`: how long the program may take."""
        self.kind, self._command, self._seconds = kind, list(command), seconds

    def present(self, name: str, label: str, content: str) -> None:
        self._run("present", name, label, content)

    def remove(self, name: str, label: str, content: str) -> None:
        self._run("remove", name, label, content)

    def _run(self, verb: str, name: str, label: str, content: str) -> None:
        command = [*self._command, verb, self.kind, name, label, content]
        environment = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LANG": "C.UTF-8"}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, timeout=self._seconds, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            raise ChallengeFailed(f"{self._command[0]} took longer than {self._seconds:.0f} seconds") from None
        except OSError as error:
            raise ChallengeFailed(f"{self._command[0]}: {error.strerror}") from None
        if done.returncode:
            lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["it did not say why"]
            raise ChallengeFailed(f"{self._command[0]} ended with {done.returncode}: {lines[-1][:300]}")
