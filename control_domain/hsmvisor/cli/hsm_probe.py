"""Looks at the tokens of a PKCS#11 library without a login: a process of its own, for the library is the maker's.

python -m hsmvisor.cli.hsm_probe LIBRARY prints the tokens' labels as a JSON array, or {"error": text} and ends with 1.
"""

from __future__ import annotations

import json
import sys


def labels(library: str) -> list[str]:
    """Raises ImportError, and what python-pkcs11 raises."""
    import pkcs11

    return [slot.get_token().label for slot in pkcs11.lib(library).get_slots(token_present=True)]


def main() -> None:
    try:
        print(json.dumps(labels(sys.argv[1])))
    except ImportError:
        sys.exit(_failed("python-pkcs11 is not installed: pip install python-pkcs11"))
    except Exception as error:  # of any library
        sys.exit(_failed(f"{type(error).__name__} {error}".strip()))


def _failed(why: str) -> int:
    print(json.dumps({"error": why[:200]}))
    return 1


if __name__ == "__main__":
    main()
