"""The launcher of TPMs that die before a chosen step (support.steps).  Run as a module, as hsmvisord-tpm."""

from __future__ import annotations

import os

from hsmvisord.confined import link
from hsmvisord.tpm import keys, launcher
from hsmvisord.tpm.commands import Commands
from support.steps import Stepper, type_of


def instrument() -> None:
    stepper = Stepper("launcher")
    os.register_at_fork(after_in_child=lambda: stepper.become("tpm"))
    stepper.before(link.Link, "_send", lambda self, sock, frame, descriptors: f"sends {type_of(frame.payload)}", "tpm")
    stepper.before(link.Link, "_take", lambda self, sock, frame: f"takes {type_of(frame.payload)}", "tpm")
    stepper.before(keys.Keys, "_answer", lambda self, sock, question: f"is asked {question.TYPE}", "tpm")
    stepper.after(keys.Keys, "_answer", "before what it answers")
    stepper.before(Commands, "do", lambda self, code, *more: f"says {code.name}", "tpm")  # not the rehearsal's


if __name__ == "__main__":
    instrument()
    launcher.main()
