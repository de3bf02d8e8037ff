"""Modules on a real host, with an authority that pushes material to them."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from cryptography import x509
from hsmvisor.authority import Authority, Bundle, Pusher, Staging
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from support.certificates import PrivateKey, chain_pem, private_pem
from support.host_process import HostProcess, new_id, wait_for

SETTINGS = "[guests]\nsocket_mode = 0o666\n"


class Host:
    """One host service and the authority that its modules obey."""

    def __init__(self, settings: str = SETTINGS) -> None:
        self.process = HostProcess(settings)
        self.authority = Authority.create(self.process.directory / "authority")
        self.process.root_public = self.authority.root_public

    def start(self) -> Host:
        """Returns when the control API answers; after stop() or kill() as well."""
        self.process.start()
        return self.meet()

    def meet(self) -> Host:
        """Learns the started host's key, for deliveries; returns when its helpers are there as well, or after 2 s."""
        self.key = self.process.host.GetHost(pb.GetHostRequest(), timeout=10 * self.process.patience).host_key
        self.pusher = Pusher(self.process.connect(), self.authority, self.key)
        return self

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.clean()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.clean()

    def stop(self, number: int) -> None:
        """Ends the host service by a signal; its workers go on."""
        self.process.stop(number)

    def clean(self) -> None:
        self.process.clean()

    def pid(self) -> int:
        assert self.process.process is not None
        return self.process.process.pid

    def create(self, name: str, **settings: object) -> Module:
        return Module(self, name, self.process.create(name, **settings).address)


class Module:
    """One guest's module; `address` is what its programs are given."""

    def __init__(self, host: Host, name: str, address: str) -> None:
        self.host, self.name, self.address = host, name, address

    def status(self) -> pb.Module:
        return self.host.process.get(self.name)

    @property
    def pid(self) -> int:
        return self.status().pid

    def serving(self, not_pid: int = 0) -> pb.Module:
        return self.host.process.serving(self.name, not_pid)

    def stage(self, material: str, key: PrivateKey | None, chain: tuple[x509.Certificate, ...] = (), **staging: object) -> int:
        """Delivers the next generation and returns its number; without `key` it is a new certificate for the key that is there."""
        pusher, values = self.host.pusher, Staging(**({"profile": "any"} | staging))  # type: ignore[arg-type]
        generation = pusher.next_generation(self.name, material)
        bundle = Bundle.make(private_pem(key) if key else None, chain_pem(chain))
        pusher.stage(self.name, material, bundle, values, generation)
        return generation

    def activate(self, material: str, generation: int) -> pb.ExecuteResponse:
        return self.host.pusher.activate(self.name, material, generation)

    def push(self, material: str, key: PrivateKey | None, chain: tuple[x509.Certificate, ...] = (), **staging: object) -> int:
        """Stages and activates the next generation; returns its number."""
        generation = self.stage(material, key, chain, **staging)
        self.activate(material, generation)
        return generation

    def destroy_generation(self, material: str, generation: int) -> pb.ExecuteResponse:
        return self.host.pusher.destroy(self.name, material, generation)

    def material(self, material: str) -> pb.Material:
        return self.host.process.material.GetMaterial(pb.GetMaterialRequest(module=self.name, name=material), timeout=10)

    def states(self, material: str) -> dict[int, str]:
        return {g.number: g.state for g in self.material(material).generations}

    def destroy(self) -> None:
        self.host.process.modules.DestroyModule(pb.DestroyModuleRequest(request_id=new_id(), name=self.name), timeout=20)


__all__ = ["SETTINGS", "Host", "Module", "wait_for"]
