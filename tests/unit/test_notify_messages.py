"""What webhooks and mails say."""

from __future__ import annotations

import email
import json
from email.policy import default
from typing import Any

import pytest
from hsmvisor.manager.history.events import Event, Kind
from hsmvisor.manager.notify import limits, mails, signing
from hsmvisor.manager.notify.channels import Mail
from hsmvisor.manager.notify.subjects import SUBJECTS
from hypothesis import given
from hypothesis import strategies as st

CHANNEL = Mail("mail", "mx.example.net", "hsmvisor@example.net", ("ops@example.net", "sec@example.net"))


def event(id: int = 7, kind: str = "denied", material: str = "web", resource: str = "host/vm", **detail: Any) -> Event:
    return Event(id, 1767225600.25, kind, "alice", "r1", material, resource, "", json.dumps(detail))


def read(*events: Event) -> Any:
    return email.message_from_bytes(mails.mail(CHANNEL, events, 1767225601.0).as_bytes(), policy=default)


def test_every_kind_has_a_subject() -> None:
    assert set(SUBJECTS) == set(Kind)
    assert all(len(words) < 60 for words in SUBJECTS.values())


def test_the_specifications_example_of_a_signature() -> None:
    """From the test of the reference library (standard-webhooks/standard-webhooks, libraries/python)."""
    key = signing.base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    made = signing.headers([key, bytes(24)], "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    first, second = made["webhook-signature"].split(" ")
    assert first == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=" and second.startswith("v1,") and second != first
    assert (made["webhook-id"], made["webhook-timestamp"]) == ("msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330")


def test_a_webhooks_body() -> None:
    told = json.loads(signing.body(event(why="no rule permits it")))
    assert told == {
        "type": "hsmvisor.denied",
        "timestamp": "2026-01-01T00:00:00.250000Z",
        "data": {
            "id": 7,
            "owner": "alice",
            "request": "r1",
            "material": "web",
            "resource": "host/vm",
            "host": "",
            "detail": {"why": "no rule permits it"},
        },
    }


def test_ids_are_one_for_each_event_and_have_no_dots() -> None:
    ids = {signing.message_id(e) for e in (event(), event(8), event(kind="failed"), event(material="x.y"))}
    assert len(ids) == 4 and not any("." in one for one in ids)
    assert signing.message_id(event()) == signing.message_id(event(more="detail"))


def test_a_mail_of_one_event() -> None:
    made = read(event(why="no rule", count=3))
    assert made["subject"] == "hsmvisor: refused by policy: web on host/vm"
    assert (made["from"], made["to"]) == ("hsmvisor@example.net", "ops@example.net, sec@example.net")
    assert made["auto-submitted"] == "auto-generated" and made["message-id"].endswith("@example.net>")
    assert made["date"].datetime.isoformat() == "2026-01-01T00:00:01+00:00"
    assert made.get_content_type() == "text/plain"
    text = made.get_content().replace("\r\n", "\n")
    assert "when:       2026-01-01 00:00:00 UTC\n" in text and "why:        no rule\n" in text and "count:      3\n" in text


def test_a_mail_of_many_events() -> None:
    made = read(*(event(i, why="no rule" if i == 2 else "") for i in range(1, 22)))
    assert made["subject"] == "hsmvisor: refused by policy (21 events)"
    lines = made.get_content().splitlines()
    assert len(lines) == 23 and lines[3] == "2026-01-01 00:00:00 UTC  2  web on host/vm of alice: no rule"


def test_a_kind_of_a_later_release() -> None:
    assert read(event(kind="teleported"))["subject"] == "hsmvisor: teleported: web on host/vm"


@pytest.mark.parametrize(
    "name", ["x\r\nBcc: evil@example.net", "x\nSubject: y", "=?utf-8?q?a=0D=0ABcc=3A_evil?=", "ü" * 64, "\x00\x1b[2J"]
)
def test_names_do_not_reach_headers(name: str) -> None:
    made = read(event(material=name, resource=name))
    assert made["bcc"] is None and len(made.get_all("subject")) == 1
    assert made["subject"].startswith("hsmvisor: refused by policy: ") and made["subject"].isprintable()
    assert len(made["subject"]) <= limits.MAX_SUBJECT + 20
    assert "\x1b" not in made.get_content() and "\r\nBcc" not in made.as_string()


@given(st.text(max_size=300), st.text(max_size=300))
def test_whatever_names_are(material: str, resource: str) -> None:
    made = read(event(material=material, resource=resource, why=material))
    ours = {"From", "To", "Subject", "Date", "Message-ID", "Auto-Submitted"}
    assert set(made.keys()) == ours | {"Content-Type", "Content-Transfer-Encoding", "MIME-Version"}
    assert not made.defects and made["subject"].isprintable()
