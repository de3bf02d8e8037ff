"""The launcher that dies before a chosen step (support.steps), and whose workers do.  Run as a module, as hsmvisord."""

from __future__ import annotations

import os

from hsmvisord.confined import forking, link
from hsmvisord.keystore.keystore import Keystore
from hsmvisord.launcher import main as launcher
from hsmvisord.worker import succession, tpm_keys
from support.steps import Stepper, type_of


def instrument() -> None:
    stepper = Stepper("launcher")
    os.register_at_fork(after_in_child=lambda: stepper.become("worker"))
    stepper.before(forking.Launcher, "_serve", lambda self, frame: f"takes {type_of(frame.payload)}")
    stepper.after(forking.Launcher, "_serve", "after its answer")
    stepper.before(link.Link, "_send", lambda self, sock, frame, descriptors: f"sends {type_of(frame.payload)}")
    stepper.before(link.Link, "_take", lambda self, sock, frame: f"takes {type_of(frame.payload)}")
    stepper.before(succession.Stream, "send", lambda self, record, *descriptors: f"gives {record.TYPE} to its successor")
    stepper.before(succession.Stream, "_decoded", lambda self, payload: f"takes {type_of(payload)} from its predecessor")
    stepper.before(tpm_keys, "_ask", lambda sock, question: f"asks its TPM {question.TYPE}", "worker")
    stepper.before(Keystore, "_tell", lambda self, before: "its state is swapped", "worker")  # not the rehearsal's


if __name__ == "__main__":
    instrument()
    launcher.main()
