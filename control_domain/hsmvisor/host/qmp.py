"""A client of QEMU's monitor protocol (QMP): JSON objects, one a line, on a unix socket.  One command at a time, events kept.

Nothing is sent before the other end has greeted as QEMU does, and nothing that it says is trusted: lines, waiting times and kept
events are bounded, texts are cleaned before they are shown.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

from hsmvisor.host import limits
from hsmvisor.serving.errors import Invalid, ServiceError, WrongState
from hsmvisor.serving.text import clean

Json = dict[str, Any]

_GREETING_WITHIN = 5.0  #: seconds
_ANSWER_WITHIN = 10.0  #: seconds
_SECOND = "QEMU speaks with one client at a time: end the other one, or give QEMU a second -qmp unix:PATH,server=on,wait=off"


class QemuGone(WrongState):
    """Nobody listens at the socket: there is no such QEMU, or not any more."""


class QemuSilent(WrongState):
    """QEMU does not answer; what it was asked may be done yet."""


class QmpError(WrongState):
    """QEMU refuses a command; `kind` is QMP's class of the error, `said` QEMU's own words."""

    def __init__(self, command: str, kind: str, said: str) -> None:
        super().__init__("QEMU", f"QEMU refuses {command}: {said}", "see QEMU's own log for more")
        self.kind, self.said = kind, said


class Qmp:
    """A connection that has been greeted; made by connect()."""

    def __init__(self, path: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.path, self._reader, self._writer = path, reader, writer
        self._ids = itertools.count(1)
        self._events: deque[Json] = deque(maxlen=limits.QMP_EVENTS)
        self.version = ""  #: of QEMU

    async def execute(self, command: str, within: float = _ANSWER_WITHIN, **arguments: Any) -> Any:
        """Returns what QEMU returns.  Raises QmpError when it refuses, WrongState when it is gone or does not answer."""
        ident = next(self._ids)
        line = json.dumps({"execute": command, "arguments": arguments, "id": ident}) + "\n"
        try:
            async with asyncio.timeout(within):
                await self._send(line.encode())
                answer = await self._answer(ident)
        except TimeoutError:
            raise QemuSilent(
                "QEMU_SILENT", f"QEMU at {self.path} did not answer {command} within {within:g} s", "see QEMU's own log"
            ) from None
        if "error" in answer:
            kind, said = _error(answer["error"])
            raise QmpError(command, kind, said)
        return answer.get("return")

    async def event(self, fits: Callable[[str, Json], bool], within: float) -> str:
        """Returns the name of the next event that fits, also of one that came before.  Raises TimeoutError, WrongState."""
        async with asyncio.timeout(within):
            while True:
                while self._events:
                    found = self._events.popleft()
                    data = found.get("data")
                    if fits(name := str(found["event"]), data if isinstance(data, dict) else {}):
                        return name
                self._keep(await self._receive())

    def forget_events(self) -> None:
        self._events.clear()

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    # ---- lines --------------------------------------------------------------------------------------------------

    async def greet(self) -> None:
        """Raises WrongState when what listens there is not QEMU's monitor or is busy."""
        try:
            async with asyncio.timeout(_GREETING_WITHIN):
                greeting = await self._receive()
        except TimeoutError:
            raise WrongState(
                "QMP_BUSY", f"{self.path} accepts, but does not greet within {_GREETING_WITHIN:g} s", _SECOND
            ) from None
        if not isinstance(greeting.get("QMP"), dict):
            raise self._not_qmp()
        self.version = _version(greeting["QMP"])
        await self.execute("qmp_capabilities")

    async def _send(self, line: bytes) -> None:
        try:
            self._writer.write(line)
            await self._writer.drain()
        except OSError:
            raise self._gone() from None

    async def _answer(self, ident: int) -> Json:
        """Returns the reply to command `ident`; a reply to one that was given up is passed over."""
        while True:
            message = await self._receive()
            if "event" in message:
                self._keep(message)
            elif ("return" in message or "error" in message) and message.get("id") in (ident, None):
                return message  # without an id: QEMU could not read the command at all
            elif not isinstance(message.get("id"), int):
                raise self._not_qmp()

    def _keep(self, message: Json) -> None:
        if isinstance(message.get("event"), str):
            self._events.append(message)

    async def _receive(self) -> Json:
        try:
            line = await self._reader.readline()
        except ValueError:  # longer than the reader's limit
            raise WrongState("QMP", f"{self.path} sends a line of more than {limits.MAX_QMP_LINE} bytes", "is it QEMU's?") from None
        except OSError:
            raise self._gone() from None
        if not line.endswith(b"\n"):
            if line:
                raise self._not_qmp()
            raise self._gone()
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            raise self._not_qmp() from None
        if not isinstance(message, dict):
            raise self._not_qmp()
        return message

    def _gone(self) -> ServiceError:
        return QemuGone("QEMU_GONE", f"QEMU at {self.path} has closed the connection", "has the guest ended? see QEMU's log")

    def _not_qmp(self) -> ServiceError:
        return WrongState(
            "NOT_QMP",
            f"what listens at {self.path} is not QEMU's QMP",
            "give the path of -qmp unix:PATH,server=on,wait=off: not the human monitor's (-monitor), not a console's",
        )


@contextlib.asynccontextmanager
async def connect(path: str) -> AsyncIterator[Qmp]:
    """Connects to the QMP socket at `path`; raises Invalid, WrongState (QemuGone: nobody listens)."""
    limits.qmp_path(path)
    try:
        reader, writer = await asyncio.open_unix_connection(path, limit=limits.MAX_QMP_LINE - 1)  # without the end of the line
    except FileNotFoundError:
        hint = "start QEMU with -qmp unix:PATH,server=on,wait=off; the service sees neither /tmp nor /home (hsmvisor-host.service)"
        raise QemuGone("QEMU_GONE", f"there is no socket {path}", hint) from None
    except ConnectionRefusedError:
        raise QemuGone("QEMU_GONE", f"nobody listens at {path}: that QEMU has ended", "start the guest, then try again") from None
    except PermissionError:
        hint = "the host service's user must be able to write to it: run the service as root, or QEMU as the service's user"
        raise WrongState("QMP", f"{path} may not be used by the host service", hint) from None
    except BlockingIOError:  # its backlog is full
        raise WrongState("QMP_BUSY", f"{path} has too many clients that wait", _SECOND) from None
    except OSError as error:
        hint = "give the path of QEMU's -qmp unix:PATH,server=on,wait=off"
        raise Invalid("QMP_PATH", f"{path}: {os.strerror(error.errno or 0)}", hint) from None
    qmp = Qmp(path, reader, writer)
    try:
        await qmp.greet()
        yield qmp
    finally:
        await qmp.close()


def _version(greeting: Json) -> str:
    try:
        numbers = greeting["version"]["qemu"]
        return ".".join(str(int(numbers[part])) for part in ("major", "minor", "micro"))
    except (KeyError, TypeError, ValueError):
        return "?"


def _error(untrusted: Any) -> tuple[str, str]:
    values = untrusted if isinstance(untrusted, dict) else {}
    return clean(str(values.get("class", ""))), clean(str(values.get("desc", "no reason given")))
