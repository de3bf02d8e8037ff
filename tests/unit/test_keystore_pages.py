"""Slot 1 in the sealed state, page by page: a change writes what it changes, and no page is mixed, missing or of another time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hsmvisord import ck
from hsmvisord.keystore import persistence
from hsmvisord.keystore.keystore import StorageError
from hsmvisord.keystore.pages import PAGES
from hsmvisord.keystore.persistence import SealedChange
from hsmvisord.keystore.records import MetaRecord, PageRecord
from hsmvisord.keystore.vault import META, UnsealError
from hypothesis import given, settings
from hypothesis import strategies as st
from support.keystores import Bench

DATA: dict[int, Any] = {ck.CKA_CLASS: ck.CKO_DATA, ck.CKA_TOKEN: True, ck.CKA_LABEL: b"note", ck.CKA_VALUE: b"\0" * 20}


class Watched(Bench):
    """Keeps the last commit."""

    def persist(self, change: SealedChange, request_id: str, result: bytes) -> None:
        super().persist(change, request_id, result)
        self.change = change


@pytest.fixture
def bench() -> Watched:
    return Watched()


def many(bench: Bench, count: int) -> list[int]:
    return [item.handle for item in bench.keystore.add_objects([(DATA, None)] * count)]


def page_of(handle: int) -> str:
    return f"page/{handle % PAGES}"


def opens(bench: Bench, stored: dict[str, bytes]) -> None:
    persistence.load(stored, bench.vault, bench.provider, bench.version)


def test_a_change_writes_its_object_and_page(bench: Watched) -> None:
    handle = many(bench, 4000)[123]
    touched = {f"object/{handle}", page_of(handle), META}
    bench.keystore.change_object(handle, DATA | {ck.CKA_LABEL: b"new"})
    assert set(bench.change.put) == touched and bench.change.delete == ()
    assert sum(map(len, bench.change.put.values())) < 16 * 1024
    bench.keystore.remove_object(handle)
    assert set(bench.change.put) == touched - {f"object/{handle}"} and bench.change.delete == (f"object/{handle}",)
    (new,) = bench.keystore.add_objects([(DATA, None)])
    assert set(bench.change.put) == {f"object/{new.handle}", page_of(new.handle), META}
    bench.restart()
    assert len(bench.keystore.state.objects) == 4000


def test_an_empty_page_has_no_record(bench: Watched) -> None:
    one, other = many(bench, 2)
    bench.keystore.remove_object(one)
    assert set(bench.change.delete) == {f"object/{one}", page_of(one)} and page_of(other) in bench.stored
    bench.restart()
    assert list(bench.keystore.state.objects) == [other]
    bench.keystore.initialize_guest(b"label".ljust(32), b"officer")
    assert not [name for name in bench.stored if name.startswith(("page/", "object/"))]
    bench.restart()


def test_what_is_refused_changes_no_page(bench: Watched) -> None:
    handles = many(bench, 3)
    bench.full = True
    for call in (lambda: bench.keystore.remove_object(handles[0]), lambda: many(bench, 200)):
        with pytest.raises(StorageError):
            call()
    bench.full = False
    bench.keystore.change_object(handles[0], DATA)
    bench.restart()
    assert sorted(bench.keystore.state.objects) == handles


# ---- other than it was written ------------------------------------------------------------------------------------------


def test_every_changed_or_missing_record_is_found(bench: Watched) -> None:
    many(bench, 5)
    opens(bench, bench.stored)
    for name, blob in bench.stored.items():
        for position in (0, 7, 8, len(blob) // 2, len(blob) - 1):
            changed = bytearray(blob)
            changed[position] ^= 0x80
            with pytest.raises(UnsealError):
                opens(bench, bench.stored | {name: bytes(changed)})
        with pytest.raises(UnsealError):
            opens(bench, {n: b for n, b in bench.stored.items() if n != name})


def test_records_of_another_time_do_not_mix(bench: Watched) -> None:
    first, *_ = many(bench, 3)
    then = dict(bench.stored)
    bench.keystore.change_object(first, DATA | {ck.CKA_LABEL: b"new"})
    opens(bench, bench.stored)
    for names in ((f"object/{first}",), (page_of(first),), (f"object/{first}", page_of(first)), (META,)):
        with pytest.raises(UnsealError):
            opens(bench, bench.stored | {name: then[name] for name in names})


def test_an_object_that_was_removed_does_not_come_back(bench: Watched) -> None:
    first, *_ = many(bench, PAGES + 1)  # the first and the last share a page
    then = dict(bench.stored)
    bench.keystore.remove_object(first)
    for names in ((f"object/{first}",), (f"object/{first}", page_of(first))):
        with pytest.raises(UnsealError):
            opens(bench, bench.stored | {name: then[name] for name in names})


def test_a_page_names_its_own_objects(bench: Watched) -> None:
    (handle,) = many(bench, 1)
    name, version = page_of(handle), bench.version
    for handles, versions in (((handle + 1,), (version,)), ((handle,), ()), ((handle, handle + PAGES), (version, version))):
        wrong = bench.vault.seal(name, version, PageRecord(handles, versions).encode())
        with pytest.raises(UnsealError):
            opens(bench, bench.stored | {name: wrong})


# ---- before there were pages --------------------------------------------------------------------------------------------


def as_before(bench: Bench) -> dict[str, bytes]:
    """Returns what a release without pages would have stored: its meta record names objects."""
    meta = MetaRecord.decode(bench.vault.open(META, bench.stored[META]))
    records = {n: int.from_bytes(b[:8]) for n, b in bench.stored.items() if n != META and not n.startswith("page/")}
    old = replace(meta, manifest_names=tuple(records), manifest_versions=tuple(records.values()))
    sealed = bench.vault.seal(META, bench.version, old.encode())
    return {n: b for n, b in bench.stored.items() if n in records} | {META: sealed}


def test_a_state_without_pages_is_taken_over(bench: Watched) -> None:
    handles = many(bench, 300)
    bench.keystore.change_object(handles[0], DATA | {ck.CKA_LABEL: b"changed"})
    before = dict(bench.keystore.state.objects)
    bench.stored = as_before(bench)
    for missing in (f"object/{handles[7]}", META):
        with pytest.raises(UnsealError):
            opens(bench, {n: b for n, b in bench.stored.items() if n != missing})
    with pytest.raises(UnsealError):
        opens(bench, bench.stored | {f"object/{handles[-1] + 1}": bench.stored[f"object/{handles[0]}"]})
    bench.restart()
    assert bench.keystore.state.objects == before
    bench.keystore.set_token_present(False)  # any commit
    assert {n for n in bench.change.put if n != META} == {f"page/{number}" for number in range(PAGES)}, "and no object again"
    bench.restart()
    assert bench.keystore.state.objects == before
    bench.keystore.remove_object(handles[0])
    assert set(bench.change.put) == {page_of(handles[0]), META}


def test_the_first_change_of_a_state_without_pages_may_be_of_objects(bench: Watched) -> None:
    one, other = many(bench, 2)
    bench.stored = as_before(bench)
    bench.restart()
    bench.keystore.remove_object(one)
    (new,) = bench.keystore.add_objects([(DATA, None)])
    bench.restart()
    assert sorted(bench.keystore.state.objects) == [other, new.handle]


# ---- by chance ----------------------------------------------------------------------------------------------------------

_STEPS = st.lists(st.tuples(st.sampled_from(["add", "change", "remove", "restart", "before"]), st.integers(0, 200)), max_size=25)


@settings(max_examples=40, deadline=None)
@given(_STEPS)
def test_whatever_is_done_comes_back(steps: list[tuple[str, int]]) -> None:
    bench = Bench()
    plain: dict[int, Any] = {}
    for step, n in steps:
        if step == "add":
            made = DATA | {ck.CKA_LABEL: b"%d" % n}
            plain |= {item.handle: made for item in bench.keystore.add_objects([(made, None)] * (1 + n % 140))}
        elif step == "restart" or step == "before":
            bench.stored = as_before(bench) if step == "before" else bench.stored
            bench.restart()
        elif plain:
            handle = sorted(plain)[n % len(plain)]
            if step == "change":
                plain[handle] = DATA | {ck.CKA_VALUE: b"%d" % n}
                bench.keystore.change_object(handle, plain[handle])
            else:
                del plain[handle]
                bench.keystore.remove_object(handle)
    bench.restart()
    assert {h: item.attributes for h, item in bench.keystore.state.objects.items()} == plain
