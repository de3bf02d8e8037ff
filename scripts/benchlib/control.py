"""What the control plane costs: the first signature after `module create`, memory, swaps, recovery of a killed worker."""

from __future__ import annotations

import math
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from support.certificates import new_key
from support.guest import Guest, library
from support.host import Host, Module
from support.host_process import new_id
from support.killing import silence
from support.load import Signer
from support.processes import pss, titled
from support.rotation import Activation, owner_of

sys.path.insert(0, str(Path(__file__).parents[2] / "tests/integration/programs"))
from cryptoki import Cryptoki, number

PRIVATE = {"CLASS": number(3)}


def spread(values: list[float], digits: int = 2) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "median": round(statistics.median(ordered), digits),
        "p90": round(ordered[math.ceil(0.9 * (len(ordered) - 1))], digits),
        "max": round(ordered[-1], digits),
        "count": len(ordered),
    }


def first_signature(host: Host, rounds: int) -> dict[str, Any]:
    """Milliseconds from CreateModule being asked to: its answer; a first signature with a key that was then delivered; and the same
    without the time of delivery (create, then C_Initialize to C_Sign).  Keys are made before.
    """
    created, signed, bare = [], [], []
    ours = library("ours")
    for round_ in range(rounds):
        key = new_key("p256")
        began = time.perf_counter()
        module = host.create(f"first-{round_}")
        answered = time.perf_counter()
        module.push("web", key)
        delivered = time.perf_counter()
        os.environ[ours.variable] = module.address
        token = Cryptoki(str(ours.path))
        token.initialize()
        token.open()
        (handle,) = token.find(PRIVATE)
        token.sign(handle, bytes(32))
        ended = time.perf_counter()
        token.finalize()
        module.destroy()
        created.append((answered - began) * 1000)
        signed.append((ended - began) * 1000)
        bare.append((ended - began - (delivered - answered)) * 1000)
    return {"create_ms": spread(created), "create_to_signature_ms": spread(bare), "create_deliver_signature_ms": spread(signed)}


def memory(host: Host, modules: int) -> dict[str, Any]:
    """PSS of each worker when `modules` of them run, each with one P-256 key that has signed."""
    made: list[Module] = []
    ours = library("ours")
    for n in range(modules):
        module = host.create(f"memory-{n}")
        made.append(module)
        module.push("web", new_key("p256"))
        os.environ[ours.variable] = module.address
        token = Cryptoki(str(ours.path))
        token.initialize()
        token.open()
        token.sign(token.find(PRIVATE)[0], bytes(32))
        token.finalize()
    sizes = [pss(module.pid) / 2**20 for module in made]
    helpers = {name: round(pss(titled(host.pid(), f"hsmvisord: {name}")) / 2**20, 2) for name in ("launcher", "key provider")}
    result = {
        "modules": modules,
        "worker_pss_mb": spread(sizes),
        "supervisor_pss_mb": round(pss(host.pid()) / 2**20, 1),
        "helpers_pss_mb": helpers,
    }
    for module in made:
        module.destroy()
    return result


def recovery(host: Host, kills: int) -> dict[str, Any]:
    """Milliseconds without a signature after SIGKILL of the worker, as a busy application sees it; 3 kills a module."""
    silences: list[float] = []
    failed = 0
    for turn in range(-(-kills // 3)):
        module = host.create(f"recovery-{turn}")
        module.push("web", new_key("p256"))
        moments = []
        with tempfile.TemporaryDirectory(prefix="hsmb.") as directory:
            signer = Signer(Guest(library("ours"), module.address, Path(directory)), "web")
            time.sleep(0.5)
            for _ in range(3):
                pid = module.pid
                moments.append(time.monotonic())
                os.kill(pid, signal.SIGKILL)
                module.serving(not_pid=pid)
                time.sleep(0.3)
            made = signer.stop()
        failed += sum(1 for one in made if one.error)
        silences += [silence(made, moment) * 1000 for moment in moments]
        module.destroy()
    return {"silence_ms": spread(silences), "failed_signatures": failed}


def swap(host: Host, rotations: int) -> dict[str, Any]:
    """Milliseconds of an activation, and from asking for it to the first signature of the new key by a busy follower."""
    module = host.create("swap")
    activations: list[Activation] = []

    def rotate() -> None:
        key = new_key("p256")
        generation = module.stage("requests", key, mode="follow", profile="request-signing")
        asked = time.monotonic()
        module.activate("requests", generation)
        activations.append(Activation(key, b"", asked, time.monotonic()))
        if generation > 10:
            module.destroy_generation("requests", generation - 10)

    rotate()
    with tempfile.TemporaryDirectory(prefix="hsmb.") as directory:
        signer = Signer(Guest(library("ours"), module.address, Path(directory)), "requests")
        time.sleep(0.5)
        for _ in range(rotations):
            rotate()
            time.sleep(0.05)
        time.sleep(0.2)
        made = signer.stop()
    first: dict[int, float] = {}
    for one in made:
        owner = owner_of(one, activations) if not one.error else None
        if owner is not None:
            first.setdefault(owner, one.ended)
    module.destroy()
    return {
        "activation_ms": spread([(a.acknowledged - a.asked) * 1000 for a in activations]),
        "to_first_signature_ms": spread([(first[n] - activations[n].asked) * 1000 for n in first if n]),
        "failed_signatures": sum(1 for one in made if one.error),
    }


def upgrade(host: Host, rounds: int) -> dict[str, Any]:
    """Under load: seconds from the service's stop being asked for until the next one's control API answers; milliseconds in which
    requests wait, at most, while a module's worker is replaced."""
    module = host.create("upgrade")
    module.push("web", new_key("p256"))
    away, paused, whole = [], [], []
    with tempfile.TemporaryDirectory(prefix="hsmb.") as directory:
        signer = Signer(Guest(library("ours"), module.address, Path(directory)), "web")
        time.sleep(0.5)
        for _ in range(rounds):
            began = time.monotonic()
            host.stop(signal.SIGTERM)
            host.start()
            away.append(time.monotonic() - began)
            module.serving()
            request = pb.UpgradeModuleRequest(request_id=new_id(), name=module.name, renew_launcher=True)
            done = host.process.modules.UpgradeModule(request, timeout=30)
            paused.append(done.paused_seconds * 1000)
            whole.append(done.seconds * 1000)
            time.sleep(0.2)
        made = signer.stop()
    module.destroy()
    return {
        "control_api_away_s": spread(away),
        "worker_replaced_ms": spread(whole),
        "requests_wait_ms": spread(paused),
        "signatures": len(made),
        "failed_signatures": sum(1 for one in made if one.error),
    }
