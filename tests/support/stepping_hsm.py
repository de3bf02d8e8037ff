"""The helper of a module with an HSM that dies before a chosen step (support.steps).  Run as a module, as hsmvisord-hsm."""

from __future__ import annotations

from hsmvisord.hsm import main as helper
from hsmvisord.hsm.hardware import Hardware
from hsmvisord.hsm.service import Service
from support.steps import Stepper, type_of


def instrument() -> None:
    stepper = Stepper("hsm helper")
    stepper.before(Hardware, "_log_in", lambda self: "logs in")
    stepper.before(helper.Helper, "_serve", lambda self, frame: f"takes {type_of(frame.payload)}")
    stepper.after(helper.Helper, "_serve", "before its answer")
    stepper.before(Service, "_ask", lambda self, question: f"is asked {question.TYPE}")
    stepper.after(Service, "_ask", "before what it answers")
    stepper.before(Hardware, "destroy", lambda self, name: "destroys a key")


if __name__ == "__main__":
    instrument()
    helper.main()
