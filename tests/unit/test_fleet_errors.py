"""What the commands make of answers that a real manager does not give when a test wants them: scripted ones."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner, Result
from google.protobuf.any_pb2 import Any as Packed
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status
from hsmvisor.cli.fleet import records, waiting
from hsmvisor.cli.main import cli
from hsmvisor_rpc.v1 import manager_pb2 as pb
from hsmvisor_rpc.v1 import manager_pb2_grpc as rpc

ID = "5f" * 16


class Script(rpc.FleetServiceServicer, rpc.RequestServiceServicer, rpc.HistoryServiceServicer):
    """`answers`: what Get gives, one after the other, the last one from then on; None: the manager is away."""

    def __init__(self) -> None:
        self.answers: list[pb.MaterialRequest | None] = []
        self.applied: list[pb.ApplyRequest] = []
        self.streams: list[list[pb.FleetEvent] | grpc.StatusCode] = []
        self.after: list[int] = []
        self.who: Callable[[grpc.ServicerContext], None] = lambda context: None
        self.end = threading.Event()

    def WhoAmI(self, request: pb.WhoAmIRequest, context: grpc.ServicerContext) -> pb.WhoAmIResponse:
        self.who(context)
        return pb.WhoAmIResponse(name="ann")

    def Get(self, request: pb.GetRequest, context: grpc.ServicerContext) -> pb.MaterialRequest:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer is None:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the manager stops")
        assert answer is not None
        return answer

    def Apply(self, request: pb.ApplyRequest, context: grpc.ServicerContext) -> pb.MaterialRequest:
        self.applied.append(request)
        if request.spec.material == "bad":
            refuse(context, grpc.StatusCode.PERMISSION_DENIED, "POLICY", "no-bank: not here", "look at the policies")
        answer = next(answer for answer in self.answers if answer is not None)
        shown = pb.MaterialRequest()
        shown.CopyFrom(answer)
        shown.spec.CopyFrom(request.spec)
        return shown

    def ListEvents(self, request: pb.ListFleetEventsRequest, context: grpc.ServicerContext) -> pb.ListFleetEventsResponse:
        return pb.ListFleetEventsResponse(events=[pb.FleetEvent(id=7, kind="issued", detail='{"a": "b c", "d": ""}')])

    def StreamEvents(self, request: pb.StreamFleetEventsRequest, context: grpc.ServicerContext) -> Iterator[pb.FleetEvent]:
        self.after.append(request.after_id)
        step = self.streams.pop(0)
        if isinstance(step, grpc.StatusCode):
            context.abort(step, "it is over")
        yield from step  # type: ignore[misc]


def refuse(context: grpc.ServicerContext, code: grpc.StatusCode, reason: str, detail: str, hint: str) -> None:
    info = Packed()
    info.Pack(error_details_pb2.ErrorInfo(domain="hsmvisor", reason=reason, metadata={"hint": hint}))
    number = getattr(code_pb2, code.name)
    context.abort_with_status(rpc_status.to_status(status_pb2.Status(code=number, message=detail, details=[info])))


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    found, server = Script(), grpc.server(ThreadPoolExecutor(4))
    rpc.add_FleetServiceServicer_to_server(found, server)
    rpc.add_RequestServiceServicer_to_server(found, server)
    rpc.add_HistoryServiceServicer_to_server(found, server)
    address = f"unix:{tmp_path}/s"
    server.add_insecure_port(address)
    server.start()
    monkeypatch.setenv("HSMVISOR_MANAGER", address)
    for module, names in ((waiting, ("_LOOK_EVERY", "_SETTLED", "_NOBODY")), (records, ("_PAUSE",))):
        for name in names:
            monkeypatch.setattr(module, name, 0.05)
    yield found
    found.end.set()
    server.stop(None).wait()


def run(*words: str, **more: Any) -> Result:
    return CliRunner().invoke(cli, list(words), prog_name="hsmvisor", **more)


def shown(stage: str = "serving", **more: Any) -> pb.MaterialRequest:
    """As the manager tells it."""
    line = pb.Line(id="l", resource="rack/web-1", stage=stage, **more)
    return pb.MaterialRequest(id=ID, owner="ann", state="active", spec=pb.RequestSpec(material="web"), lines=[line])


def apply(*words: str) -> Result:
    return run("request", "apply", "web", "--name", "dns:a.test", "--resource", "rack/web-1", "--wait", *words)


def test_a_manager_that_does_not_answer(script: Script) -> None:
    script.who = lambda context: script.end.wait(5) and None
    result = run("--timeout", "0.2", "fleet", "whoami")
    assert result.exit_code == 7 and "the manager did not answer in time" in result.output


def test_reason_and_hint_are_shown_to_people_and_programs(script: Script) -> None:
    script.who = lambda context: refuse(context, grpc.StatusCode.UNAUTHENTICATED, "TOKEN_EXPIRED", "this token is old", "get one")
    result = run("fleet", "whoami")
    assert (result.exit_code, result.output) == (5, "hsmvisor: TOKEN_EXPIRED: this token is old\n  get one\n")
    told = json.loads(run("fleet", "whoami", "--json").output)["error"]
    assert told == {"exit_code": 5, "reason": "TOKEN_EXPIRED", "message": "TOKEN_EXPIRED: this token is old", "hint": "get one"}


@pytest.mark.parametrize(
    "status",
    [
        b"\xff\xff",
        status_pb2.Status(code=code_pb2.NOT_FOUND, message="no").SerializeToString(),
        status_pb2.Status(
            code=code_pb2.PERMISSION_DENIED,
            message="no",
            details=[Packed(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff")],
        ).SerializeToString(),
    ],
    ids=["none", "another code", "broken details"],
)
def test_what_an_answer_says_wrongly_of_its_error_is_left_out(script: Script, status: bytes) -> None:
    def refuse_oddly(context: grpc.ServicerContext) -> None:
        context.set_trailing_metadata((("grpc-status-details-bin", status),))
        context.abort(grpc.StatusCode.PERMISSION_DENIED, "no")

    script.who = refuse_oddly
    result = run("fleet", "whoami")
    assert (result.exit_code, result.output) == (5, "hsmvisor: no\n")


def test_waiting_outlives_a_manager_that_is_away(script: Script) -> None:
    script.answers = [shown("waiting"), shown("ordering"), None, None, shown("serving", generation=1)]
    result = apply()
    assert result.exit_code == 0, result.output
    assert "web: 1 ordering ..." in result.output and "web: 1 serving ..." in result.output


def test_waiting_ends_when_it_fails(script: Script) -> None:
    script.answers = [shown("ordering"), shown("ordering"), shown("ordering", failures=1, why="the authority refuses dns:a.test")]
    result = apply()
    assert result.exit_code == 1, result.output
    assert "web fails: rack/web-1: ordering: the authority refuses dns:a.test" in result.output and ID in result.output


def test_waiting_ends_in_time_and_says_what_it_waited_for(script: Script) -> None:
    script.answers = [shown("delivering", why="host rack is away")]
    result = apply("--timeout", "1s")
    assert result.exit_code == 7, result.output
    assert "web is not done in time: rack/web-1: delivering: host rack is away" in result.output


def test_one_of_several_that_is_refused_keeps_none_of_the_others(script: Script) -> None:
    script.answers = [shown("serving", generation=1)]
    text = "".join(f'[[request]]\nmaterial = "{name}"\nnames = ["dns:a.test"]\n' for name in ("one", "bad", "two"))
    result = run("request", "apply", "--file", "-", "--no-wait", "--request-id", "r", input=text)
    assert result.exit_code == 5, result.output
    assert "request 2 (bad): POLICY: no-bank: not here\n  look at the policies" in result.output
    assert [(a.request_id, a.spec.material) for a in script.applied] == [("r-0", "one"), ("r-1", "bad"), ("r-2", "two")]


def test_following_goes_on_with_the_last_event_that_was_seen(script: Script) -> None:
    script.streams = [
        [pb.FleetEvent(id=8, kind="denied")],
        grpc.StatusCode.UNAVAILABLE,
        [pb.FleetEvent(id=9)],
        grpc.StatusCode.ABORTED,
    ]
    result = run("fleet", "events", "--follow")
    assert script.after == [7, 8, 8, 9]
    assert result.exit_code == 4 and "it is over" in result.output
    assert [line.split()[0] for line in result.output.splitlines()[:3]] == ["7", "8", "9"]
    assert 'issued - a="b c"' in result.output
