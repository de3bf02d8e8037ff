"""The token objects of slot 1 as an immutable value in pages: a change makes one page anew, a search asks each page's own index.

An object is on the page `handle % PAGES`.  Handles rise by one, so pages fill evenly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hsmvisord import ck
from hsmvisord.crypto.interface import AnyKey

PAGES = 128
#: What pages are searched by, most telling first.
INDEXED = (ck.CKA_UNIQUE_ID, ck.CKA_LABEL, ck.CKA_ID, ck.CKA_CLASS)

_Found = dict[tuple[int | None, Any], list[int]]
_ALL = (None, None)  #: in the place of an attribute and its value


@dataclass(frozen=True)
class GuestObject:
    """A token object of slot 1.  `key` stands for the parts of a key, which `attributes` do not hold."""

    handle: int
    attributes: Mapping[int, Any] = field(repr=False)
    key: AnyKey | None = field(repr=False)
    size: int  #: bytes that it counts


class Page:
    """Some objects by handle; never changed, but for the index, which is made when first asked for."""

    __slots__ = ("_index", "items")

    def __init__(self, items: Mapping[int, GuestObject]) -> None:
        self.items = items
        self._index: tuple[_Found, _Found] | None = None

    def index(self) -> tuple[_Found, _Found]:
        """Handles by attribute and value: of public objects, of private ones."""
        found = self._index
        if found is None:
            found = self._index = self._made()
        return found

    def _made(self) -> tuple[_Found, _Found]:
        made: tuple[_Found, _Found] = ({}, {})
        for handle, item in self.items.items():
            one = made[bool(item.attributes.get(ck.CKA_PRIVATE))]
            one.setdefault(_ALL, []).append(handle)
            for kind in INDEXED:
                if kind in item.attributes:
                    one.setdefault((kind, item.attributes[kind]), []).append(handle)
        return made


_EMPTY = Page({})


class Objects(Mapping[int, GuestObject]):
    """All of them, by handle."""

    __slots__ = ("_count", "_filled", "pages", "size")

    def __init__(self, pages: tuple[Page, ...] = (_EMPTY,) * PAGES, count: int = 0, size: int = 0) -> None:
        """`size`: bytes that they count."""
        self.pages, self._count, self.size = pages, count, size
        self._filled = tuple(page for page in pages if page.items)

    @classmethod
    def of(cls, items: Iterable[GuestObject]) -> Objects:
        return cls().with_items(items)

    def with_items(self, items: Iterable[GuestObject]) -> Objects:
        """Returns these with some more, or with others in the place of those that have their handles."""
        fresh: dict[int, dict[int, GuestObject]] = {}
        count, size = self._count, self.size
        for item in items:
            page = item.handle % PAGES
            into = fresh.get(page)
            if into is None:
                into = fresh[page] = dict(self.pages[page].items)
            before = into.get(item.handle)
            count += before is None
            size += item.size - (before.size if before is not None else 0)
            into[item.handle] = item
        return self._with_pages(fresh, count, size)

    def without(self, handle: int) -> Objects:
        page = handle % PAGES
        rest = dict(self.pages[page].items)
        item = rest.pop(handle)
        return self._with_pages({page: rest}, self._count - 1, self.size - item.size)

    def _with_pages(self, fresh: Mapping[int, Mapping[int, GuestObject]], count: int, size: int) -> Objects:
        pages = list(self.pages)
        for number, items in fresh.items():
            pages[number] = Page(items) if items else _EMPTY
        return Objects(tuple(pages), count, size)

    def __getitem__(self, handle: int) -> GuestObject:
        return self.pages[handle % PAGES].items[handle]

    def __contains__(self, handle: object) -> bool:
        return isinstance(handle, int) and handle in self.pages[handle % PAGES].items

    def __iter__(self) -> Iterator[int]:
        for page in self._filled:
            yield from page.items

    def __len__(self) -> int:
        return self._count

    def having(self, kind: int | None, value: Any, private: bool) -> list[int]:
        """Returns the handles of the objects, private ones or the others, with this value of an INDEXED attribute (`kind` None: of
        all); in no order."""
        wanted, found = (kind, value), list[int]()
        for page in self._filled:
            some = page.index()[private].get(wanted)
            if some is not None:
                found += some
        return found
