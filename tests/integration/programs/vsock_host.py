"""Run in a virtual machine whose kernel has vhost_vsock: a host service that listens on AF_VSOCK, and who comes to it.

The argument is the program p11bench.  Writes a line of JSON for each: "strangers" (what became of connections of the machine
itself), "guest" (device, label, what p11bench said in it) for guests of /dev/vhost-vsock with the CIDs of both modules and with a
stranger's, "taken" (what became of a second guest with the same CID), "refused" (the CIDs that the service's log says it refused).
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

from support.certificates import new_key
from support.guest import library
from support.host import SETTINGS, Host
from support.host_process import wait_for
from support.vhost_kernel import KernelFrontEnd, KernelGuest

PORT = 9111
KEYS = {"web-1": "web", "db-2": "db"}  #: modules, and the label of the key of each
STRANGER = 77777  #: a CID of no module
WITHIN = 60  #: seconds, of an emulated processor


def say(what: str, told: object) -> None:
    os.write(1, f"{what} {json.dumps(told)}\n".encode())


def connection(cid: int, source: int = socket.VMADDR_CID_ANY) -> str:
    """Returns what becomes of a connection to the service: "answered", "closed" or the error."""
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as sock:
        sock.settimeout(WITHIN)
        try:
            if source != socket.VMADDR_CID_ANY:
                sock.bind((source, socket.VMADDR_PORT_ANY))
            sock.connect((cid, PORT))
            sock.sendall(bytes(1))  # p11-kit's version: a module answers with its own
            return "answered" if sock.recv(1) else "closed"
        except (ConnectionResetError, BrokenPipeError):
            return "closed"
        except OSError as error:
            return os.strerror(error.errno or 0)


def signs(p11bench: str, cid: int, label: str) -> str:
    """Returns what p11bench says in a guest with `cid`."""
    ours, path = library("ours"), Path(f"/run/{cid}-{label}.sock")
    command = [p11bench, "--module", str(ours.path), "--label", label, "--mech", "ecdsa", "--seconds", "1", "--verify"]
    with KernelGuest(cid, path):
        environment = os.environ | {ours.variable: f"unix:path={path}"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WITHIN, check=False)
    return done.stdout + done.stderr


def second(cid: int) -> str:
    """Returns what becomes of a guest with a CID that another one has."""
    first = KernelFrontEnd(cid)
    try:
        KernelFrontEnd(cid).close()
    except OSError as error:
        return os.strerror(error.errno or 0)
    finally:
        first.close()
    return "both are there"


def main(p11bench: str) -> None:
    host = Host(SETTINGS + "vsock = true\n")
    host.process.patience = 10
    host.start()
    cids = []
    for name, label in KEYS.items():
        host.create(name).push(label, new_key("p256"))
        cids.append(host.process.get(name).device.guest_cid)
    say("strangers", {"1": connection(1), "2": connection(2), "as a guest": [connection(1, source=cid) for cid in cids]})
    wait_for(lambda: "CID 1 is no module's guest" in host.process.log.read_text(), WITHIN, "the stranger in the log")
    for number, cid in enumerate([*cids, STRANGER]):
        for label in KEYS.values():
            say("guest", [number, label, signs(p11bench, cid, label)])
    say("taken", second(cids[0]))
    found = re.findall(r"CID (\d+) is no module's guest", host.process.log.read_text())
    say("refused", sorted(set(map(int, found))))
    host.clean()


main(sys.argv[1])
