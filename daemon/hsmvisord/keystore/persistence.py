"""A State as records and back.  A commit writes what differs between two states, found by identity: values are immutable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from cryptography import x509
from hsmvisor_rpc.sealed.envelope import RecipientKey

from hsmvisord import ck
from hsmvisord.crypto.interface import AnyKey, CryptoProvider
from hsmvisord.keystore import guests, values
from hsmvisord.keystore.chain import read_all
from hsmvisord.keystore.pages import PAGES, GuestObject, Objects
from hsmvisord.keystore.records import (
    CertificateRecord,
    GenerationRecord,
    GuestRecord,
    KeyRecord,
    MaterialRecord,
    MetaRecord,
    ObjectRecord,
    PageRecord,
    RequestRecord,
)
from hsmvisord.keystore.state import (
    AFTER_DRAIN,
    MODES,
    ON_EXPIRY,
    PROFILES,
    Activation,
    Certificate,
    Generation,
    GenerationState,
    GuestToken,
    Key,
    Material,
    Pin,
    Request,
    State,
)
from hsmvisord.keystore.vault import META, Manifest, UnsealError, Vault, check_missing, check_strange

#: What a generation was used since the worker began: (material, number) -> (operations, seconds of last use).
Usage = Mapping[tuple[str, int], tuple[int, int]]


@dataclass(frozen=True)
class SealedChange:
    """One commit, sealed: to be stored in one transaction."""

    version: int
    put: dict[str, bytes]
    delete: tuple[str, ...]


def load(blobs: Mapping[str, bytes], vault: Vault, provider: CryptoProvider, version: int) -> tuple[State, RecipientKey, Manifest]:
    """Returns the state, the recipient key and the manifest; raises UnsealError, and CkError for a key that the provider
    refuses."""
    try:
        return _load(blobs, vault, provider, version)
    except ValueError:  # MalformedRecord too; its text may show what was sealed
        raise UnsealError("the stored state opens, but this release cannot read it: it was written by another") from None


def _load(blobs: Mapping[str, bytes], vault: Vault, provider: CryptoProvider, version: int) -> tuple[State, RecipientKey, Manifest]:
    if META not in blobs:
        raise UnsealError("the stored state has no meta record")
    meta = MetaRecord.decode(vault.open(META, blobs[META]))
    if meta.version != version:
        raise UnsealError(f"the stored state has version {meta.version}, the host has acknowledged {version}")
    listed = dict(zip(meta.manifest_names, meta.manifest_versions, strict=True))
    check_missing(listed, blobs)
    manifest = _manifest(listed, blobs, vault)
    versions = {object_name(h): v for page in manifest.pages.values() for h, v in page.items()}
    check_missing(versions, blobs)
    check_strange(manifest.records.keys() | versions.keys(), blobs)
    keys: dict[int, Key] = {}
    requests: dict[int, Request] = {}
    certificates: dict[int, Certificate] = {}
    materials: dict[str, Material] = {}
    guest, objects = GuestToken(), list[GuestObject]()
    others = {name: v for name, v in manifest.records.items() if not name.startswith(_PAGE)}
    for name, blob_version in (others | versions).items():
        plain = vault.open(name, blobs[name], blob_version)
        match name.split("/", 1)[0]:
            case "key":
                key = KeyRecord.decode(plain)
                keys[key.handle] = Key(key.handle, key.public_handle, key.material, provider.open_private(key.pkcs8))
            case "request":
                request = RequestRecord.decode(plain)
                requests[request.key] = Request(request.key, request.der)
            case "certificate":
                certificate = CertificateRecord.decode(plain)
                certificates[certificate.handle] = Certificate(certificate.handle, certificate.authority, certificate.der)
            case "material":
                material = _material(MaterialRecord.decode(plain))
                materials[material.name] = material
            case "guest":
                guest = _guest(GuestRecord.decode(plain))
            case "object":
                objects.append(object_of(ObjectRecord.decode(plain), provider))
            case kind:
                raise UnsealError(f"the stored state has records of kind {kind!r}: it was written by a newer release")
    if not requests.keys() <= keys.keys():
        raise ValueError("a request for a certificate without its key")
    state = State(
        version=meta.version,
        module_id=meta.module_id,
        host_id=meta.host_id,
        root=meta.root,
        created_at=meta.created_at,
        sequence=meta.sequence,
        next_handle=meta.next_handle,
        next_activation=meta.next_activation,
        token_present=meta.token_present,
        pin=Pin(meta.pin_salt, meta.pin_verifier, meta.pin_failures, meta.pin_failed_at),
        keys={handle: replace(key, request=requests.get(handle)) for handle, key in keys.items()},
        certificates=certificates,
        materials=materials,
        guest=guest,
        objects=Objects.of(objects),
    )
    _check(state)
    return state, RecipientKey(meta.recipient), manifest


def _check(state: State) -> None:
    """Raises ValueError when a state cannot be served: a word that this release does not know, a handle of nothing."""
    for name, material in state.materials.items():
        if material.name != name or material.mode not in MODES or material.profile not in PROFILES:
            raise ValueError("a material")
        for g in material.generations:
            if g.state is GenerationState.DESTROYED:
                continue
            certificates = {g.leaf, *g.intermediates} - {0}
            if g.key not in state.keys or not certificates <= state.certificates.keys():
                raise ValueError("a generation without its key or certificates")
            if g.after_drain not in AFTER_DRAIN or g.on_expiry not in ON_EXPIRY:
                raise ValueError("a generation's rule")
    for certificate in state.certificates.values():
        read_all(x509.load_der_x509_certificate(certificate.der))


def _material(record: MaterialRecord) -> Material:
    names = [f.name for f in fields(Generation)]
    generations = []
    for encoded in record.generations:
        stored = GenerationRecord.decode(encoded)
        told = {name: getattr(stored, name) for name in names}
        generations.append(Generation(**{**told, "state": GenerationState(stored.state)}))
    pairs = zip(record.activations[::2], record.activations[1::2], strict=True)
    return Material(
        record.name,
        record.mode,
        record.profile,
        record.alias_id,
        record.follow_handle,
        record.since,
        tuple(generations),
        tuple(Activation(number, generation) for number, generation in pairs),
    )


def _guest(record: GuestRecord) -> GuestToken:
    so = Pin(record.so_salt, record.so_verifier, record.so_failures, record.so_failed_at)
    user = Pin(record.user_salt, record.user_verifier, record.user_failures, record.user_failed_at)
    return GuestToken(record.label, so, user)


def _guest_record(guest: GuestToken) -> GuestRecord:
    so, user = guest.so, guest.user
    return GuestRecord(
        label=guest.label,
        so_salt=so.salt,
        so_verifier=so.verifier,
        so_failures=so.failures,
        so_failed_at=so.failed_at,
        user_salt=user.salt,
        user_verifier=user.verifier,
        user_failures=user.failures,
        user_failed_at=user.failed_at,
    )


def object_of(record: ObjectRecord, provider: CryptoProvider) -> GuestObject:
    attributes = values.decode(record.kinds, record.values)
    key: AnyKey | None = None
    match attributes.get(ck.CKA_CLASS):
        case ck.CKO_PRIVATE_KEY:
            key = provider.open_private(record.key)
        case ck.CKO_PUBLIC_KEY:
            key = provider.load_public_key(record.key)
        case ck.CKO_SECRET_KEY:
            key = provider.open_secret(attributes.get(ck.CKA_KEY_TYPE, -1), record.key)
        case ck.CKO_DATA | ck.CKO_CERTIFICATE | ck.CKO_DOMAIN_PARAMETERS if not record.key:
            pass
        case _:
            raise ValueError("an object of a class that is not kept")
    return GuestObject(record.handle, attributes, key, guests.size(attributes, record.key))


def object_record(item: GuestObject) -> ObjectRecord:
    return ObjectRecord(item.handle, *values.encode(item.attributes), guests.key_bytes(item.attributes, item.key))


def object_name(handle: int) -> str:
    return f"object/{handle}"


_PAGE = "page/"
_PAGE_NAMES = tuple(f"{_PAGE}{number}" for number in range(PAGES))


def _manifest(listed: Mapping[str, int], blobs: Mapping[str, bytes], vault: Vault) -> Manifest:
    """`listed`: by the meta record.  Before there were pages it listed objects; their pages are written with the next commit."""
    pages: dict[int, dict[int, int]] = {}
    records = {}
    for name, version in listed.items():
        kind, _, rest = name.partition("/")
        if kind == "object":
            pages.setdefault(int(rest) % PAGES, {})[int(rest)] = version
            continue
        records[name] = version
        if kind == "page":
            page = PageRecord.decode(vault.open(name, blobs[name], version))
            if any(handle % PAGES != int(rest) for handle in page.handles):
                raise ValueError("an object on another page")
            pages[int(rest)] = dict(zip(page.handles, page.versions, strict=True))
    return Manifest(records, pages)


def seal_change(
    old: State | None, new: State, recipient: RecipientKey, manifest: Manifest, vault: Vault, usage: Usage
) -> tuple[SealedChange, Manifest]:
    """Returns the commit that leads from `old` (None: nothing) to `new`, and the manifest after it."""
    before, after = _parts(old), _parts(new)
    changed = {name: part for name, part in after.items() if before.get(name) is not part}
    pages, gone = _changed_pages(old, new, manifest, changed)
    written = {_PAGE_NAMES[number]: page for number, page in pages.items() if page}
    kept = after.keys() | {name for name in manifest.records if name.startswith(_PAGE)} - {_PAGE_NAMES[n] for n in pages}
    deleted = tuple(sorted((manifest.records.keys() - kept - written.keys()) | gone))
    put = {name: vault.seal(name, new.version, _encode(part, usage)) for name, part in changed.items()}
    put |= {name: vault.seal(name, new.version, PageRecord(tuple(p), tuple(p.values())).encode()) for name, p in written.items()}
    records = {name: v for name, v in manifest.records.items() if name in kept}
    records |= dict.fromkeys((name for name in changed if name in after), new.version) | dict.fromkeys(written, new.version)
    manifest = Manifest(records, {number: page for number, page in (dict(manifest.pages) | pages).items() if page})
    meta = MetaRecord(
        version=new.version,
        module_id=new.module_id,
        host_id=new.host_id,
        root=new.root,
        recipient=recipient.private_bytes(),
        created_at=new.created_at,
        sequence=new.sequence,
        next_handle=new.next_handle,
        next_activation=new.next_activation,
        token_present=new.token_present,
        pin_salt=new.pin.salt,
        pin_verifier=new.pin.verifier,
        pin_failures=new.pin.failures,
        pin_failed_at=new.pin.failed_at,
        manifest_names=tuple(manifest.records),
        manifest_versions=tuple(manifest.records.values()),
    )
    put[META] = vault.seal(META, new.version, meta.encode())
    return SealedChange(new.version, put, deleted), manifest


def _changed_pages(
    old: State | None, new: State, manifest: Manifest, changed: dict[str, Part]
) -> tuple[dict[int, dict[int, int]], set[str]]:
    """Returns the pages whose part of the manifest changes, and names of objects that are gone; adds changed ones to `changed`."""
    pages, gone = dict[int, dict[int, int]](), set[str]()
    before = old.objects if old is not None else Objects()
    for number, (was, now) in enumerate(zip(before.pages, new.objects.pages, strict=True)):
        if was is now and (not now.items or _PAGE_NAMES[number] in manifest.records):
            continue
        others = {handle: item for handle, item in now.items.items() if was.items.get(handle) is not item}
        changed |= {object_name(handle): item for handle, item in others.items()}
        gone |= {object_name(handle) for handle in was.items.keys() - now.items.keys()}
        stored = manifest.pages.get(number, {})
        pages[number] = {handle: new.version if handle in others else stored[handle] for handle in now.items}
    return pages, gone


Part = Key | Request | Certificate | Material | GuestToken | GuestObject


def _parts(state: State | None) -> dict[str, Part]:
    """All but objects, by name."""
    if state is None:
        return {}
    parts: dict[str, Part] = {f"key/{h}": k for h, k in state.keys.items()}
    parts |= {f"request/{h}": k.request for h, k in state.keys.items() if k.request}
    parts |= {f"certificate/{h}": c for h, c in state.certificates.items()}
    parts |= {f"material/{name}": m for name, m in state.materials.items()}
    return parts | ({"guest": state.guest} if state.guest else {})


def _encode(part: Part, usage: Usage) -> bytes:
    if isinstance(part, GuestToken):
        return _guest_record(part).encode()
    if isinstance(part, GuestObject):
        return object_record(part).encode()
    if isinstance(part, Key):
        return KeyRecord(part.handle, part.public_handle, part.material, part.private.stored()).encode()
    if isinstance(part, Request):
        return RequestRecord(part.key, part.der).encode()
    if isinstance(part, Certificate):
        return CertificateRecord(part.handle, part.authority, part.der).encode()
    generations = tuple(_generation(part.name, g, usage).encode() for g in part.generations)
    activations = tuple(n for a in part.activations for n in (a.number, a.generation))
    return MaterialRecord(
        part.name, part.mode, part.profile, part.alias_id, part.follow_handle, part.since, generations, activations
    ).encode()


def _generation(material: str, generation: Generation, usage: Usage) -> GenerationRecord:
    operations, last_used = usage.get((material, generation.number), (0, 0))
    told = {f.name: getattr(generation, f.name) for f in fields(Generation)}
    told["operations"] += operations
    told["last_used_at"] = max(told["last_used_at"], last_used)
    return GenerationRecord(**told)
