"""A guest's side: a PKCS#11 library, the module that it reaches, and the programs that are run with both."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
OURS = REPOSITORY / "pkcs11_shim/build/libhsmvisor-pkcs11.so"


def system_file(pattern: str) -> Path:
    """The one file below /usr/lib that matches; multiarch directories differ by machine."""
    found = sorted(Path("/usr/lib").glob(pattern))
    assert found, f"/usr/lib/{pattern}: not installed (scripts/setup --dev installs it)"
    return found[0]


@dataclass(frozen=True)
class Library:
    name: str
    path: Path
    variable: str  #: of the environment, that holds a module's address

    @property
    def ours(self) -> bool:
        return self.name == "ours"


def library(name: str) -> Library:
    if name == "ours":
        return Library(name, OURS, "HSMVISOR_PKCS11_ADDRESS")
    return Library(name, system_file("*/pkcs11/p11-kit-client.so"), "P11_KIT_SERVER_ADDRESS")


@dataclass(frozen=True)
class Guest:
    """Programs of a guest: `library` reaches the module at `address` (unix:path=...); `directory` holds their files."""

    library: Library
    address: str
    directory: Path

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {
            self.library.variable: self.address,
            "HOME": str(self.directory),
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH", "")]),
        }

    def openssl_config(self) -> Path:
        """OPENSSL_CONF for programs that use libengine-pkcs11 with the guest's library, as the engine `pkcs11`."""
        path = self.directory / "openssl.cnf"
        if not path.exists():
            path.write_text(
                "openssl_conf = init\n[init]\nengines = engines\n[engines]\npkcs11 = pkcs11_section\n"
                f"[pkcs11_section]\nengine_id = pkcs11\ndynamic_path = {system_file('*/engines-3/pkcs11.so')}\n"
                f"MODULE_PATH = {self.library.path}\ninit = 1\n"
                "[req]\ndistinguished_name = dn\n[dn]\n"
            )
        return path

    @property
    def with_engine(self) -> dict[str, str]:
        return {"OPENSSL_CONF": str(self.openssl_config())}

    def run(
        self, *command: str | Path, stdin: bytes = b"", timeout: float = 30, check: bool = True, more: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """Output and errors come together in `stdout`, as a person would see them; a failure shows it."""
        result = subprocess.run(
            [str(c) for c in command],
            input=stdin,
            env=self.environment | (more or {}),
            cwd=self.directory,
            timeout=timeout,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        if check:
            said = result.stdout.decode(errors="replace")
            assert result.returncode == 0, f"{' '.join(map(str, command))} ended with {result.returncode}:\n{said}"
        return result

    def start(self, *command: str | Path, output: Path, more: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Starts a server of the guest in a session of its own."""
        with output.open("wb") as file:
            return subprocess.Popen(
                [str(c) for c in command],
                env=self.environment | (more or {}),
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def write(self, name: str, content: bytes | str) -> Path:
        path = self.directory / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path


def stop(process: subprocess.Popen[bytes], timeout: float = 5) -> None:
    process.terminate()
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(timeout)


def free_port() -> int:
    """A TCP port of loopback that nobody listens on just now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition: Callable[[], object], what: str, timeout: float = 10) -> None:
    """Polls until `condition()` is true; fails naming `what`."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"waited {timeout} s in vain for {what}"
        time.sleep(0.02)
