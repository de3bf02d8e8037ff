"""What a worker tells of itself, as JSON: status, statistics.  It informs; nothing is decided from it."""

from __future__ import annotations

import base64
import json
from collections import Counter
from typing import Any

from hsmvisord import ck
from hsmvisord.keystore.persistence import Usage
from hsmvisord.keystore.state import Generation, Material, State
from hsmvisord.token.catalogue import Index
from hsmvisord.token.statistics import BOUNDS, Cell, CellKey
from hsmvisord.token.token import Token


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def material_report(state: State, material: Material, usage: Usage, holders: Counter[tuple[str, int]]) -> dict[str, Any]:
    live = next((state.keys[g.key] for g in reversed(material.generations) if g.key), None)
    return {
        "name": material.name,
        "mode": material.mode,
        "profile": material.profile,
        "key_type": live.private.kind.name if live else "",
        "alias_id": material.alias_id.hex(),
        "generations": [_generation(state, material, g, usage, holders) for g in material.generations],
    }


def _generation(state: State, material: Material, g: Generation, usage: Usage, holders: Counter[tuple[str, int]]) -> dict[str, Any]:
    operations, last_used = usage.get((material.name, g.number), (0, 0))
    handles = [h for h in (g.leaf, *g.intermediates) if h]
    request = state.keys[g.key].request if g.key else None
    return {
        "number": g.number,
        "state": str(g.state),
        "id": state.keys[g.key].private.public.key_id.hex() if g.key else "",
        "public_key": _b64(g.public_key),
        "certificates": [_b64(state.certificates[h].der) for h in handles],
        "staged_at": g.staged_at,
        "activated_at": g.activated_at,
        "retired_at": g.retired_at,
        "drain_ends_at": g.drain_ends_at,
        "after_drain": g.after_drain,
        "not_after": Index.not_after(state, g),
        "last_used_at": max(g.last_used_at, last_used),
        "operations": g.operations + operations,
        "connections": holders[material.name, g.number],
        "certificate_only": g.certificate_only,
        "on_expiry": g.on_expiry,
        "drain_seconds": g.drain_seconds,
        "csr": _b64(request.der) if request else "",
    }


def status_report(token: Token, connections: int, measures: list[dict[str, Any]]) -> str:
    state, usage, holders = token.index.state, token.usage(), Counter(token.holders())
    return json.dumps(
        {
            "sequence": state.sequence,
            "watermark": state.watermark,
            "pin_set": bool(state.pin),
            "token_present": state.token_present,
            "connections": connections,
            "sessions": token.sessions,
            "measures": measures,
            "materials": [material_report(state, m, usage, holders) for m in state.materials.values()],
        }
    )


def statistics_report(cells: dict[CellKey, Cell], **more: float) -> str:
    merged: dict[tuple[str, int], Cell] = {}
    for (operation, mechanism, _), cell in cells.items():
        merged.setdefault((operation, mechanism), Cell()).add(cell)
    operations = [
        {
            "operation": operation,
            "mechanism": ck.mechanism_name(mechanism) if mechanism else "",
            "count": cell.count,
            "errors": cell.errors,
            "seconds": cell.seconds,
            "bounds": list(BOUNDS),
            "counts": cell.buckets,
        }
        for (operation, mechanism), cell in sorted(merged.items())
    ]
    return json.dumps({"operations": operations, **more})
