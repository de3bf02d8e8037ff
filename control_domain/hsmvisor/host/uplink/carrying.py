"""Commands of the manager on their way to modules: in order for one module, several modules at a time.

A command is carried out under its own id as request id, so one that is given twice, also after a restart, is carried out once.
Its result is kept until an exchange that carried it was answered.  What is not decided (the storage is away, a worker is being
started) is told so, and tried again here for a while, with what is behind it waiting; then the manager has to give it again.

What is asked of a guest's boot is answered beside them, a few at a time: no command waits for a TPM, nor a TPM for a command.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import grpc
from hsmvisor.host import limits, reports
from hsmvisor.host.commands import Commands
from hsmvisor.host.modules import Modules
from hsmvisor.host.uplink.attesting import attest
from hsmvisor.host.uplink.told import Given, Result
from hsmvisor.serving import errors
from hsmvisor.serving.errors import ServiceError
from hsmvisor.serving.limits import MAX_REQUEST_ID
from hsmvisor.serving.requests import Origin
from hsmvisor.serving.text import clean
from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.sealed.canonical import MalformedRecord
from hsmvisor_rpc.sealed.commands import Action, Command, SignedCommand

_log = logging.getLogger(__name__)

_AT_ONCE = 8  #: modules,
_ATTESTED_AT_ONCE = 4  #: and TPMs
_STATUS_WITHIN = 2.0  #: seconds
_ATTEMPTS = 10  #: of what is not decided, after the first one: for about 20 s
_REST, _LONGEST_REST = 0.1, 5.0  #: seconds between them


@dataclass
class _Lane:
    """One module's, or its TPM's."""

    waiting: deque[Given] = field(default_factory=deque)
    task: asyncio.Task[None] | None = None


class Carrying:
    def __init__(self, commands: Commands, modules: Modules, origin: Callable[[], Origin], news: asyncio.Event) -> None:
        """`news` is set whenever there is a result."""
        self._commands, self._modules, self._origin, self._news = commands, modules, origin, news
        self._lanes: dict[tuple[str, bool], _Lane] = {}  #: by module, and whether it is its TPM's
        self._known: set[str] = set()  #: ids of what waits or runs
        self._results: dict[str, Result] = {}
        self._gates = {False: asyncio.Semaphore(_AT_ONCE), True: asyncio.Semaphore(_ATTESTED_AT_ONCE)}

    @property
    def count(self) -> int:
        """Of what waits or runs."""
        return len(self._known)

    def take(self, given: Iterable[Given]) -> int:
        """Returns how many of them are new; the others are being carried out, or are too many and have to be given again."""
        fresh = 0
        for command in given:
            if command.id in self._known or (command.id in self._results and not self._results[command.id].again):
                continue
            if not 1 <= len(command.id) <= MAX_REQUEST_ID or len(self._known) >= limits.MAX_COMMANDS:
                continue
            whose = (command.module, bool(command.attest))
            lane = self._lanes.setdefault(whose, _Lane())
            lane.waiting.append(command)
            self._known.add(command.id)
            fresh += 1
            if lane.task is None:
                lane.task = asyncio.get_running_loop().create_task(self._carry_out_all(whose, lane))
        return fresh

    async def _carry_out_all(self, whose: tuple[str, bool], lane: _Lane) -> None:
        undecided = 0
        while lane.waiting:
            async with self._gates[whose[1]]:
                result = await self._carry_out(lane.waiting[0])
            self._results[result.id] = result
            self._news.set()
            if result.again and undecided < _ATTEMPTS:
                await asyncio.sleep(min(_REST * 2.0**undecided, _LONGEST_REST))
                undecided += 1
                continue
            # what is behind one that is given up waits for it, for the sake of their order
            done = list(lane.waiting) if result.again else [lane.waiting[0]]
            undecided = 0
            for command in done:
                lane.waiting.popleft()
                self._known.discard(command.id)
        del self._lanes[whose]

    async def _carry_out(self, command: Given) -> Result:
        if command.attest:
            return await attest(self._modules, command)
        try:
            name = limits.module_name(command.module)
            done = await self._commands.execute(self._origin(), command.id, name, command.command)
            return told(command.id, done)
        except ServiceError as error:
            again = errors.code(error) is grpc.StatusCode.UNAVAILABLE
            refused = Result(command.id, reason=error.reason, detail=clean(error.detail), again=again)
        except Exception as error:
            _log.exception("command %s for module %s failed", clean(command.id), clean(command.module))
            refused = Result(command.id, reason="INTERNAL", detail=f"an error inside the host service: {type(error).__name__}")
        return refused if refused.again else await self._with_status(command, refused)

    async def _with_status(self, command: Given, refused: Result) -> Result:
        """Whoever was refused would know the sequence number that the module is at, and which generations there are and were."""
        try:
            async with asyncio.timeout(_STATUS_WITHIN):
                status = await self._modules.get(command.module).status()
            name = Command.decode(SignedCommand.decode(command.command).payload).material
        except (ServiceError, TimeoutError):
            return refused
        except MalformedRecord:
            return replace(refused, sequence=status.sequence)
        material = next((row for row in status.materials if row.name == name), None)
        return replace(refused, sequence=status.sequence, material=material)

    # ---- results --------------------------------------------------------------------------------------------------

    def results(self) -> tuple[Result, ...]:
        return tuple(list(self._results.values())[: limits.MAX_RESULTS])

    def confirm(self, results: Iterable[Result]) -> None:
        """The manager has them, unless there is another one by now."""
        for result in results:
            if self._results.get(result.id) is result:
                del self._results[result.id]

    async def stop(self) -> None:
        """What is being carried out goes on without us, and is told when it is given again."""
        tasks = [lane.task for lane in self._lanes.values() if lane.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def told(id: str, done: m.Executed) -> Result:
    """Returns what the manager is told of a command that was carried out."""
    material = reports.material(reports.parse(done.report))
    result = Result(id, done=True, sequence=done.sequence, material=material)
    if done.action != Action.GENERATE:
        return result
    public = next((g.public_key for g in material.generations if g.number == done.generation), b"")
    return replace(result, public_key=public, csr=reports.csr(material, done.generation))
