"""The key provider that dies before a chosen step (support.steps).  Run as a module, as hsmvisord-keyprovider."""

from __future__ import annotations

from hsmvisord.keyprovider import main as provider
from support.steps import Stepper, type_of


def instrument() -> None:
    stepper = Stepper("key provider")
    stepper.before(provider.KeyProvider, "_serve", lambda self, frame: f"takes {type_of(frame.payload)}")
    stepper.before(provider.KeyProvider, "_derive", lambda self, message: "derives a key")
    stepper.after(provider.KeyProvider, "_serve", "before its answer")


if __name__ == "__main__":
    instrument()
    provider.main()
