"""hsmvisor-manager: issuer: makes, opens and seals private keys that modules share, each in a child of its own.

Started by the manager with one end of a socketpair; it ends when that closes.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import socket
import sys
from dataclasses import asdict
from pathlib import Path

from hsmvisor.manager.issuer import calls, files, sandbox, syscalls
from hsmvisor.manager.issuer.calls import Ready, Trouble
from hsmvisor.manager.issuer.escrow import FileWrapper, Wrapper
from hsmvisor.manager.issuer.files import BadFile
from hsmvisor.manager.issuer.sandbox import Needs
from hsmvisor.manager.issuer.server import Server
from hsmvisor.manager.issuer.work import Work
from hsmvisor_rpc.confine.title import set_title
from hsmvisor_rpc.internal.frames import Frame, Kind, encode_frame
from hsmvisor_rpc.sealed.canonical import MalformedRecord

TITLE = "hsmvisor-manager: issuer"


def main() -> None:
    arguments = _parser().parse_args()
    control = socket.socket(fileno=arguments.control_fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    applied = sandbox.prepare()  # before there is a secret
    set_title(TITLE)
    try:
        recipient = files.recipient_key(arguments.recipient_file)
        wrapper, needs = _wrapper(arguments)
    except BadFile as error:
        print(f"{TITLE}: {error}", file=sys.stderr, flush=True)
        control.sendall(encode_frame(Frame(1, Kind.ERROR, Trouble(calls.AWAY, str(error)).encode())))
        sys.exit(1)
    work = Work(recipient, wrapper)
    work.rehearse()
    server = Server(control, work, syscalls.for_children(), token=needs is not None)
    gc.collect()
    gc.freeze()
    applied += sandbox.enter(needs)
    measures = json.dumps([asdict(measure) for measure in applied])
    refused = arguments.escrow_refused
    try:
        server.run(Ready(recipient.public, wrapper.kind if wrapper else "", refused, bool(refused), measures))
    except MalformedRecord as error:
        print(f"{TITLE}: the manager broke the protocol: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=TITLE, description="Makes and seals private keys; started by hsmvisor-manager.")
    parser.add_argument("--control-fd", type=int, required=True, help="descriptor of the socket to the manager")
    parser.add_argument("--recipient-file", type=Path, required=True, help="its own key; made when it is missing")
    parser.add_argument("--escrow", choices=("file", "token"), help="what wraps keys that owners ask to keep")
    parser.add_argument("--escrow-file", type=Path, help="the wrapping key; made when it is missing")
    parser.add_argument("--library", type=Path, help="the token's PKCS #11 library")
    parser.add_argument("--token", default="", help="its label")
    parser.add_argument("--label", default="", help="the wrapping key's label in it; made when it is missing")
    parser.add_argument("--pin-file", type=Path, help="a file whose one line is the token's user PIN")
    parser.add_argument("--writes", type=Path, action="append", default=[], help="a directory that the library writes into")
    parser.add_argument("--network", action="store_true", help="the library reaches its token by a network")
    parser.add_argument("--escrow-refused", default="", metavar="WHY", help="the token did not take the PIN: it is not asked")
    return parser


def _wrapper(arguments: argparse.Namespace) -> tuple[Wrapper | None, Needs | None]:
    """Raises BadFile."""
    if arguments.escrow == "file":
        return FileWrapper(arguments.escrow_file), None
    if arguments.escrow != "token":
        return None, None
    from hsmvisor.manager.issuer.token import TokenWrapper

    wrapper = TokenWrapper(arguments.library, arguments.token, arguments.label, files.pin(arguments.pin_file))
    return wrapper, Needs(tuple(arguments.writes), arguments.network)


if __name__ == "__main__":
    main()
