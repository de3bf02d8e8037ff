"""One request's specification: checked as a whole, with a plain form for the database."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hsmvisor.manager import limits
from hsmvisor.manager.ca import names
from hsmvisor.manager.ca.names import BadName, Name
from hsmvisor.manager.policy import measured
from hsmvisor.manager.policy.questions import Source
from hsmvisor.manager.renewal.decisions import BadRule, Rule
from hsmvisor.manager.store.rows import ResourceRow

KEY_TYPES = ("P-256", "P-384", "P-521", "RSA-2048", "RSA-3072", "RSA-4096", "Ed25519")
USAGES = ("tls", "ssh", "request-signing", "decrypt", "card", "any")
MODES, AFTER_DRAIN, ON_EXPIRY = ("pin", "follow"), ("extend", "refuse"), ("keep", "refuse")

_PLACE = re.compile(r"\{([A-Za-z0-9._-]{1,64})\}")
_FILLING = re.compile(r"[A-Za-z0-9._:@/-]{1,256}")  #: what may stand in the place: no star, no brace, no blank
_KEY = _PROFILE = re.compile(r"[A-Za-z0-9._-]{1,64}")
_RESOURCE = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}/[a-z0-9][a-z0-9._-]{0,63}")


class BadSpec(ValueError):
    """What was asked cannot be; the message says what is wrong and what may stand there."""


class NotFilled(ValueError):
    """A name needs an attribute that the resource does not have."""


@dataclass(frozen=True)
class Spec:
    material: str
    source: Source = Source.MODULE
    key_type: str = "P-256"
    authority: str = ""
    profile: str = "server"
    usage: str = "tls"
    names: tuple[str, ...] = ()
    lifetime: int = 0
    resources: tuple[str, ...] = ()  #: HOST/NAME
    selector: Mapping[str, str] = field(default_factory=dict)
    renewal: Rule = field(default_factory=Rule)
    two_step: bool = False
    health: str = ""
    escrow: bool = False
    mode: str = "pin"
    drain_seconds: int = 0
    after_drain: str = "extend"
    on_expiry: str = "keep"
    bare: bool = False
    measured: tuple[str, ...] = ()  #: only where a guest's boot is measured as one of these

    @property
    def shared(self) -> bool:
        """Whether one key serves all resources."""
        return self.source is not Source.MODULE

    def check(self) -> Spec:
        """Raises BadSpec."""
        _one_of("key_type", self.key_type, KEY_TYPES)
        _one_of("usage", self.usage, USAGES)
        _one_of("mode", self.mode, MODES)
        _one_of("after_drain", self.after_drain, AFTER_DRAIN)
        _one_of("on_expiry", self.on_expiry, ON_EXPIRY)
        if not _PROFILE.fullmatch(self.profile):
            raise BadSpec(f"a profile's name has 1 to {limits.MAX_NAME} of A-Z a-z 0-9 . _ -")
        if not 1 <= len(self.material) <= limits.MAX_NAME or not self.material.isprintable():
            raise BadSpec(f"a material's name has 1 to {limits.MAX_NAME} printable characters")
        if not 0 <= self.lifetime <= limits.MAX_LIFETIME:
            raise BadSpec(f"lifetime is 0 to {limits.MAX_LIFETIME} seconds")
        if not 0 <= self.drain_seconds <= limits.MAX_DRAIN:
            raise BadSpec(f"drain_seconds is 0 to {limits.MAX_DRAIN}")
        self._check_members()
        self._check_measured()
        self._check_names()
        self._check_source()
        try:
            self.renewal.check()
        except BadRule as error:
            raise BadSpec(str(error)) from None
        return self

    def _check_members(self) -> None:
        if not self.resources and not self.selector:
            raise BadSpec("resources or a selector say for whom it is; neither was given")
        if len(self.resources) > limits.MAX_RESOURCES:
            raise BadSpec(f"{len(self.resources)} resources, at most {limits.MAX_RESOURCES}: use a selector")
        for resource in self.resources:
            if not _RESOURCE.fullmatch(resource):
                raise BadSpec(f"{resource!r}: a resource is written HOST/NAME")
        if len(self.selector) > limits.MAX_SELECTOR:
            raise BadSpec(f"a selector has at most {limits.MAX_SELECTOR} attributes")
        for key, value in self.selector.items():
            if not _KEY.fullmatch(key):
                raise BadSpec(f"{key!r}: an attribute's name has 1 to {limits.MAX_KEY} of A-Z a-z 0-9 . _ -")
            if len(value) > limits.MAX_VALUE or not value.isprintable():
                raise BadSpec(f"{key}: a value has at most {limits.MAX_VALUE} printable characters")

    def _check_measured(self) -> None:
        if len(self.measured) > limits.MAX_MEASURED:
            raise BadSpec(f"measured as one of {len(self.measured)}, at most {limits.MAX_MEASURED}")
        for name in self.measured:
            if not measured.NAME.fullmatch(name):
                raise BadSpec(f"measured {name!r}: the NAME of a [measured.NAME] in the manager's configuration")
        if len(set(self.measured)) != len(self.measured):
            raise BadSpec("measured: each name stands once")

    def _check_names(self) -> None:
        if self.bare:
            if self.names:
                raise BadSpec("a bare key has no certificate, so no names")
            return
        if not self.names and self.source is not Source.IMPORTED:
            raise BadSpec("a certificate has one name at least (or ask for a bare key)")
        if len(self.names) > limits.MAX_NAMES:
            raise BadSpec(f"{len(self.names)} names, a certificate has at most {limits.MAX_NAMES}")
        for template in self.names:
            if len(template) > limits.MAX_TEMPLATE:
                raise BadSpec(f"a name has at most {limits.MAX_TEMPLATE} characters")
            if self.shared and _PLACE.search(template):
                raise BadSpec(f"{template!r}: one key for all has one certificate, so its names cannot be each resource's own")
            if not (template.startswith("ip:") and _PLACE.search(template)):
                try:
                    names.parse(_PLACE.sub("x", template))
                except BadName as error:
                    raise BadSpec(str(error)) from None

    def _check_source(self) -> None:
        if self.escrow and not self.shared:
            raise BadSpec("a key that a module makes never leaves it: it cannot be kept (escrow)")
        if self.two_step and not self.shared:
            raise BadSpec("two steps are for a key that several share: one that a module has alone is activated when it is staged")
        if self.mode == "follow" and not self.bare:
            raise BadSpec("mode follow is for bare signing keys: a certificate would not fit the newer key")
        if self.mode == "follow" and self.usage == "decrypt":
            raise BadSpec("mode follow is for keys that sign")
        if self.usage == "decrypt" and self.key_type == "Ed25519" and self.source is not Source.IMPORTED:
            raise BadSpec("usage decrypt is for keys that decrypt or agree, and Ed25519 keys sign: take RSA or P-256, P-384, P-521")

    def matches(self, resource: ResourceRow) -> bool:
        """Whether the resource is meant; whether it may have the material is policy's to say."""
        if resource.id in self.resources:
            return True
        return bool(self.selector) and all(own_of(resource).get(key) == value for key, value in self.selector.items())

    def names_for(self, resource: ResourceRow | None) -> tuple[Name, ...]:
        """Returns the certificate's names; `resource`: None where all share it.  Raises NotFilled, BadName."""
        if self.bare or not self.names:
            return ()
        filled = self.names if resource is None else [_filled(template, resource) for template in self.names]
        return names.parse_all(filled)

    # ---- the plain form ------------------------------------------------------------------------------------------

    def text(self) -> str:
        """Equal specifications have equal texts."""
        values = asdict(self) | {"selector": dict(self.selector)}
        if not self.measured:  # as it was written before there was such a thing
            del values["measured"]
        return json.dumps(values, sort_keys=True, separators=(",", ":"))

    @classmethod
    def of_text(cls, text: str) -> Spec:
        values: dict[str, Any] = json.loads(text)
        values["renewal"] = Rule(**values["renewal"])
        values["source"] = Source(values["source"])
        for name in ("names", "resources", "measured"):
            values[name] = tuple(values.get(name, ()))
        return cls(**values)


def _one_of(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise BadSpec(f"{what} {value!r}: one of {', '.join(allowed)}")


def own_of(resource: ResourceRow) -> dict[str, str]:
    """Returns what selectors find a resource by, and names are filled with: its attributes, and its own kind, owner, host, name."""
    own = {"kind": resource.kind, "owner": resource.owner, "host": resource.host, "name": resource.name}
    return {**resource.tags, **own}


def _filled(template: str, resource: ResourceRow) -> str:
    own = own_of(resource)

    def fill(match: re.Match[str]) -> str:
        value = own.get(match[1])
        if value is None:
            raise NotFilled(f"{template}: {resource.id} has no attribute {match[1]}")
        if not _FILLING.fullmatch(value):
            raise NotFilled(f"{template}: attribute {match[1]} of {resource.id} cannot be part of a name")
        return value

    filled = _PLACE.sub(fill, template)
    if names.parse(filled).kind in ("uri", "email") and not template.startswith(("uri:", "email:")):
        raise NotFilled(f"{template}: filled for {resource.id} it is another kind of name")
    return filled
