"""Values that options take, beyond what click knows."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import click
import grpc
from click.shell_completion import CompletionItem
from hsmvisor.client import connect
from hsmvisor.host.config import SOFTWARE
from hsmvisor_rpc.internal import mechanisms
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisor_rpc.v1 import hsmvisor_pb2_grpc as rpc

_COMPLETE_WITHIN = 2.0  #: seconds
MAX_DURATION = 2**32 - 1  #: seconds, as messages have them
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds(text: str) -> int | None:
    """Returns what a duration such as 90, 90s, 30m, 2h or 7d is; None: it is none."""
    found = re.fullmatch(r"([0-9]{1,12})([smhd]?)", text)
    return int(found[1]) * _UNITS[found[2]] if found else None


def duration(value: int) -> str:
    """Writes seconds as people do, in the largest unit that fits."""
    unit = next((unit for unit in "dhm" if value and value % _UNITS[unit] == 0), "s")
    return f"{value // _UNITS[unit]}{unit}"


class Duration(click.ParamType[int]):
    """Seconds, or a number with s, m, h or d."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = seconds(str(value))
        if found is None:
            self.fail(f"{value!r} is no duration: 90, 30m, 2h or 7d", param, ctx)
        if found > MAX_DURATION:
            self.fail(f"{value!r} is more than {MAX_DURATION // 86400} days", param, ctx)
        return found


class HexBytes(click.ParamType[bytes]):
    """`size`: so many bytes and no other number; 0 = any."""

    name = "hex"

    def __init__(self, size: int = 0) -> None:
        self._size = size

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        try:
            found = value if isinstance(value, bytes) else bytes.fromhex(value)
        except ValueError:
            self.fail(f"{value!r} is not hexadecimal", param, ctx)
        if self._size and len(found) != self._size:
            self.fail(f"{self._size} bytes in hexadecimal are wanted, these are {len(found)}", param, ctx)
        return found


class CryptoprocessorName(click.ParamType[str]):
    """`software`, or an HSM by its name in the host's configuration, which the host knows."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Asks a host that is reached by its unix socket."""
        names = [SOFTWARE]
        address = str(ctx.find_root().params.get("address", ""))
        if address.startswith("unix:"):
            with contextlib.suppress(grpc.RpcError, ValueError, OSError), connect(address) as channel:
                told = rpc.HostServiceStub(channel).GetHost(pb.GetHostRequest(), timeout=_COMPLETE_WITHIN)
                names += [hsm.name for hsm in told.hsms]
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


class MechanismName(click.ParamType[str]):
    """A mechanism of PKCS#11, with CKM_ or without, as pkcs11-tool writes it or as the standard does."""

    name = "mechanism"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return mechanisms.named(str(value))
        except ValueError as error:
            self.fail(f"{error}; known are {', '.join(mechanisms.NAMES)}", param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in mechanisms.NAMES if name.startswith(incomplete.upper())]
