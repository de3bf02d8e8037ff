"""One coverage-guided run of one target, in a process of its own: `python -m fuzz.guided TARGET [libFuzzer's words]`."""

from __future__ import annotations

import sys

import atheris
from fuzz import harness

PACKAGES = ["hsmvisord", "hsmvisor", "hsmvisor_rpc"]


def main() -> None:
    name = sys.argv.pop(1)
    with atheris.instrument_imports(include=PACKAGES):
        target = harness.load(name)
    target.seeds()  # makes what all inputs share before the first one is timed
    atheris.Setup(sys.argv, target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
