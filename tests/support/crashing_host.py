"""The host service with a place to die: HSMVISOR_CRASH="module:Class.method:before|after" kills it there by SIGKILL;
"after3" after the third call.

HSMVISOR_CRASH_ARMED_BY names a file without which it goes on.  Run as a module, with the arguments of hsmvisor-host.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import os
import signal
from typing import Any


def _die() -> None:
    if (flag := os.environ.get("HSMVISOR_CRASH_ARMED_BY")) and not os.path.exists(flag):
        return  # not yet
    os.kill(os.getpid(), signal.SIGKILL)


def arm(place: str) -> None:
    module, name, moment = place.split(":")
    wanted, number = moment.rstrip("0123456789"), int(moment.lstrip("abcdefghijklmnopqrstuvwxyz") or 1)
    calls = itertools.count(1)
    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    real = getattr(owner, last)
    assert inspect.isfunction(real), place

    async def dying(*arguments: Any, **options: Any) -> Any:
        is_due = next(calls) >= number
        if is_due and wanted == "before":
            _die()
        result = await real(*arguments, **options)
        if is_due:
            _die()
        return result

    def dying_at_once(*arguments: Any, **options: Any) -> Any:
        is_due = next(calls) >= number
        if is_due and wanted == "before":
            _die()
        result = real(*arguments, **options)
        if is_due:
            _die()
        return result

    setattr(owner, last, dying if inspect.iscoroutinefunction(real) else dying_at_once)


if __name__ == "__main__":
    if place := os.environ.get("HSMVISOR_CRASH"):
        arm(place)
    from hsmvisor.host.main import main

    main()
