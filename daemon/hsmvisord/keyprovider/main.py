"""hsmvisord-keyprovider: has each module's storage key derived from the host's master key, wherever that lives (sources.py).

A process of its own: the supervisor asks for a key by module id and hands over a pipe that ends in the worker, so the key never
passes through the supervisor.  It ends when its socket does.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
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
from hsmvisor_rpc.internal.phases import MAX_DESCRIPTORS, PROVIDER_MAY_BE_ASKED, by_type
from hsmvisor_rpc.sealed.canonical import MalformedRecord, Record, record_type

from hsmvisord import memory
from hsmvisord.confined import process, sandbox
from hsmvisord.keyprovider import tpm
from hsmvisord.keyprovider.keyfile import SourceError
from hsmvisord.keyprovider.sources import KINDS, FileSource, KeySource

_INFO = {m.STORAGE: b"hsmvisor storage key\0", m.TPM: b"hsmvisor TPM state\0"}


class KeyProvider:
    def __init__(self, control: socket.socket, kind: str, source: KeySource, measures: list[dict[str, Any]]) -> None:
        self._control, self._kind, self._source, self._measures = control, kind, source, measures
        self._reader = FrameReader()
        self._descriptors: list[int] = []
        self._asked = by_type(PROVIDER_MAY_BE_ASKED)

    def run(self) -> None:
        while True:
            data, descriptors = receive(self._control, MAX_DESCRIPTORS)
            self._descriptors += descriptors
            if not data:
                return
            for frame in self._reader.feed(data):
                reply = self._serve(frame)
                form = Kind.ERROR if isinstance(reply, m.Error) else Kind.REPLY
                self._control.sendall(encode_frame(Frame(frame.id, form, reply.encode())))
            memory.follow()

    def _serve(self, frame: Frame) -> Record:
        kind = self._asked.get(record_type(frame.payload)) if frame.kind is Kind.REQUEST else None
        if kind is None:
            raise MalformedRecord("the key provider takes DeriveKey and ProviderStatus")
        message = kind.decode(frame.payload)
        if isinstance(message, m.DeriveKey):
            return self._derive(message)
        return m.Report(json.dumps({"kind": self._kind, "fingerprint": self._fingerprint(), "measures": self._measures}))

    def _derive(self, message: m.DeriveKey) -> Record:
        if not self._descriptors:
            raise MalformedRecord("DeriveKey comes with the write end of a pipe")
        pipe = self._descriptors.pop(0)
        try:
            if message.purpose not in m.KEY_PURPOSES:
                raise MalformedRecord(f"a key for {message.purpose[:20]!r}")
            key = self._source.derive(_INFO[message.purpose] + message.module_id)
            os.write(pipe, key)  # 32 bytes: fewer than PIPE_BUF, so one write
        except (OSError, SourceError) as error:
            return m.Error(m.REASON_INTERNAL, f"no storage key: {error}")
        finally:
            os.close(pipe)
        return m.Done()

    def _fingerprint(self) -> str:
        return hashlib.sha256(self._source.derive(b"hsmvisor master key fingerprint\0")).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="hsmvisord-keyprovider", description="Derives modules' storage keys; started by hsmvisor-host."
    )
    parser.add_argument("--control-fd", type=int, required=True, help="descriptor of the socket to hsmvisor-host")
    parser.add_argument("--kind", choices=KINDS, default="file", help="where the master key lives")
    parser.add_argument("--path", type=Path, required=True, help="the master key's file; made when it is missing")
    parser.add_argument("--device", default=tpm.DEVICE, help="the TPM: a device, or tcp:HOST:PORT (default: %(default)s)")
    parser.add_argument("--plain", type=Path, help="of a TPM: a file whose master key is sealed, where nothing is sealed yet")
    parser.add_argument("--uid", type=int, default=0, help="user that it becomes once it has the master key; 0 = it stays")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prctl(PR_SET_DUMPABLE, 0)  # before it reads the master key
    process.set_title("hsmvisord: key provider")
    sandbox.prepare()
    with contextlib.suppress(OSError):  # said below
        memory.keep()
    try:
        source = _source(arguments)
    except SourceError as error:
        _tell(str(error))
        sys.exit(1)
    measures = sandbox.enter(arguments.uid, threads=0)
    KeyProvider(socket.socket(fileno=arguments.control_fd), arguments.kind, source, measures).run()


def _source(arguments: argparse.Namespace) -> KeySource:
    """Raises SourceError."""
    if arguments.kind == "file":
        return FileSource(arguments.path)
    plain = arguments.plain or arguments.path.with_name("master.key")
    return tpm.TpmSource(arguments.path, arguments.device, plain, _tell)


def _tell(text: str) -> None:
    print(f"hsmvisord-keyprovider: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
