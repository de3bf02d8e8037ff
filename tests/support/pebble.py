"""Debian's pebble, an ACME server for tests, with a name server that says what a test tells it."""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trustme
from support.guest import free_port


@dataclass
class Pebble:
    """`http_port`: where it looks for answers to http-01; `reuse`: of 100 times, how often it asks nobody again for a name."""

    directory: Path
    http_port: int
    seconds: int = 3600  #: that its certificates hold
    reuse: int = 50
    _running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self) -> Pebble:
        self._port, self._management, dns, self._challenges = (free_port() for _ in range(4))
        authority = trustme.CA()
        own = authority.issue_cert("localhost", "127.0.0.1")
        authority.cert_pem.write_to_path(self.ca_file)
        own.private_key_pem.write_to_path(self.directory / "key.pem")
        own.cert_chain_pems[0].write_to_path(self.directory / "cert.pem")
        told = {
            "listenAddress": f"127.0.0.1:{self._port}",
            "managementListenAddress": f"127.0.0.1:{self._management}",
            "certificate": str(self.directory / "cert.pem"),
            "privateKey": str(self.directory / "key.pem"),
            "httpPort": self.http_port,
            "tlsPort": free_port(),
            "ocspResponderURL": "",
            "externalAccountBindingRequired": False,
            "certificateValidityPeriod": self.seconds,
        }
        (self.directory / "pebble.json").write_text(json.dumps({"pebble": told}))
        off = ["-http01", "", "-https01", "", "-tlsalpn01", ""]
        self._run(
            "pebble-challtestsrv",
            "-dns01",
            f"127.0.0.1:{dns}",
            "-management",
            f"127.0.0.1:{self._challenges}",
            *off,
            "-defaultIPv6",
            "",
        )
        self._run("pebble", "-config", str(self.directory / "pebble.json"), "-dnsserver", f"127.0.0.1:{dns}")
        for port in (self._port, self._management, self._challenges):
            _await(port)
        return self

    def _run(self, *command: str) -> None:
        settings = {"PEBBLE_VA_NOSLEEP": "1", "PEBBLE_WFE_NONCEREJECT": "5", "PEBBLE_AUTHZREUSE": str(self.reuse)}
        log = (self.directory / f"{command[0]}.log").open("wb")
        with log:
            self._running.append(subprocess.Popen(command, env=os.environ | settings, stdout=log, stderr=log))

    @property
    def ca_file(self) -> Path:
        return self.directory / "pebble-ca.pem"

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self._port}/dir"

    def root(self) -> bytes:
        """The root of what it issues, PEM."""
        return self._get(f"https://127.0.0.1:{self._management}/roots/0")

    def status(self, serial: int) -> str:
        answer: dict[str, Any] = json.loads(self._get(f"https://127.0.0.1:{self._management}/cert-status-by-serial/{serial:x}"))
        return str(answer["Status"])

    def _get(self, url: str) -> bytes:
        context = ssl.create_default_context(cafile=str(self.ca_file))
        with urllib.request.urlopen(url, context=context, timeout=10) as answer:
            return bytes(answer.read())

    @property
    def dns_hook(self) -> list[str]:
        """A hook for dns-01, as hsmvisor.manager.ca.acme.challenges says."""
        path = self.directory / "dns-hook"
        path.write_text(
            "#!/bin/sh\n"
            "set -e\n"
            f'post() {{ curl -sSf -d "$2" http://127.0.0.1:{self._challenges}/$1; }}\n'
            'case "$1" in\n'
            """present) post set-txt "{\\"host\\":\\"$4.\\",\\"value\\":\\"$5\\"}" ;;\n"""
            """remove) post clear-txt "{\\"host\\":\\"$4.\\"}" ;;\n"""
            "esac\n"
        )
        path.chmod(0o755)
        return [str(path)]

    def close(self) -> None:
        for process in self._running:
            process.terminate()
        for process in self._running:
            process.wait(10)
        self._running.clear()


def _await(port: int, seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert time.monotonic() < end, f"nothing listens on port {port}"
            time.sleep(0.02)
