"""A request that was answered, as the plan of a lane: what must be the same in the next one for all that was checked to hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.crypto.interface import PrivateKey
from hsmvisord.face.caller import Caller
from hsmvisord.lanes.lanes import Plan
from hsmvisord.token.info import MANAGED_SLOT
from hsmvisord.token.statistics import Cell
from hsmvisord.wire.calls import Call, Request
from hsmvisord.wire.frames import HEADER

_AROUND = 38  #: bytes of a SignOnce without parameter around its data (wire/native.py)
HEAD = 34  #: of them before it
_ID = 4


@dataclass(frozen=True)
class Prepared:
    plan: Plan
    cell: Cell


def prepare(caller: Caller, request: Request, message: bytes) -> Prepared | None:
    """Returns None when a lane cannot do it.  The gates are taken before what they stand for is looked at."""
    application, token = caller.application_or_none, caller.token
    gate = token.gate
    if application is None or request.call is not Call.SIGN_ONCE or token.on_signature is not None or token.settings.policy.rate:
        return None
    if caller.parked:  # their replies would come between those of the lane
        return None
    handle, mechanism, key, data, room = request.args
    session = application.sessions.get(handle)
    if session is None or data is None or len(message) != _AROUND + len(data):
        return None
    with session.lock:
        session_gate = session.gate()
        if application.sessions.get(handle) is not session or "sign" in session.operations or session.slot != MANAGED_SLOT:
            return None
        try:
            use = application.key(key)
            token.check(mechanism, use.allowed, use.private.kind, ck.CKF_SIGN)
        except CkError:
            return None
    try:
        lane_key = cast(PrivateKey, use.private).lane_key(mechanism) if use.may_sign else None
    except MemoryError:
        return None
    if lane_key is None or len(data) not in lane_key.sizes or room is None or room < lane_key.size:
        return None
    reply = caller.codec.reply(request, bytes(lane_key.size))
    plan = Plan(
        key=lane_key,
        gates=(gate, session_gate),
        head=HEADER.pack(0, 0, len(message))[_ID:] + message[:HEAD],
        data_size=len(data),
        tail=message[HEAD + len(data) :],
        reply_head=reply[_ID : -lane_key.size],
        refuse_after=use.refuse_after,
    )
    return Prepared(plan, caller.counters.cell("sign", mechanism.type, use.generation))
