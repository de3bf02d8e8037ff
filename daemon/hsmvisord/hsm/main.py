"""The helper of a module whose keys live in a hardware security module of the host: it logs in there, and uses that module's keys
for its worker.

A process of its own, for a maker's library is loaded in it, which opens files and sockets as it likes: the worker, which parses a
guest's bytes, stays as confined as all workers.  It ends when nobody is left: neither the supervisor nor a worker.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from hsmvisor_rpc.confine.capabilities import PR_SET_DUMPABLE, prctl
from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.internal.descriptors import receive
from hsmvisor_rpc.internal.frames import Frame, FrameReader, Kind, encode_frame
from hsmvisor_rpc.internal.phases import HSM_MAY_BE_ASKED, MAX_DESCRIPTORS, by_type, descriptors_of
from hsmvisor_rpc.sealed.canonical import MalformedRecord, Record, record_type

from hsmvisord.ck import CkError
from hsmvisord.confined import process, sandbox
from hsmvisord.hsm.hardware import Hardware, WrongPin
from hsmvisord.hsm.service import Service

MAX_PIN = 256  #: bytes of the PIN's file


class Helper:
    def __init__(self, control: socket.socket, hardware: Hardware | None, failure: str, measures: list[dict[str, Any]]) -> None:
        """`failure`: why there is no hardware."""
        self._control, self._hardware, self._failure, self._measures = control, hardware, failure, measures
        self._service = Service(hardware) if hardware else None
        self._reader = FrameReader()
        self._descriptors: list[int] = []
        self._asked = by_type(HSM_MAY_BE_ASKED)

    def run(self) -> None:
        while True:
            data, descriptors = receive(self._control, MAX_DESCRIPTORS)
            self._descriptors += descriptors
            if not data:
                break
            for frame in self._reader.feed(data):
                reply = self._serve(frame)
                form = Kind.ERROR if isinstance(reply, m.Error) else Kind.REPLY
                self._control.sendall(encode_frame(Frame(frame.id, form, reply.encode())))
        if self._service is not None:
            self._service.wait()

    def _serve(self, frame: Frame) -> Record:
        kind = self._asked.get(record_type(frame.payload)) if frame.kind is Kind.REQUEST else None
        if kind is None:
            raise MalformedRecord("a module's helper takes ServeWorker and HsmStatus")
        message = kind.decode(frame.payload)
        taken, self._descriptors = self._descriptors[: descriptors_of(message)], self._descriptors[descriptors_of(message) :]
        if self._hardware is None or self._service is None:
            for descriptor in taken:
                os.close(descriptor)
            return m.Error(m.REASON_HSM, self._failure)
        if isinstance(message, m.ServeWorker):
            if not taken:
                raise MalformedRecord("ServeWorker comes with a socket")
            self._service.serve(socket.socket(fileno=taken[0]))
            return m.Done()
        return m.Report(json.dumps({"token": self._hardware.token, "measures": self._measures}))


def _pin(path: Path) -> str:
    """Raises CkError, WrongPin."""
    try:
        with path.open("rb") as file:
            told = file.read(MAX_PIN + 1)
        text = told.decode().removesuffix("\n")
    except OSError as error:
        raise WrongPin(f"the PIN's file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise WrongPin(f"the PIN's file {path} is not UTF-8 text") from None
    if not text or len(told) > MAX_PIN:
        raise WrongPin(f"the PIN's file {path} has one line of 1 to {MAX_PIN} bytes")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="hsmvisord-hsm", description="Uses one module's keys in a hardware security module; started by hsmvisor-host."
    )
    parser.add_argument("--control-fd", type=int, help="descriptor of the socket to hsmvisor-host")
    parser.add_argument("--module-id", type=bytes.fromhex, required=True, help="the module's id, in hexadecimal")
    parser.add_argument("--library", type=Path, required=True, help="the hardware's PKCS#11 library")
    parser.add_argument("--token", required=True, help="label of the token in it")
    parser.add_argument("--pin-file", type=Path, required=True, help="a file whose one line is the token's user PIN")
    parser.add_argument("--uid", type=int, default=0, help="user that it becomes once it has read the PIN; 0 = it stays")
    parser.add_argument("--environment", action="append", default=[], metavar="NAME=VALUE", help="for the library")
    parser.add_argument("--purge", action="store_true", help="destroy all keys of the module and end")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prctl(PR_SET_DUMPABLE, 0)  # before it reads the PIN
    process.set_title(f"hsmvisord: hsm of {arguments.module_id.hex()[:8]}")
    sandbox.prepare()
    for setting in arguments.environment:
        name, _, value = setting.partition("=")
        os.environ[name] = value
    hardware, failure = None, ""
    measures: list[dict[str, Any]] = []
    try:
        pin = _pin(arguments.pin_file)
        measures = sandbox.enter_helper(arguments.uid)
        hardware = Hardware(arguments.library, arguments.token, pin, arguments.module_id)
    except (CkError, WrongPin) as error:
        failure = str(error)
        print(f"hsmvisord: hsm of module {arguments.module_id.hex()}: {failure}", file=sys.stderr, flush=True)
    if arguments.purge:
        sys.exit(_purge(hardware))
    Helper(socket.socket(fileno=arguments.control_fd), hardware, failure, measures).run()


def _purge(hardware: Hardware | None) -> int:
    if hardware is None:
        return 1
    try:
        for name in hardware.names():
            hardware.destroy(name)
    except CkError as error:
        print(f"hsmvisord: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    main()
