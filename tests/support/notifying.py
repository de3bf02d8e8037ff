"""A notifier in a process of its own.  usage: python -m support.notifying JSON, an object of url, notify, lease and die.

`die`: it kills itself after the first notice was sent, before that is marked.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from typing import Any

from hsmvisor.manager.history.events import History
from hsmvisor.manager.notify import notices
from hsmvisor.manager.notify.notifier import Notifier
from hsmvisor.manager.store.database import Database
from support.channels import channels


async def run(told: Any) -> None:
    database, made = Database(told["url"]), channels(told["notify"])
    await Notifier(database, History(database, made), made, lease=told["lease"]).run()


async def die(*arguments: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    if settings["die"]:
        notices.delivered = die
    asyncio.run(run(settings))
