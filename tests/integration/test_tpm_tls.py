"""OpenSSL in a guest serves TLS with a key and a certificate that its TPM has been given, and with those of a renewal."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from support.certificates import Authority, PrivateKey, chain_pem, new_key
from support.host import Host, wait_for
from support.tpm_vm import HANDLE, INDEX, SECOND, TpmMachine, VmTpm, index_of

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(300)]

PORT = 4433
#: What a guest's administrator has: the certificate from beside the key, and what OpenSSL is told.  The TPM's provider comes second
#: and has no say in hashing: else each hash of a handshake is one of the TPM, which has three places (0x902) and is slow.
QUERY = "?provider=tpm2,tpm2.digest!=yes,tpm2.cipher!=yes"
SERVE = f"""#!/bin/sh
set -e
tpm2_nvread -C $2 $2 | openssl x509 -inform DER -out /run/certificate.pem
exec openssl s_server -provider default -provider tpm2 -propquery '{QUERY}' \\
    -accept {PORT} -www -key handle:$1 -cert /run/certificate.pem -cert_chain /root/chain.pem
"""


@dataclass
class Server:
    tpm: VmTpm
    machine: TpmMachine
    port: int  #: of this machine, which leads there
    authority: Authority
    root: Path

    def deliver(self, key: PrivateKey, handle: int = HANDLE) -> x509.Certificate:
        """Returns its certificate, once the guest can have both."""
        chain = self.authority.chain(key)
        self.tpm.deliver(handle, key, chain)
        self.machine.wait_for(handle, key)
        index, der = index_of(handle), chain[0].public_bytes(Encoding.DER)
        wait_for(lambda: self.machine.guest().nv(index) == der, 20, "the certificate in the TPM")
        return chain[0]

    @contextmanager
    def serving(self, handle: int = HANDLE) -> Iterator[None]:
        process = self.machine.start(["sh", "/root/serve", f"{handle:#x}", f"{index_of(handle):#x}"], output="/root/served")
        wait_for(lambda: b"ACCEPT" in process.output() or process.poll() is not None, 90, "the server")
        try:
            assert process.poll() is None, process.output().decode()
            yield
        finally:
            process.stop()

    def ask(self, *more: str) -> tuple[int, str]:
        """As a client that believes the root alone: returns the exit code of openssl s_client and what it said."""
        words = ["openssl", "s_client", "-connect", f"127.0.0.1:{self.port}", "-CAfile", str(self.root), "-verify_return_error"]
        words += ["-verify_hostname", "localhost", "-servername", "localhost", "-ign_eof", *more]
        asked = b"GET / HTTP/1.0\r\n\r\n"
        done = subprocess.run(words, input=asked, capture_output=True, check=False, timeout=30)
        return done.returncode, (done.stdout + done.stderr).decode(errors="replace")

    def served(self, *more: str) -> x509.Certificate:
        """The certificate with which a client is served; fails unless it is."""
        code, said = self.ask(*more)
        assert code == 0 and "Verify return code: 0 (ok)" in said and "200 ok" in said, said
        return x509.load_pem_x509_certificate(said[said.index("-----BEGIN") :].encode())


@pytest.fixture(scope="module")
def server(shared_host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    tpm, authority = VmTpm(shared_host, "tls", firmware=False), Authority()
    root = tmp_path_factory.mktemp("tls") / "root.pem"
    root.write_bytes(authority.root_pem)
    with TpmMachine(tpm) as machine:
        machine.write("/root/serve", SERVE)
        machine.write("/root/chain.pem", chain_pem((authority.intermediate,)))
        yield Server(tpm, machine, machine.forward(PORT), authority, root)
    tpm.close()


# With TLS 1.2 OpenSSL asks how points on curves are encoded, which tpm2-openssl 1.1 does not say of its keys ("no shared cipher").
@pytest.mark.parametrize(("kind", "versions"), [("p256", ["-tls1_3"]), ("rsa2048", ["-tls1_3", "-tls1_2"])])
def test_a_client_is_served_with_what_was_delivered(server: Server, kind: str, versions: list[str]) -> None:
    certificate = server.deliver(new_key(kind))
    with server.serving():
        for version in versions:
            assert server.served(version) == certificate


@pytest.mark.parametrize("kind", ["p256", "rsa2048"])
def test_a_renewal_is_served_by_who_starts_after_it(server: Server, kind: str) -> None:
    """Who goes on with the certificate of before cannot prove that it is theirs."""
    before = server.deliver(new_key("p256"))
    with server.serving():
        assert server.served() == before
        after = server.deliver(new_key(kind))
        code, said = server.ask()
        assert code != 0 and "200 ok" not in said, said
    with server.serving():
        assert server.served() == after != before


def test_another_key_at_another_handle(server: Server) -> None:
    first, second = server.deliver(new_key("p256")), server.deliver(new_key("p256"), SECOND)
    with server.serving(SECOND):
        assert server.served() == second != first


def test_what_is_withdrawn_serves_nobody(server: Server) -> None:
    server.deliver(new_key("p256"))
    with server.serving():
        server.served()
        server.tpm.withdraw()
        server.machine.wait_for(HANDLE, None)
        assert server.machine.guest().nv(INDEX) is None
        code, said = server.ask()
        assert code != 0 and "200 ok" not in said, said
