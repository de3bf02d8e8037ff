"""Pages of a list that is sorted by name: a token names the last item of the page before."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from hsmvisor.serving import limits
from hsmvisor.serving.errors import Invalid

T = TypeVar("T")


def page(items: Iterable[T], name: Callable[[T], str], untrusted_size: int, untrusted_token: str) -> tuple[list[T], str]:
    """Returns one page and the token of the next ("" = no more).  An item that came or went between two pages does no harm."""
    size = limits.page_size(untrusted_size)
    after = after_token(untrusted_token)
    rest = sorted((i for i in items if name(i) > after), key=name)
    chosen = rest[:size]
    return chosen, next_token(name(chosen[-1])) if len(rest) > size else ""


def asked(untrusted_size: int, untrusted_token: str) -> tuple[int, str]:
    """Returns how many items are wanted, and the name after which they begin: of a list that a database sorts and cuts."""
    return limits.page_size(untrusted_size), after_token(untrusted_token)


def cut(items: Sequence[T], size: int, name: Callable[[T], str]) -> tuple[Sequence[T], str]:
    """`items` are one more than `size` where there are more.  Returns the page and the token of the next."""
    return items[:size], next_token(name(items[size - 1])) if len(items) > size else ""


def next_token(name: str) -> str:
    """For a list that a database has cut: the token that names the last item of a page."""
    return base64.urlsafe_b64encode(name.encode()).decode()


def after_token(untrusted_token: str) -> str:
    """Returns the name behind which a page begins.  Raises Invalid."""
    try:
        return base64.b64decode(untrusted_token, altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeDecodeError, ValueError):
        raise Invalid("PAGE_TOKEN", "page_token is not one that was given here") from None
