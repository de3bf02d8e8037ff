"""The set-ups that are measured side by side: each one a PKCS#11 module with the same four keys and an environment to reach it."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from support.certificates import PrivateKey, new_key, pkcs8
from support.guest import library, system_file
from support.host import Host

PIN = "1234"
KEYS = {"p256": "p256", "rsa2048": "rsa2048", "rsa3072": "rsa3072", "ed25519": "ed25519"}
MECHANISMS = {"p256": "ecdsa", "rsa2048": "rsa-pkcs", "rsa3072": "rsa-pkcs", "ed25519": "eddsa"}


@dataclass(frozen=True)
class Setup:
    name: str
    title: str
    module: Path
    environment: dict[str, str]
    pin: str = ""
    #: keys that its client cannot use
    lacks: frozenset[str] = field(default_factory=frozenset)


@contextmanager
def all_setups(directory: Path, names: list[str]) -> Iterator[tuple[list[Setup], dict[str, PrivateKey]]]:
    """Everything is running while the context lasts; the keys are the same everywhere."""
    keys = {name: new_key(kind) for name, kind in KEYS.items()}
    makers = {"softhsm": _softhsm, "p11kit-softhsm": _p11kit_softhsm, "hsmvisor": _hsmvisor, "hsmvisor-p11kit": _hsmvisor_p11kit}
    with ExitStack() as stack:
        host: list[Host] = []
        if any(name.startswith("hsmvisor") for name in names):
            host.append(stack.enter_context(_host()))
            module = host[0].create("bench")
            for name, key in keys.items():
                module.push(name, key)
            address = module.address
        else:
            address = ""
        if any("softhsm" in name for name in names):
            make_softhsm_token(directory, "bench")
            _fill_softhsm(directory, keys)
        yield [stack.enter_context(makers[name](directory, address)) for name in names], keys


@contextmanager
def _host() -> Iterator[Host]:
    with Host() as host:
        yield host


def softhsm_environment(directory: Path) -> dict[str, str]:
    return {"SOFTHSM2_CONF": str(directory / "softhsm2.conf")}


def make_softhsm_token(directory: Path, label: str) -> None:
    """An empty token, in files below the directory."""
    tokens = directory / "tokens"
    tokens.mkdir()
    (directory / "softhsm2.conf").write_text(f"directories.tokendir = {tokens}\nlog.level = ERROR\n")
    command = ["softhsm2-util", "--init-token", "--free", "--label", label, "--so-pin", PIN, "--pin", PIN]
    subprocess.run(command, env=os.environ | softhsm_environment(directory), check=True, capture_output=True)


def _fill_softhsm(directory: Path, keys: dict[str, PrivateKey]) -> None:
    environment = os.environ | softhsm_environment(directory)

    def run(*command: str) -> None:
        subprocess.run(command, env=environment, check=True, capture_output=True)

    module = str(softhsm_module())
    for number, (name, key) in enumerate(keys.items(), 1):
        file = directory / f"{name}.der"
        file.write_bytes(pkcs8(key))
        if name == "ed25519":  # pkcs11-tool 0.23 writes no Ed25519 keys; any key is as good to measure with
            run(
                "pkcs11-tool",
                "--module",
                module,
                "--login",
                "--pin",
                PIN,
                "--keypairgen",
                "--key-type",
                "EC:edwards25519",
                "--label",
                name,
            )
        else:
            common = (
                "--module",
                module,
                "--login",
                "--pin",
                PIN,
                "--write-object",
                str(file),
                "--label",
                name,
                "--id",
                f"{number:02x}",
            )
            run("pkcs11-tool", *common, "--type", "privkey", "--usage-sign")


def softhsm_module() -> Path:
    return system_file("**/softhsm/libsofthsm2.so")


@contextmanager
def _softhsm(directory: Path, address: str) -> Iterator[Setup]:
    yield Setup("softhsm", "SoftHSM2 in the application", softhsm_module(), softhsm_environment(directory), PIN)


@contextmanager
def _p11kit_softhsm(directory: Path, address: str) -> Iterator[Setup]:
    with p11kit_server(directory) as environment:
        lacks = frozenset({"ed25519"})
        yield Setup("p11kit-softhsm", "p11-kit server + SoftHSM2", library("p11-kit").path, environment, PIN, lacks)


@contextmanager
def p11kit_server(directory: Path) -> Iterator[dict[str, str]]:
    """Gives the environment of the client that reaches the directory's SoftHSM2 through a server."""
    socket = directory / "p11-kit.sock"
    server = subprocess.Popen(
        ["p11-kit", "server", "--foreground", "--name", str(socket), "--provider", str(softhsm_module()), "pkcs11:"],
        env=os.environ | softhsm_environment(directory),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 10
        while not socket.exists():
            if time.monotonic() > end:
                raise RuntimeError("p11-kit server did not start within 10 s")
            time.sleep(0.05)
        yield {library("p11-kit").variable: f"unix:path={socket}"}
    finally:
        server.terminate()
        server.wait(10)


@contextmanager
def _hsmvisor(directory: Path, address: str) -> Iterator[Setup]:
    ours = library("ours")
    yield Setup("hsmvisor", "hsmvisor", ours.path, {ours.variable: address})


@contextmanager
def _hsmvisor_p11kit(directory: Path, address: str) -> Iterator[Setup]:
    client = library("p11-kit")
    yield Setup(
        "hsmvisor-p11kit", "hsmvisor through p11-kit-client", client.path, {client.variable: address}, "", frozenset({"ed25519"})
    )
