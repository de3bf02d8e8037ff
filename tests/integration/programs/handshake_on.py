"""Run in a virtual machine: TLS handshakes on and on with a server beside it; a JSON line for each, until its input ends.

Arguments: port, file with the root certificate, threads.  A line: [ended, leaf certificate] or [ended, "", error]; the certificate
is DER in base64, with CLOCK_MONOTONIC in seconds.
"""

from __future__ import annotations

import base64
import json
import socket
import ssl
import sys
import threading
import time

ended = threading.Event()
lock = threading.Lock()


def handshake(port: int, context: ssl.SSLContext) -> bytes:
    with socket.create_connection(("127.0.0.1", port), 20) as sock, context.wrap_socket(sock, server_hostname="localhost") as tls:
        leaf = tls.getpeercert(True) or b""
        tls.sendall(b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
        answer = b""
        while part := tls.recv(4096):
            answer += part
    if b" 200 " not in answer:
        raise ValueError(answer[:100])
    return leaf


def run(port: int, context: ssl.SSLContext) -> None:
    while not ended.is_set():
        try:
            line = [base64.b64encode(handshake(port, context)).decode()]
        except (OSError, ValueError) as error:
            line = ["", f"{type(error).__name__} {error}"]
        with lock:
            print(json.dumps([time.monotonic(), *line]), flush=True)


def main(port: int, root: str, threads: int) -> None:
    context = ssl.create_default_context(cafile=root)
    running = [threading.Thread(target=run, args=(port, context)) for _ in range(threads)]
    for thread in running:
        thread.start()
    sys.stdin.read()
    ended.set()
    for thread in running:
        thread.join()


main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
