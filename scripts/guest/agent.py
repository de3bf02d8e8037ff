"""Carries out what the tests ask of a guest, over a virtio-serial port.  For test machines alone: it does whatever it is told.

A message, either way: length of a header and of a body (u32, big-endian), the header (JSON), the body.  Each request has an
`id`, which its reply repeats, and is carried out by a thread of its own.  A reply's `error` says why it could not be done.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from typing import Any

Reply = tuple[dict[str, Any], bytes]

_started: dict[int, subprocess.Popen[bytes]] = {}


def _process(request: dict[str, Any], **pipes: Any) -> subprocess.Popen[bytes]:
    environment = os.environ | request["environment"]
    return subprocess.Popen(request["command"], env=environment, cwd=request["directory"], start_new_session=True, **pipes)


def run(request: dict[str, Any], body: bytes) -> Reply:
    """Returns output and errors; after `timeout` seconds the whole session of the command is killed, and `timed_out` says so."""
    pipe = subprocess.PIPE
    process = _process(request, stdin=pipe, stdout=pipe, stderr=pipe)
    timed_out = False
    try:
        output, errors = process.communicate(body, request["timeout"])
    except subprocess.TimeoutExpired:
        timed_out = True
        os.killpg(process.pid, signal.SIGKILL)
        try:
            output, errors = process.communicate(timeout=2)
        except subprocess.TimeoutExpired as late:  # somebody who left the session holds the pipes
            output, errors = late.stdout or b"", late.stderr or b""
    return {"code": process.returncode, "timed_out": timed_out, "split": len(output)}, output + errors


def start(request: dict[str, Any], body: bytes) -> Reply:
    with open(request["output"], "wb") as output:
        process = _process(request, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    _started[process.pid] = process
    return {"pid": process.pid}, b""


def wait(request: dict[str, Any], body: bytes) -> Reply:
    """`code` is None if it runs on after `timeout` seconds."""
    try:
        return {"code": _started[request["pid"]].wait(request["timeout"])}, b""
    except subprocess.TimeoutExpired:
        return {"code": None}, b""


def kill(request: dict[str, Any], body: bytes) -> Reply:
    """Sends `signal` to the process and to those in its session's first group."""
    process = _started[request["pid"]]
    if process.poll() is None:
        os.killpg(process.pid, request["signal"])
    return {}, b""


def write(request: dict[str, Any], body: bytes) -> Reply:
    """A file is written in pieces, from offset 0 on; the mode is set with the first."""
    with open(request["path"], "r+b" if request["offset"] else "wb") as file:
        if not request["offset"]:
            os.fchmod(file.fileno(), request["mode"])
        file.seek(request["offset"])
        file.write(body)
    return {}, b""


def read(request: dict[str, Any], body: bytes) -> Reply:
    with open(request["path"], "rb") as file:
        file.seek(request["offset"])
        return {}, file.read(request["size"])


ACTIONS = {action.__name__: action for action in (run, start, wait, kill, write, read)}


class Port:
    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDWR)  # the driver lets a port be opened once
        self._lock = threading.Lock()

    def _read(self, size: int) -> bytes:
        parts = []
        while size:
            if not (part := os.read(self._descriptor, min(size, 1 << 16))):
                if parts:
                    raise EOFError
                time.sleep(0.05)  # nobody is at the other end
                continue
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def receive(self) -> tuple[dict[str, Any], bytes]:
        header, body = struct.unpack("!II", self._read(8))
        return json.loads(self._read(header)), self._read(body)

    def send(self, header: dict[str, Any], body: bytes) -> None:
        packed = json.dumps(header).encode()
        data = memoryview(struct.pack("!II", len(packed), len(body)) + packed + body)
        with self._lock:
            while data:
                data = data[os.write(self._descriptor, data) :]


def answer(port: Port, request: dict[str, Any], body: bytes) -> None:
    try:
        header, body = ACTIONS[request["do"]](request, body)
    except Exception as error:
        header, body = {"error": f"{type(error).__name__}: {error}"}, b""
    port.send(header | {"id": request["id"]}, body)


def main() -> None:
    port = Port(sys.argv[1])
    while True:
        threading.Thread(target=answer, args=(port, *port.receive()), daemon=True).start()


main()
