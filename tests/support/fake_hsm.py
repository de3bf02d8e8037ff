"""A module's helper without an HSM: what its library and token are like stands in a file, and each start is noted beside it.

The file is named by HSM in --environment; its words: `absent` (no token), `ends` (the process ends with an error), `mute` (no
answer), `dies` (soon after it has begun to serve), `stuck` (a purge fails).  The PIN is 1234.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import threading
import time
from pathlib import Path

from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.internal.frames import Frame, FrameReader, Kind, encode_frame
from hsmvisor_rpc.sealed.canonical import Record, record_type


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--library", "--token", "--uid"):
        parser.add_argument(name)
    parser.add_argument("--control-fd", type=int)
    parser.add_argument("--module-id")
    parser.add_argument("--pin-file", type=Path)
    parser.add_argument("--environment", action="append", default=[])
    parser.add_argument("--purge", action="store_true")
    arguments = parser.parse_args()
    board = Path(dict(e.split("=", 1) for e in arguments.environment)["HSM"])
    words = board.read_text().split()
    failure = "there is no token with the label 'prod'" if "absent" in words else ""
    if arguments.pin_file.read_text().strip() != "1234":
        failure = "the PIN is not taken: PinIncorrect"
    note(board, f"{'purge' if arguments.purge else 'login'} {arguments.module_id}{' WRONG' if 'PIN' in failure else ''}")
    if failure:
        print(f"hsmvisord: hsm of module {arguments.module_id}: {failure}", file=sys.stderr, flush=True)
    if arguments.purge:
        sys.exit(bool(failure) or "stuck" in words)
    if "ends" in words:
        print("hsmvisord: the library has no mouth", file=sys.stderr, flush=True)
        sys.exit(1)
    serve(socket.socket(fileno=arguments.control_fd), board, words, failure)


def note(board: Path, text: str) -> None:
    with board.with_suffix(".log").open("a") as log:
        log.write(f"{text}\n")


def serve(sock: socket.socket, board: Path, words: list[str], failure: str) -> None:
    reader = FrameReader()
    while data := sock.recv(65536):
        for frame in reader.feed(data):
            if "mute" in words:
                continue
            reply: Record = m.Report('{"token": "Maker Model 0001", "measures": []}')
            if record_type(frame.payload) == m.ServeWorker.TYPE:
                reply = m.Done()
                note(board, "serve")
            if failure:
                reply = m.Error(m.REASON_HSM, failure)
            kind = Kind.ERROR if failure else Kind.REPLY
            sock.sendall(encode_frame(Frame(frame.id, kind, reply.encode())))
            if "dies" in words and isinstance(reply, m.Done):
                threading.Thread(target=lambda: (time.sleep(0.1), os._exit(3))).start()


if __name__ == "__main__":
    main()
