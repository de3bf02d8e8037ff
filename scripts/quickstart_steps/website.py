"""A guest that serves TLS: nginx whose private key is in the guest's module, and hsmvisor-guest, which keeps the certificate."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from processes import Processes, free_port, listens, system_file, wait_for
from steps import ROOT, run, say

SHIM = ROOT / "pkcs11_shim/build/libhsmvisor-pkcs11.so"
GUEST = ROOT / "pkcs11_shim/build/hsmvisor-guest"


def guest_environment(directory: Path, address: str, library: Path) -> dict[str, str]:
    """What a guest's programs get: the module's address, and OpenSSL's engine with the library."""
    name = "ours" if library == SHIM else "stock"
    config = directory / f"openssl-{name}.cnf"
    config.write_text(
        "openssl_conf = init\n[init]\nengines = engines\n[engines]\npkcs11 = pkcs11_section\n"
        "[pkcs11_section]\nengine_id = pkcs11\n"
        f"dynamic_path = {system_file('*/engines-3/pkcs11.so', 'libengine-pkcs11-openssl')}\n"
        f"MODULE_PATH = {library}\ninit = 1\n"
    )
    return {"HSMVISOR_PKCS11_ADDRESS": address, "P11_KIT_SERVER_ADDRESS": address, "OPENSSL_CONF": str(config)}


def curl(guest: str, domain: str, port: int, ca: Path) -> tuple[str, ...]:
    """A client's command line: the guest's name stands for a port of this machine."""
    way = ("--cacert", str(ca), "--connect-to", f"::localhost:{port}")
    return ("curl", "--silent", "--show-error", *way, f"https://{guest}.{domain}/")


class Website:
    """`guest`: the module's name; `directory`: its files, one that the tour's processes can be told from."""

    def __init__(self, processes: Processes, directory: Path, guest: str, address: str, workers: int = 2) -> None:
        self.directory, self.guest, self.port = directory, guest, 0
        self._processes, self._address, self._workers = processes, address, workers
        directory.mkdir(exist_ok=True)
        self.logs = [directory / "nginx.log", directory / "nginx-error.log"]
        self.guest_log = directory / "guest.log"

    def environment(self, library: Path = SHIM) -> dict[str, str]:
        return guest_environment(self.directory, self._address, library)

    def curl(self, ca: Path, domain: str) -> tuple[str, ...]:
        """A client's command line."""
        return curl(self.guest, domain, self.port, ca)

    def serve(self, show: bool = True) -> None:
        """The certificate's file once, then nginx, then whoever keeps the file and has nginx read it again."""
        certificate = self.directory / "served.pem"
        sync = (GUEST, "sync", "--label", "tls", "--chain", "--out", certificate)
        run(*sync, "--once", do=f"see {self.guest_log}", more=self.environment(), show=show, who=self.guest)
        reload = f"kill -HUP {self._nginx(certificate).pid}"
        if show:
            say(f"{self.guest}$ hsmvisor-guest sync --label tls --chain --out {certificate} --reload '{reload}'   # goes on")
        log = str(self.guest_log.relative_to(self._processes.place))
        self._processes.start(*sync, "--reload", reload, log=log, more=self.environment())

    def _nginx(self, certificate: Path) -> subprocess.Popen[bytes]:
        self.port = free_port()
        binary = shutil.which("nginx") or "/usr/sbin/nginx"
        user = "user www-data;" if os.geteuid() == 0 else ""
        config, here = self.directory / "nginx.conf", self.directory
        config.write_text(
            f"daemon off; {user} worker_processes {self._workers}; pid {here}/nginx.pid; error_log {here}/nginx-error.log;\n"
            "env HSMVISOR_PKCS11_ADDRESS; env OPENSSL_CONF;\nevents { worker_connections 512; }\n"
            f"http {{ access_log off; client_body_temp_path {here}/t1; proxy_temp_path {here}/t2;\n"
            f"fastcgi_temp_path {here}/t3;\n"
            f"uwsgi_temp_path {here}/t4; scgi_temp_path {here}/t5;\n"
            f"server {{ listen 127.0.0.1:{self.port} ssl; ssl_session_cache off; ssl_session_tickets off;\n"
            f"ssl_certificate {certificate};\n"
            f'ssl_certificate_key "engine:pkcs11:pkcs11:token={self.guest};object=tls;type=private";\n'
            f'location / {{ return 200 "signed by the module of {self.guest}\\n"; }} }} }}\n'
        )
        log = str(self.logs[0].relative_to(self._processes.place))
        process = self._processes.start(binary, "-c", config, "-p", here, log=log, more=self.environment())
        wait_for(lambda: listens(self.port), process, self.logs, f"nginx of {self.guest}")
        return process
