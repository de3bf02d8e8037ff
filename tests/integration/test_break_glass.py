"""Break-glass: a module whose root is lost is emptied and obeys another one; its guests find it where it was."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from hsmvisor.authority import Authority, AuthorityError, Bundle, Pusher, Staging
from hsmvisor.serving.audit_verify import verify
from hsmvisor_rpc.sealed.commands import fingerprint
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from support.certificates import new_key, private_pem
from support.guest import Guest, library
from support.host import Host
from support.host_process import HostProcess, new_id, reason
from support.shell import CkFailure, Shell

pytestmark = pytest.mark.slow
C = grpc.StatusCode
WHY = (("hsmvisor-why", "the laptop with the root was stolen"),)


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


def breaking(name: str, root: bytes, request_id: str = "", empty_it: bool = True) -> pb.BreakGlassRequest:
    return pb.BreakGlassRequest(request_id=request_id or new_id(), name=name, new_root=root, empty_it=empty_it)


def kept_by_a_relay(pusher: Pusher) -> list[bytes]:
    """Returns the list that each command goes into, as somebody on the way would keep them."""
    kept: list[bytes] = []
    execute = pusher._materials.Execute

    def keep(request: pb.ExecuteRequest, **options: Any) -> pb.ExecuteResponse:
        kept.append(request.signed_command)
        return execute(request, **options)

    pusher._materials.Execute = keep  # type: ignore[method-assign, assignment]
    return kept


def recorded(host: HostProcess, kind: str) -> list[dict[str, object]]:
    return [line for line in map(json.loads, host.audit_lines()) if line["kind"] == kind]


def test_a_module_with_a_lost_root_is_emptied_and_its_guest_goes_on_with_another_key(host: Host, tmp_path: Path) -> None:
    process, module = host.process, host.create("glass", max_sessions=77)
    lost, new = new_key("p256"), new_key("p256")
    module.push("tls", lost, mode="follow")
    before = module.status()
    executed = kept_by_a_relay(host.pusher)
    module.push("later", new_key("p256"))
    other = Authority.create(tmp_path / "other")
    with Shell(Guest(library("ours"), module.address, tmp_path)) as shell:
        shell.tell("open")
        handle = shell.private("tls")
        assert shell.signs_with(handle, lost)
        for request, said in (
            (breaking("glass", other.root_public, empty_it=False), (C.INVALID_ARGUMENT, "CONFIRMATION")),
            (breaking("nobody", other.root_public), (C.NOT_FOUND, "MODULE")),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                process.modules.BreakGlass(request, metadata=WHY, timeout=20)
            assert reason(caught.value) == said
        with pytest.raises(grpc.RpcError) as caught:
            process.modules.BreakGlass(breaking("glass", other.root_public), timeout=20)
        assert reason(caught.value) == (C.INVALID_ARGUMENT, "WHY")
        assert shell.signs_with(handle, lost), "what was refused has changed nothing"

        asked = breaking("glass", other.root_public)
        after = process.modules.BreakGlass(asked, metadata=WHY, timeout=20)
        assert (after.address, after.settings, after.name) == (before.address, before.settings, before.name)
        assert (after.state, after.materials, after.root) == ("serving", 0, fingerprint(other.root_public))
        assert after.module_id != before.module_id and after.pid != before.pid
        assert process.modules.BreakGlass(asked, metadata=WHY, timeout=20).module_id == after.module_id, "once"

        # what the old root signed and sealed fits no more
        with pytest.raises(AuthorityError, match="another authority"):
            host.pusher.push("glass", "tls", Bundle.make(private_pem(lost)))
        for command in executed:
            with pytest.raises(grpc.RpcError) as caught:
                process.material.Execute(pb.ExecuteRequest(request_id=new_id(), module="glass", signed_command=command), timeout=10)
            assert reason(caught.value)[1] in ("UNKNOWN_MANAGER", "WRONG_MODULE")

        # the application that runs: its handle names nothing, then it finds the new key
        with pytest.raises(CkFailure, match=r"HANDLE_INVALID|0x60|0x82"):
            shell.tell("sign", handle)
        pusher = Pusher(process.connect(), other, host.key)
        pusher.push("glass", "tls", Bundle.make(private_pem(new)), Staging(profile="any"))
        shell.tell("open")
        assert shell.private("tls") != handle
        assert shell.signs_with(shell.private("tls"), new)

    lines = recorded(process, "module.break-glass")
    assert [line["result"] for line in lines] == ["refused", "refused", "refused", "ok", "repeated"]
    done = lines[3]
    assert done["why"] == WHY[0][1] and str(done["who"]).startswith("uid:")
    assert (done["old_module_id"], done["module_id"]) == (before.module_id.hex(), after.module_id.hex())
    assert (done["old_root"], done["new_root"]) == (before.root.hex(), after.root.hex())
    events = process.events.StreamEvents(pb.StreamEventsRequest(after_id=1, module="glass"), timeout=10)
    assert next(e for e in events if e.kind == "module-break-glass")
    assert verify(process.state / "audit.log", host.key).sound


STEPS = [
    ("hsmvisor.host.module:Module.give_way", "before"),
    ("hsmvisor.host.state:State.replace", "before"),
    ("hsmvisor.host.state:State.replace", "after"),
    ("hsmvisor.host.module:Module.take_place", "after"),
    ("hsmvisor.serving.audit:Audit._write", "before"),
    ("hsmvisor.serving.audit:Audit._write", "after"),
]


def test_break_glass_killed_at_any_step_leaves_the_old_module_or_an_empty_one() -> None:
    key, new_root = new_key("p256"), b"n" * 32
    host = Host()
    process = host.process
    process.module = "support.crashing_host"
    armed = process.directory / "armed"
    try:
        for number, (step, moment) in enumerate(STEPS):
            name, called = f"glass-{number}", f"the-one-{number}"
            process.environment = {"HSMVISOR_CRASH": f"{step}:{moment}", "HSMVISOR_CRASH_ARMED_BY": str(armed)}
            host.start()
            module = host.create(name)
            module.push("tls", key)
            old = module.status()
            armed.touch()
            with pytest.raises(grpc.RpcError):
                process.modules.BreakGlass(breaking(name, new_root, called), metadata=WHY, timeout=10)
            assert process.process is not None and process.process.wait(10) == -signal.SIGKILL, (step, moment)
            armed.unlink()
            process.environment = {}
            host.start()
            found = module.serving()
            kept = number < 2  # before the one transaction
            assert (found.module_id == old.module_id) is kept, (step, moment)
            assert (found.materials, found.root) == ((1, old.root) if kept else (0, fingerprint(new_root))), (step, moment)
            again = process.modules.BreakGlass(breaking(name, new_root, called), metadata=WHY, timeout=10)  # the caller repeats
            assert kept or again.module_id == found.module_id, (step, moment)
            assert (module.serving().materials, again.root) == (0, fingerprint(new_root))
            assert verify(process.state / "audit.log", host.key).sound
            host.stop(signal.SIGTERM)
    finally:
        host.clean()
