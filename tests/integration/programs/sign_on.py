"""Run in a guest: signs on and on with one key handle and writes a JSON line for each signature, until its input ends.

Arguments: library, label, "ec" or "rsa", threads, pause in seconds.  A line: [began, ended, message, signature]
or [began, ended, message, "", error], bytes in hexadecimal, with CLOCK_MONOTONIC in seconds.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
import threading
import time

import pkcs11
from pkcs11 import Mechanism, ObjectClass

ended = threading.Event()
lock = threading.Lock()


def sign_on(token: pkcs11.Token, label: str, kind: str, number: int, pause: float) -> None:
    session = token.open()
    key = session.get_key(ObjectClass.PRIVATE_KEY, label=label)
    assert isinstance(key, pkcs11.PrivateKey)
    for count in itertools.count():
        if ended.is_set():
            return
        message = b"%d %d %d" % (os.getpid(), number, count)
        data, mechanism = (
            (hashlib.sha256(message).digest(), Mechanism.ECDSA) if kind == "ec" else (message, Mechanism.SHA256_RSA_PKCS)
        )
        began = time.monotonic()
        try:
            signature, more = key.sign(data, mechanism=mechanism).hex(), []
        except Exception as error:
            signature, more = "", [f"{type(error).__name__} {error}"]
            time.sleep(0.05)
        line = json.dumps([began, time.monotonic(), message.hex(), signature, *more])
        with lock:
            print(line, flush=bool(more))
        time.sleep(pause)


def main(path: str, label: str, kind: str, threads: int, pause: float) -> None:
    token = next(iter(pkcs11.lib(path).get_tokens()))  # of slot 0
    running = [threading.Thread(target=sign_on, args=(token, label, kind, n, pause)) for n in range(threads)]
    for thread in running:
        thread.start()
    sys.stdin.read()
    ended.set()
    for thread in running:
        thread.join()
    sys.stdout.flush()


main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), float(sys.argv[5]))
