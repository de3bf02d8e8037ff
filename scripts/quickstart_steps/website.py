"""A small site: the host service, and nginx whose private key is in the module."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from steps import BIN, ROOT, StepFailed

SHIM = ROOT / "pkcs11_shim/build/libhsmvisor-pkcs11.so"
GUEST = ROOT / "pkcs11_shim/build/hsmvisor-guest"


def system_file(pattern: str, package: str) -> Path:
    found = sorted(Path("/usr/lib").glob(pattern))
    if not found:
        raise StepFailed(f"/usr/lib/{pattern} is missing", f"apt install {package}")
    return found[0]


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[bytes], logs: list[Path], what: str, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not ready():
        if process.poll() is not None or time.monotonic() > end:
            words = "".join(log.read_text(errors="replace")[-1500:] for log in logs if log.exists())
            raise StepFailed(f"{what} did not start:\n{words}", "mend what it says, then run the quickstart again")
        time.sleep(0.02)


def wait_until(holds: Callable[[], bool], what: str, do: str, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise StepFailed(f"waited {seconds:.0f} s in vain until {what}", do)
        time.sleep(0.1)


def answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(str(path)) == 0


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Site:
    """All files are in `place`; `stop` ends every process it started."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.control = place / "run/control.sock"
        self.address = f"unix:path={place}/run/modules/web-1/pkcs11.sock"
        self.port = 0
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str | Path, log: str, more: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        with (self.place / log).open("ab") as file:
            process = subprocess.Popen(
                [str(w) for w in command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=os.environ | (more or {}),
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def host(self) -> None:
        config = self.place / "host.toml"
        config.write_text(
            f'state_directory = "{self.place}/state"\nruntime_directory = "{self.place}/run"\n'
            "[guests]\nsocket_mode = 0o666\n[workers]\nstop_with_host = true\n"
        )
        process = self.start(BIN / "hsmvisor-host", "--config", config, log="host.log")
        wait_for(lambda: answers(self.control), process, [self.place / "host.log"], "hsmvisor-host")

    def guest_environment(self, library: Path) -> dict[str, str]:
        """What a guest's programs get: the module's address, and OpenSSL's engine with the library."""
        name = "ours" if library == SHIM else "stock"
        config = self.place / f"openssl-{name}.cnf"
        config.write_text(
            "openssl_conf = init\n[init]\nengines = engines\n[engines]\npkcs11 = pkcs11_section\n"
            "[pkcs11_section]\nengine_id = pkcs11\n"
            f"dynamic_path = {system_file('*/engines-3/pkcs11.so', 'libengine-pkcs11-openssl')}\n"
            f"MODULE_PATH = {library}\ninit = 1\n"
        )
        return {"HSMVISOR_PKCS11_ADDRESS": self.address, "P11_KIT_SERVER_ADDRESS": self.address, "OPENSSL_CONF": str(config)}

    def nginx(self, certificate: Path) -> subprocess.Popen[bytes]:
        """TLS with the key in the module, by our library; two workers."""
        self.port = free_port()
        binary = shutil.which("nginx") or "/usr/sbin/nginx"
        user = "user www-data;" if os.geteuid() == 0 else ""
        config = self.place / "nginx.conf"
        config.write_text(
            f"daemon off; {user} worker_processes 2; pid {self.place}/nginx.pid; error_log {self.place}/nginx-error.log;\n"
            "env HSMVISOR_PKCS11_ADDRESS; env OPENSSL_CONF;\nevents { worker_connections 512; }\n"
            f"http {{ access_log off; client_body_temp_path {self.place}/t1; proxy_temp_path {self.place}/t2;\n"
            f"fastcgi_temp_path {self.place}/t3;\n"
            f"uwsgi_temp_path {self.place}/t4; scgi_temp_path {self.place}/t5;\n"
            f"server {{ listen 127.0.0.1:{self.port} ssl; ssl_session_cache off; ssl_session_tickets off;\n"
            f"ssl_certificate {certificate};\n"
            'ssl_certificate_key "engine:pkcs11:pkcs11:token=web-1;object=tls;type=private";\n'
            'location / { return 200 "signed by a module\\n"; } } }\n'
        )
        process = self.start(binary, "-c", config, "-p", self.place, log="nginx.log", more=self.guest_environment(SHIM))
        wait_for(lambda: listens(self.port), process, [self.place / "nginx.log", self.place / "nginx-error.log"], "nginx")
        return process

    def stop(self) -> None:
        for process in reversed(self._processes):
            process.terminate()
        for process in reversed(self._processes):
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
