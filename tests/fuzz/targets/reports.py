"""What the host makes of the words of a worker that its guest has taken over: JSON reports, and the records around them."""

from __future__ import annotations

import json
from collections import Counter

from fuzz.harness import Input
from fuzz.world import world
from google.protobuf.message import Message
from hsmvisor.host import convert, reports
from hsmvisor.serving.events import EventRow
from hsmvisor_rpc.internal import messages as m
from hsmvisord.worker import reports as worker_reports

INVARIANT = (
    "any text gives a report, nothing is raised; it becomes a protobuf message that can be sent and read again, and lines of the "
    "log without a control character"
)
MAX_LENGTH = 3000


def run(data: bytes) -> None:
    given = Input(data)
    head, number = given.byte(), int.from_bytes(given.take(8), "big")
    text = given.rest().decode("utf-8", "replace")
    match head % 4:
        case 0:
            status = reports.status(text)
            for measure in status.measures:
                survives(convert.measure(measure))
            for material in status.materials:
                survives(convert.material("m", material))
        case 1:
            survives(convert.statistics(reports.statistics(text)))
        case 2:
            survives(convert.executed("m", m.Executed(text[:40], text[:70], number, number, text[:9], text, bool(head & 4))))
        case 3:
            line = json.dumps(reports.plain(text))
            assert json.loads(line) is not None
            assert line.isprintable()
            for key, value in reports.plain(text).items():
                assert (key + str(value)).isprintable(), "a line with a control character"
                (key + str(value)).encode()
            survives(convert.event(EventRow(1, min(number, 2**53), "kind", "m", line)))


def survives(message: Message) -> None:
    assert type(message).FromString(message.SerializeToString()) == message


def seeds() -> dict[str, bytes]:
    token = world().token()
    status = worker_reports.status_report(token, 3, [])
    state = token.index.state
    usage, holders = {("tls", 2): (5, 6)}, Counter({("tls", 2): 1})
    material = json.dumps(worker_reports.material_report(state, state.materials["tls"], usage, holders))
    operation = {"operation": "sign", "mechanism": "CKM_ECDSA", "count": 4, "errors": 0, "seconds": 0.1}
    operation |= {"bounds": [0.1], "counts": [3, 1]}
    statistics = json.dumps({"operations": [operation], "connections": 1, "sessions": 2, "uptime_seconds": 3.5})
    event = json.dumps({"peer": "unix uid=0", "dialect": "native", "program": "nginx", "failures": 2, "nan": float("nan")})
    texts = {"status": status, "statistics": statistics, "executed": material, "event": event}
    made = {name: bytes((kind,)) + bytes(7) + b"\7" + text.encode() for kind, (name, text) in enumerate(texts.items())}
    for name, text in {"deep": "[" * 900, "surrogate": '{"\\ud800\\u0007": "\\udfff"}', "large": '{"sequence": 1e999}'}.items():
        made |= {f"{name}-{kind}": bytes((kind,)) + bytes(8) + text.encode() for kind in range(4)}
    return made
