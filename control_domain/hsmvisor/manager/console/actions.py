"""What an owner may have done to a material from its page: each is asked for once more before it is carried out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hsmvisor.manager.access.callers import FleetCaller
from hsmvisor.manager.access.owners import is_bound
from hsmvisor.manager.ca.interface import Reason
from hsmvisor.manager.desk import Shown, Work
from hsmvisor.manager.store.rows import RequestRow
from hsmvisor.manager.wanted.asking import Asking
from hsmvisor.serving.errors import Invalid
from sqlalchemy.ext.asyncio import AsyncConnection

REASONS = tuple(map(str, Reason))


@dataclass(frozen=True)
class Action:
    name: str  #: in its path
    method: str  #: of RequestService, by which it is allowed and noted
    title: str
    button: str
    means: tuple[str, ...]  #: what happens, in sentences
    done: str
    fields: frozenset[str] = frozenset({"resource", "why"})
    severe: bool = False


ACTIONS = {
    action.name: action
    for action in (
        Action(
            "rotate",
            "Rotate",
            "Rotate",
            "Rotate now",
            (
                "A new generation is made now: a new key, or a new certificate for the same key where the rule of renewal says so.",
                "The old generation goes on for those who use it, until its drain ends. Nothing in the guests restarts.",
            ),
            "A new generation is asked for.",
            frozenset({"resource", "why", "revoke"}),
        ),
        Action(
            "rotate-urgently",
            "Rotate",
            "Rotate urgently",
            "Rotate urgently now",
            (
                "For a key that somebody may know: a new key is made, the old one ends as soon as the new one serves, "
                "and the old certificate is revoked.",
                "Connections that still use the old key are not waited for.",
            ),
            "An urgent new generation is asked for; the old certificate is revoked.",
            frozenset({"resource", "why", "reason"}),
            severe=True,
        ),
        Action(
            "roll-back",
            "RollBack",
            "Roll back",
            "Roll back now",
            ("The generation before serves again, everywhere. The one that serves now is not used any more.",),
            "The generation before serves again.",
            severe=True,
        ),
        Action(
            "activate",
            "Activate",
            "Activate",
            "Activate now",
            ("What is staged serves from now on. Modules that do not have it yet get it when they can be reached.",),
            "What is staged is activated.",
            frozenset({"resource"}),
        ),
        Action(
            "revoke",
            "Revoke",
            "Revoke",
            "Revoke the certificate",
            (
                "The authority revokes the certificate, for good. Whoever checks for that does not accept it any more.",
                "One that serves is replaced by a new generation with a new key.",
            ),
            "The certificate is revoked.",
            frozenset({"resource", "why", "reason", "generation"}),
            severe=True,
        ),
        Action(
            "cancel",
            "Cancel",
            "Cancel the request",
            "Cancel the request",
            (
                "Nothing is renewed any more, and what was delivered is taken away: services that use it stop working.",
                "Keep what was delivered, and it stays, but is not renewed.",
            ),
            "The request is cancelled.",
            frozenset({"why", "keep"}),
            severe=True,
        ),
    )
}


def offered(shown: Shown) -> list[Action]:
    """Returns what makes sense as things are; whether it is possible is said when it is carried out."""
    names = []
    if shown.row.state == "active" and shown.lines:
        names += ["rotate", "rotate-urgently"]
        if any(row.state == "issued" and not row.released for row in shown.generations):
            names.append("activate")
        serving = {line.id: line.serving for line in shown.lines}
        if any(row.state == "superseded" and row.number < serving[row.line_id] and not row.revoked_at for row in shown.generations):
            names.append("roll-back")
    if revocable(shown):
        names.append("revoke")
    if shown.row.state == "active":
        names.append("cancel")
    return [ACTIONS[name] for name in names]


def revocable(shown: Shown) -> list[int]:
    """Returns the generations that have a certificate which is not revoked, newest first."""
    return sorted({row.number for row in shown.generations if row.serial and not row.revoked_at}, reverse=True)


def work(
    action: Action, asking: Asking, form: Mapping[str, str], why: str, who: FleetCaller, now: float
) -> tuple[Work, dict[str, Any]]:
    """Returns what is carried out, and what the audit log says of it.  Raises Invalid."""
    by, bound = who.name, is_bound(who)
    resource, reason = form.get("resource", ""), form.get("reason", "")
    match action.name:
        case "rotate" | "rotate-urgently":
            urgent = action.name == "rotate-urgently"
            revoke = urgent or bool(form.get("revoke"))

            async def rotate(connection: AsyncConnection, row: RequestRow) -> None:
                await asking.rotate(connection, row, resource, urgent, revoke, reason, by, why, bound)

            return rotate, {"urgent": urgent, "revoke": revoke}
        case "activate":

            async def activate(connection: AsyncConnection, row: RequestRow) -> None:
                await asking.activate(connection, row, resource)

            return activate, {}
        case "roll-back":

            async def roll_back(connection: AsyncConnection, row: RequestRow) -> None:
                await asking.roll_back(connection, row, resource, why, by, now)

            return roll_back, {"resource": resource}
        case "revoke":
            number = _number(form.get("generation", ""))

            async def revoke_one(connection: AsyncConnection, row: RequestRow) -> None:
                await asking.revoke(connection, row, resource, number, reason, by, why, bound)

            return revoke_one, {"generation": number}
        case _:
            keep = bool(form.get("keep"))

            async def cancel(connection: AsyncConnection, row: RequestRow) -> None:
                await asking.cancel(connection, row, keep, why, by, bound)

            return cancel, {"keep": keep}


def _number(untrusted_text: str) -> int:
    """Empty: the generation that serves."""
    if not untrusted_text:
        return 0
    if not (untrusted_text.isascii() and untrusted_text.isdigit() and len(untrusted_text) < 9):
        raise Invalid("GENERATION", "a generation is a number")
    return int(untrusted_text)
