"""A service's example configuration: it says each default, and shows each list of tables as a comment."""

from __future__ import annotations

import dataclasses
import tomllib


def demand_all_defaults(text: str, config: object) -> None:
    """Fails where the example `text` leaves out something that the default `config` has."""

    def compare(section: object, told: dict[str, object], where: str) -> None:
        for field in dataclasses.fields(section):  # type: ignore[arg-type]
            value = getattr(section, field.name)
            if dataclasses.is_dataclass(value):
                compare(value, told[field.name], f"{where}{field.name}.")  # type: ignore[arg-type]
            elif value != () or field.name in told:
                assert field.name in told, f"{where}{field.name} is not in the example"
            else:
                assert f"[[{where}{field.name}]]" in text, f"{where}{field.name} is not in the example"

    compare(config, tomllib.loads(text), "")


def uncommented(text: str) -> str:
    """Returns the example with its tables."""
    return "\n".join(line.removeprefix("#") if line.startswith(("#[", "#  ")) else line for line in text.splitlines())
