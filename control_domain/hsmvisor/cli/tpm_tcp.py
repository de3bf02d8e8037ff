"""hsmvisor module tpm-tcp: a module's TPM at two TCP ports of the loopback, for software of the TSS that knows no unix sockets."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
from hsmvisor.cli.context import Command, CommandError, Context, pass_context
from hsmvisor.serving.relay import pump
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb

ADDRESS = "127.0.0.1"
DEFAULT_PORT = 2321  #: of commands, as swtpm's; control is at the next one
MAX_CONNECTIONS = 16  #: at the same time, of both


@click.command("tpm-tcp", cls=Command)
@click.argument("name")
@click.option(
    "--port",
    type=click.IntRange(1, 65534),
    default=DEFAULT_PORT,
    show_default=True,
    help="Of commands; control is at the next one.",
)
@pass_context
def tpm_tcp(ctx: Context, name: str, port: int) -> None:
    """Have the TPM of module NAME at a TCP port of this host's loopback, until Ctrl-C.

    As swtpm's socket mode, without a machine: for software that cannot use the unix sockets which hsmvisor module show names. While
    this runs, everybody who may log in to this host reaches the TPM and its keys: with the unix sockets it is who may open them.

    \b
    Example:
      hsmvisor module tpm-tcp web-1 --port 2321 &
      TPM2TOOLS_TCTI=swtpm:host=127.0.0.1,port=2321 tpm2_getrandom 8 --hex
    """
    state = ctx.modules.GetModule(pb.GetModuleRequest(name=name), timeout=ctx.timeout).tpm
    if not state.socket:
        raise CommandError(f"module {name} is no TPM: hsmvisor module settings {name} --tpm (with its other settings)")
    if state.peer:
        raise CommandError(f"the TPM of module {name} is its machine's ({state.peer}), and nobody else's meanwhile")
    commands = Path(state.tss_path)
    tcti = f"swtpm:host={ADDRESS},port={port}"

    def said() -> None:
        ctx.result({"module": name, "tcti": tcti}, lambda: click.echo(f"TPM2TOOLS_TCTI={tcti}"))

    try:
        asyncio.run(_Carrier().serve({port: commands, port + 1: commands.with_name(f"{commands.name}.ctrl")}, said))
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        raise CommandError(f"the TPM of module {name} at port {port}: {why}") from None
    except KeyboardInterrupt:
        pass  # that is how it ends


class _Carrier:
    """Carries bytes between ports and unix sockets."""

    def __init__(self) -> None:
        self._connections = 0

    async def serve(self, paths: dict[int, Path], serving: Callable[[], None]) -> None:
        """Never returns; `serving` is called once it does.  Raises OSError."""
        for path in paths.values():  # whoever may not open them is told so now
            _, writer = await asyncio.open_unix_connection(path)
            writer.close()
        async with contextlib.AsyncExitStack() as stack:
            for port, path in paths.items():
                await stack.enter_async_context(await asyncio.start_server(partial(self._arrived, path), ADDRESS, port))
            serving()
            await asyncio.Event().wait()

    async def _arrived(self, path: Path, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError):
            if self._connections >= MAX_CONNECTIONS:
                return
            self._connections += 1
            try:
                theirs, to_them = await asyncio.open_unix_connection(path)
                with contextlib.closing(to_them):
                    await asyncio.gather(pump(reader, to_them), pump(theirs, writer))
            finally:
                self._connections -= 1


COMMANDS = (tpm_tcp,)  #: of the group `module`
