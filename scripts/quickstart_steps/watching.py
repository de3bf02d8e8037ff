"""What a module holds, as its host tells it, looked at all the time: to say how long something took."""

from __future__ import annotations

import threading
import time
from typing import Self

import grpc
from hsmvisor.client import connect
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisor_rpc.v1 import hsmvisor_pb2_grpc as rpc
from services import HostService
from steps import StepFailed

LOOK_EVERY = 0.01  #: seconds


class Watch:
    """From now on: when `material` serves in the guest's module, or (`there` is false) is in it no more."""

    def __init__(self, host: HostService, guest: str, material: str, there: bool) -> None:
        self._host, self._guest, self._material, self._there = host, guest, material, there
        self.began = time.monotonic()
        self._ended = threading.Event()
        self._seen = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join(10)

    def wait(self, what: str, do: str, seconds: float = 60) -> float:
        """Returns when it was so, in seconds since the beginning."""
        self._thread.join(seconds)
        if not self._seen:
            raise StepFailed(f"waited {seconds:.0f} s in vain until {what}", do)
        return self._seen - self.began

    def _run(self) -> None:
        with connect(f"unix:{self._host.control}") as channel:
            materials = rpc.MaterialServiceStub(channel)
            while not self._ended.is_set():
                if self._holds(materials) is self._there:
                    self._seen = time.monotonic()
                    return
                time.sleep(LOOK_EVERY)

    def _holds(self, materials: rpc.MaterialServiceStub) -> bool:
        request = pb.GetMaterialRequest(module=self._guest, name=self._material)
        try:
            found = materials.GetMaterial(request, timeout=10)
        except grpc.RpcError:  # there is no such module, or no such material in it
            return False
        return any(g.state == "current" and g.certificates for g in found.generations)
