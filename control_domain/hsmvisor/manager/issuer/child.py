"""One key's process: forked from the issuer, it carries out one call and is gone, and the key with it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from hsmvisor.manager.issuer import calls, sandbox
from hsmvisor.manager.issuer.calls import OverLimit, Trouble
from hsmvisor.manager.issuer.escrow import ProviderFault
from hsmvisor.manager.issuer.keys import BadKey
from hsmvisor.manager.issuer.syscalls import Rules
from hsmvisor_rpc.confine.capabilities import PR_SET_PDEATHSIG, prctl
from hsmvisor_rpc.internal.frames import Frame, Kind, encode_frame
from hsmvisor_rpc.sealed.canonical import MalformedRecord, Record

Tell = Callable[[Record], None]
Work = Callable[[Tell], None]  #: may raise BadKey, ProviderFault, OverLimit, MalformedRecord


def run(ident: int, parent: int, writing: int, asks_token: bool, rules: Rules | None, work: Work) -> NoReturn:
    """In the child, after the fork: tells through `writing` what `work` tells, or the trouble with it, as answers to `ident`."""
    try:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        os.closerange(3, writing)
        os.closerange(writing + 1, os.sysconf("SC_OPEN_MAX"))
        sandbox.enter_child(asks_token, rules)
        _work(ident, writing, work)
        os._exit(0)
    except BaseException as error:
        # Not what it says, nor what it was called with: that may be the key.
        print(f"hsmvisor-manager: issuer: {type(error).__name__} in {_place(error)}", file=sys.stderr, flush=True)
    finally:
        os._exit(1)


def _work(ident: int, writing: int, work: Work) -> None:
    def tell(record: Record) -> None:
        _send(writing, Frame(ident, Kind.REPLY, record.encode()))

    try:
        work(tell)
        return
    except (OverLimit, MalformedRecord) as error:
        trouble = Trouble(calls.BAD, f"the call cannot be: {error}")
    except BadKey as error:
        trouble = Trouble(calls.BAD, str(error))
    except ProviderFault as error:
        trouble = Trouble(calls.LOCKED if error.locked else calls.AWAY, str(error))
    _send(writing, Frame(ident, Kind.ERROR, trouble.encode()))


def _send(writing: int, frame: Frame) -> None:
    data = memoryview(encode_frame(frame))
    while data:
        data = data[os.write(writing, data) :]


def _place(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_qualname}, line {trace.tb_lineno}" if trace else "nowhere"
