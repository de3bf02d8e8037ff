"""The host service that dies before a chosen step (support.steps), with helpers that do.  Run as a module, as hsmvisor-host."""

from __future__ import annotations

from typing import Any

from hsmvisor import environment
from hsmvisor.host import database, link, module, pauses
from hsmvisor.host.main import main
from hsmvisor.serving import events
from hsmvisor.serving.audit import Audit
from hsmvisor.spawned import Spawned
from support.steps import VARIABLE, Stepper, type_of

HELPERS = {
    "hsmvisord.launcher.main": "support.stepping_launcher",
    "hsmvisord.keyprovider.main": "support.stepping_key_provider",
    "hsmvisord.hsm.main": "support.stepping_hsm",
    "hsmvisord.tpm.launcher": "support.stepping_tpm_launcher",
}


def instrument() -> None:
    stepper = Stepper("supervisor")
    stepper.before(link.Link, "_send", lambda self, frame, descriptors: f"sends {type_of(frame.payload)}")
    stepper.before(link.Link, "_take", lambda self, frame: f"takes {type_of(frame.payload)}")
    stepper.before(database, "transaction", lambda connection: "a transaction")
    stepper.before(Audit, "_write", lambda self, lines: "a write to the audit log")
    stepper.after(Audit, "_write", "after a write to the audit log")


if __name__ == "__main__":
    events._STORE_EVERY = 3600.0  # each transaction belongs to an action
    module._DEATHS = 10_000  # many deaths are the purpose
    pauses.QUICK = pauses.QUICK[:1] * module._DEATHS  # and each is as the first one
    environment._INHERITED = (*environment._INHERITED, VARIABLE)
    spawn = Spawned.__init__

    def spawned(self: Spawned, name: str, *arguments: Any) -> None:
        spawn(self, HELPERS[name], *arguments)

    Spawned.__init__ = spawned  # type: ignore[method-assign]
    instrument()
    main()
