"""Our own C libraries: built beside the module that opens them, one for each Python; there is no Python in them."""

from __future__ import annotations

import sysconfig
from pathlib import Path


def library(module: str, name: str) -> Path:
    """Returns the file of the library `name` beside `module` (its __file__) that is of this Python.  Raises ImportError, whose
    text says how to build it."""
    built = Path(module).with_name(name + sysconfig.get_config_var("EXT_SUFFIX"))
    if not built.exists():
        raise ImportError(f"{built} is not built: run scripts/setup, or pip install (it needs gcc and libssl-dev)")
    return built
