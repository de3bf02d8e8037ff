"""What searches and handles find: one Index for each state of the keystore, one View for each watermark.

A search that is exact (CKA_ID; of certificates also CKA_VALUE, or issuer and serial number) reaches retiring generations too
when the view has no answer; every other search is answered from the view alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cryptography import x509

from hsmvisord import ck, limits
from hsmvisord.keystore.state import FOLLOW, Generation, Material, State
from hsmvisord.token.objects import TokenObject, authority_object, certificate_object, key_objects

Template = tuple[tuple[int, Any], ...]


class Index:
    """All objects of one state that a client may meet, by handle.  Immutable once built; views are made when first asked for."""

    def __init__(self, state: State, old: Index | None = None) -> None:
        """`old`: the index before, whose objects are taken over where nothing has changed."""
        self.state = state
        self.by_handle: dict[int, TokenObject] = {}
        self._of_generation: dict[tuple[str, int], list[TokenObject]] = {}
        self._views: dict[int, View] = {}
        for material in state.materials.values():
            for generation in material.generations:
                if generation.live:
                    self._add(material, generation, old)
        for material in state.materials.values():
            if material.mode == FOLLOW and (current := material.current):
                newest = self._of_generation[material.name, current.number][0]
                self.by_handle[newest.handle] = newest

    def _add(self, material: Material, generation: Generation, old: Index | None) -> None:
        name = (material.name, generation.number)
        if old and old._same(self.state, material, generation):
            objects = old._of_generation[name]
        else:
            key = self.state.keys[generation.key]
            leaf = self.state.certificates.get(generation.leaf)
            objects = key_objects(material, generation, key, leaf)
            if leaf:
                objects.append(certificate_object(leaf, material.name, key.private.public.key_id))
            for handle in generation.intermediates:
                known = self.by_handle.get(handle)
                objects.append(known or authority_object(self.state.certificates[handle]))
        self._of_generation[name] = objects
        for item in objects:
            self.by_handle[item.handle] = item

    def _same(self, state: State, material: Material, generation: Generation) -> bool:
        """Whether this index has the generation's objects as the new state would make them."""
        was = self.state.materials.get(material.name)
        before = was.generation(generation.number) if was else None
        return (
            was is not None
            and before is not None
            and (material.name, generation.number) in self._of_generation
            and (was.profile, before.key, before.leaf, before.intermediates)
            == (material.profile, generation.key, generation.leaf, generation.intermediates)
        )

    def view(self, watermark: int) -> View:
        view = self._views.get(watermark)
        if view is None:
            view = View(self, watermark)
            if len(self._views) >= limits.MAX_CACHED_VIEWS:
                self._views.clear()
            self._views[watermark] = view
        return view

    @staticmethod
    def not_after(state: State, generation: Generation) -> float:
        """Returns the end of the leaf certificate's validity in seconds, 0 without one."""
        leaf = state.certificates.get(generation.leaf)
        return x509.load_der_x509_certificate(leaf.der).not_valid_after_utc.timestamp() if leaf else 0.0

    def objects_of(self, material: Material, generation: Generation) -> list[TokenObject]:
        return self._of_generation[material.name, generation.number]


class View:
    """The objects of one watermark in the order of their handles, and the answers to searches among them."""

    def __init__(self, index: Index, watermark: int) -> None:
        self._index = index
        self.objects: dict[int, TokenObject] = {}
        self._aliases: dict[bytes, list[TokenObject]] = {}
        for material in index.state.materials.values():
            generation = material.seen_at(watermark)
            if generation is None:
                continue
            found = index.objects_of(material, generation)
            self.objects.update((o.handle, o) for o in found)
            if material.alias_id:
                own = [o for o in found if o.attributes[ck.CKA_LABEL] == material.name.encode()]
                self._aliases.setdefault(material.alias_id, []).extend(own)
        self._answers: dict[Template, tuple[TokenObject, ...]] = {}

    def find(self, template: Template) -> tuple[TokenObject, ...]:
        """Returns the objects that match, those of the view first."""
        answer = self._answers.get(template)
        if answer is None:
            answer = tuple(self._search(dict(template)) if len(dict(template)) == len(template) else ())
            if _size(template) <= limits.MAX_CACHED_TEMPLATE:
                if len(self._answers) >= limits.MAX_CACHED_SEARCHES:
                    self._answers.clear()
                self._answers[template] = answer
        return answer

    def _search(self, wanted: dict[int, Any]) -> Iterator[TokenObject]:
        found = [o for o in self.objects.values() if matches(o.attributes, wanted)]
        if not found and ck.CKA_ID in wanted:
            rest = {k: v for k, v in wanted.items() if k != ck.CKA_ID}
            found = [o for o in self._aliases.get(wanted[ck.CKA_ID], ()) if matches(o.attributes, rest)]
        if not found and _exact(wanted):
            found = [o for o in self._index.by_handle.values() if matches(o.attributes, wanted)]
        return iter(sorted(found, key=lambda o: o.handle))


def _size(value: Any) -> int:
    """About the bytes of a template, with what is nested in it."""
    if isinstance(value, tuple):
        return 8 + sum(map(_size, value))
    return len(value) if isinstance(value, bytes) else 8


def _exact(wanted: dict[int, Any]) -> bool:
    return ck.CKA_ID in wanted or (
        wanted.get(ck.CKA_CLASS, ck.CKO_CERTIFICATE) == ck.CKO_CERTIFICATE
        and (ck.CKA_VALUE in wanted or (ck.CKA_ISSUER in wanted and ck.CKA_SERIAL_NUMBER in wanted))
    )


_MISSING = object()


def matches(attributes: Mapping[int, Any], wanted: dict[int, Any]) -> bool:
    """Whether an object has every wanted value (PKCS#11 3.1, 5.7.3); a vendor attribute matches nothing."""
    return all(attributes.get(kind, _MISSING) == value for kind, value in wanted.items())
