"""Load while keys are replaced: TLS handshakes with nginx, and signatures by python-pkcs11."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections import Counter
from pathlib import Path

import pkcs11
from cryptography import x509
from pkcs11 import Attribute, Mechanism, ObjectClass


class Handshakes:
    """Threads that open one TLS connection after the other and check each certificate: who issued it, and whose it is.

    `pause`: seconds between two of a thread.
    """

    def __init__(self, port: int, ca: Path, name: str, threads: int = 4, pause: float = 0) -> None:
        self._port, self._ca, self.name, self._pause = port, ca, name, pause
        self._end = threading.Event()
        self._lock = threading.Lock()
        self.certificates: Counter[int] = Counter()  #: handshakes by the certificate's serial number
        self.failures: list[str] = []
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]

    @property
    def done(self) -> int:
        return sum(self.certificates.values())

    def _run(self) -> None:
        context = ssl.create_default_context(cafile=str(self._ca))
        while not self._end.is_set():
            try:
                with (
                    socket.create_connection(("127.0.0.1", self._port), 10) as sock,
                    context.wrap_socket(sock, server_hostname=self.name) as tls,
                ):
                    der = tls.getpeercert(binary_form=True)
                assert der is not None
                with self._lock:
                    self.certificates[x509.load_der_x509_certificate(der).serial_number] += 1
            except OSError as error:
                if not self._end.is_set():
                    with self._lock:
                        self.failures.append(str(error))
            if self._pause:
                time.sleep(self._pause)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(15)


def sign_with_python(library: Path, label: str, count: int) -> int:
    """Signs and verifies `count` times with python-pkcs11; returns how many were good."""
    token = next(iter(pkcs11.lib(str(library)).get_tokens()))
    good = 0
    with token.open() as session:
        private = session.get_key(label=label, object_class=ObjectClass.PRIVATE_KEY)
        public = session.get_key(label=label, object_class=ObjectClass.PUBLIC_KEY)
        digest_info = bytes.fromhex("3031300d060960864801650304020105000420")
        mechanism = Mechanism.RSA_PKCS if private[Attribute.KEY_TYPE] == pkcs11.KeyType.RSA else Mechanism.ECDSA
        for number in range(count):
            data = (digest_info if mechanism is Mechanism.RSA_PKCS else b"") + number.to_bytes(32, "big")
            good += bool(public.verify(data, private.sign(data, mechanism=mechanism), mechanism=mechanism))
    return good


if __name__ == "__main__":  # a process of its own for each library: PKCS#11 libraries keep their state to themselves
    import sys

    print(sign_with_python(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
