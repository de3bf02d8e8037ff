"""What happens to either side of a module that is a virtual machine's device, under load: wrong results, and for how long none."""

from __future__ import annotations

import itertools
import os
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from support.certificates import PrivateKey
from support.guest_machine import GuestMachine
from support.host import Module
from support.host_process import new_id
from support.load import Made, fits
from support.machine_guest import OURS, STOCK, MachineSigner, device_socket, tool

_GOES_ON = 5  #: signatures after a disturbance
_WITHIN = 120.0  #: seconds


def _kill_worker(machine: GuestMachine, module: Module) -> None:
    pid = module.pid
    os.kill(pid, signal.SIGKILL)
    module.serving(pid)


def _replace_worker(machine: GuestMachine, module: Module) -> None:
    module.host.process.modules.UpgradeModule(pb.UpgradeModuleRequest(request_id=new_id(), name=module.name), timeout=30)


def _restart_service(machine: GuestMachine, module: Module) -> None:
    module.host.stop(signal.SIGTERM)
    module.host.start()
    module.serving()


def _kill_service(machine: GuestMachine, module: Module) -> None:
    module.host.stop(signal.SIGKILL)
    module.host.start()
    module.serving()


def _stop_machine(machine: GuestMachine, module: Module) -> None:
    machine.stop()
    time.sleep(0.5)
    machine.cont()


def _plug_again(machine: GuestMachine, module: Module) -> None:
    machine.unplug()
    machine.plug(device_socket(module))


DISTURBANCES: dict[str, Callable[[GuestMachine, Module], None]] = {
    "worker killed": _kill_worker,
    "worker replaced": _replace_worker,
    "service restarted": _restart_service,
    "service killed": _kill_service,
    "machine stopped for 0.5 s": _stop_machine,
    "unplugged and plugged in": _plug_again,
}
#: Those that a guest's program may notice: it has no module meanwhile.
NOTICED = {"unplugged and plugged in"}


def _signed(made: list[Made]) -> int:
    return sum(1 for one in made if one.signature)


@dataclass
class _Outcome:
    failed: int = 0
    wrong: int = 0
    pauses: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        median, most = _seconds(self.pauses), round(max(self.pauses), 3)
        return {"failed": self.failed, "wrong": self.wrong, "pause_s_median": median, "pause_s_max": most}


def disturb(machine: GuestMachine, module: Module, label: str, key: PrivateKey, times: int) -> dict[str, Any]:
    """Each disturbance `times` times while a program of the machine signs with `label`: failed and wrong results, and the longest
    pause between two signatures of each in seconds.

    In turns, with a reset of the machine at the end of each: a worker that dies too often within a minute is not started again.
    """
    outcomes = {name: _Outcome() for name in DISTURBANCES}
    boots, found = [], []
    for turn in range(times):
        for number, (name, act) in enumerate(DISTURBANCES.items()):
            signer = MachineSigner(machine, OURS, label, f"disturbed-{turn}-{number}")
            _disturb_once(lambda act=act: act(machine, module), signer, key, outcomes[name])  # type: ignore[misc]
        boots.append(machine.reset())
        began = time.monotonic()
        _wait(lambda: b"hsmvisor" in tool(machine, STOCK, "--list-slots", check=False), "the module after a reset")
        found.append(time.monotonic() - began)
    reset = {"boot_s_median": _seconds(boots), "found_s_median": _seconds(found), "found_s_max": round(max(found), 3)}
    return {name: outcome.summary() for name, outcome in outcomes.items()} | {"reset": reset}


def _disturb_once(act: Callable[[], None], signer: MachineSigner, key: PrivateKey, outcome: _Outcome) -> None:
    _wait(lambda: _signed(signer.made()) > _GOES_ON, "signatures")
    act()
    before = _signed(signer.made())
    _wait(lambda: _signed(signer.made()) > before + _GOES_ON, "signatures after it")
    made = signer.stop()
    outcome.failed += len(made) - _signed(made)
    outcome.wrong += sum(1 for one in made if one.signature and not fits(key, one))
    ends = sorted(one.ended for one in made if one.signature)
    outcome.pauses.append(max(after - before for before, after in itertools.pairwise(ends)))


def _seconds(values: list[float]) -> float:
    return round(statistics.median(values), 3)


def _wait(holds: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + _WITHIN
    while not holds():
        assert time.monotonic() < end, f"waited {_WITHIN} s in vain for {what}"
        time.sleep(0.2)
