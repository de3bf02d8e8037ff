"""nginx with its private keys in a module: 4 forked workers, certificates in files."""

from __future__ import annotations

import os
import signal
import socket
import ssl
from dataclasses import dataclass, field
from pathlib import Path

from support.guest import Guest, free_port, listens, stop, wait_for

_CONFIG = """\
daemon off; worker_processes {workers}; pid {directory}/nginx.pid; error_log stderr notice; {user}
env {variable}; env OPENSSL_CONF;
events {{ worker_connections 256; }}
http {{
  access_log off;
  client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy; fastcgi_temp_path {directory}/fastcgi;
  uwsgi_temp_path {directory}/uwsgi; scgi_temp_path {directory}/scgi;
  server {{
    listen 127.0.0.1:{port} ssl; server_name localhost;
    ssl_protocols TLSv1.2 TLSv1.3; ssl_session_cache off; ssl_session_tickets off;
    {certificates}
    location / {{ return 200 "$pid\\n"; }}
  }}
}}
"""


@dataclass
class Nginx:
    """`certificates`: chain files with the PKCS#11 URIs of their keys."""

    guest: Guest
    certificates: list[tuple[Path, str]]
    workers: int = 4
    port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        directory = self.guest.directory
        pairs = "\n    ".join(
            f'ssl_certificate {chain}; ssl_certificate_key "engine:pkcs11:{uri}";' for chain, uri in self.certificates
        )
        config = _CONFIG.format(
            workers=self.workers,
            directory=directory,
            port=self.port,
            variable=self.guest.library.variable,
            certificates=pairs,
            user="user root;" if os.geteuid() == 0 else "",
        )
        self.log = directory / "nginx.log"
        self._process = self.guest.start(
            "/usr/sbin/nginx",
            "-p",
            directory,
            "-c",
            self.guest.write("nginx.conf", config),
            output=self.log,
            more=self.guest.with_engine,
        )
        wait_for(lambda: self._process.poll() is not None or listens(self.port), "nginx")
        assert self._process.poll() is None, self.log.read_text()

    def reload(self) -> None:
        """New workers read key and certificate anew; old ones end when their connections have."""
        self._process.send_signal(signal.SIGHUP)

    def stop(self) -> None:
        stop(self._process)


def handshake(port: int, context: ssl.SSLContext, name: str = "localhost") -> tuple[bytes, str, int]:
    """One TLS handshake and one request; returns the leaf certificate (DER), the protocol version, the worker's pid."""
    with socket.create_connection(("127.0.0.1", port), 10) as sock, context.wrap_socket(sock, server_hostname=name) as tls:
        leaf, version = tls.getpeercert(True) or b"", tls.version() or ""
        tls.sendall(f"GET / HTTP/1.0\r\nHost: {name}\r\n\r\n".encode())
        answer = b""
        while part := tls.recv(4096):
            answer += part
    return leaf, version, int(answer.rpartition(b"\r\n\r\n")[2])


def client_context(root_pem: bytes, version: str = "", ciphers: str = "") -> ssl.SSLContext:
    """A client that believes one root; `version` (TLSv1.2, TLSv1.3) and TLS 1.2 `ciphers` narrow what it offers."""
    context = ssl.create_default_context(cadata=root_pem.decode())
    if version:
        context.minimum_version = context.maximum_version = ssl.TLSVersion[version.replace(".", "_")]
    if ciphers:
        context.set_ciphers(ciphers)
    return context
