"""The records of the internal protocol, one section for each pair of processes.

`report` fields are JSON objects: they inform, nothing is decided from them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from hsmvisor_rpc.sealed.canonical import Record

PROTOCOL = 1  #: version of this protocol; both ends say it, the lower one counts


@dataclass(frozen=True)
class Done(Record):
    """A request is carried out and has nothing to say."""

    TYPE: ClassVar[str] = "done"


@dataclass(frozen=True)
class Error(Record):
    """A request is refused.  `reason` is stable (a sealed.Reason or one of this module's REASON_*)."""

    TYPE: ClassVar[str] = "error"
    reason: str
    detail: str


REASON_PHASE = "PHASE"  #: not allowed in this phase
REASON_STORAGE = "STORAGE"  #: the state could not be stored; nothing has changed
REASON_INTERNAL = "INTERNAL"
REASON_UNSEALED = "UNSEALED"  #: the sealed state does not open, or is not what was acknowledged
REASON_DEVICE = "DEVICE"  #: it cannot be the device; the front-end's connection is of no use
REASON_SUCCESSION = "SUCCESSION"  #: the connections could not be handed over
REASON_HSM = "HSM"  #: the hardware does not answer, or is not the one that the module's keys live in
REASON_TPM = "TPM"  #: the TPM cannot do it, or not now; the detail says why

STORAGE, TPM = "storage", "tpm"
KEY_PURPOSES = (STORAGE, TPM)  #: what a key of the key provider is for


# ---- supervisor -> launcher, of workers or of TPMs ----------------------------------------------------------------


@dataclass(frozen=True)
class Spawn(Record):
    """Fork a process for the module.  Descriptors for a worker: control listener, guest listener, read end of the key pipe; for a
    TPM: control listener, read end of the key pipe.  -> Spawned"""

    TYPE: ClassVar[str] = "spawn"
    module_id: bytes
    name: str  #: shown in ps
    uid: int  #: user id of the worker; 0 = the launcher's own
    supervisor_uid: int  #: the only user whose control connections the worker takes
    state_directories: tuple[str, ...]  #: reserved for measures that name paths


@dataclass(frozen=True)
class Spawned(Record):
    """Descriptor: a pidfd."""

    TYPE: ClassVar[str] = "spawned"
    pid: int


@dataclass(frozen=True)
class LauncherStatus(Record):
    """-> Report: measures of the launcher's sandbox."""

    TYPE: ClassVar[str] = "launcher-status"


# ---- supervisor -> key provider ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class DeriveKey(Record):
    """Write a 32-byte key of the module into the pipe.  Descriptor: write end of the pipe.  -> Done"""

    TYPE: ClassVar[str] = "derive-key"
    module_id: bytes
    purpose: str = STORAGE  #: of KEY_PURPOSES: another key for each


@dataclass(frozen=True)
class ProviderStatus(Record):
    """-> Report: kind of the provider, fingerprint of its master key, measures of its sandbox."""

    TYPE: ClassVar[str] = "provider-status"


# ---- supervisor -> cryptoprocessor helper of a module (hsmvisord/hsm) ---------------------------------------------


@dataclass(frozen=True)
class ServeWorker(Record):
    """Serve the worker at the other end of the socket until it closes.  Descriptor: a stream socket.  -> Done"""

    TYPE: ClassVar[str] = "serve-worker"


@dataclass(frozen=True)
class HsmStatus(Record):
    """-> Report: library, token, serial, measures of its sandbox."""

    TYPE: ClassVar[str] = "hsm-status"


@dataclass(frozen=True)
class Report(Record):
    """A JSON object that informs."""

    TYPE: ClassVar[str] = "report"
    report: str


# ---- supervisor -> worker ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attach(Record):
    """First on each control connection.  -> Attached, with the guest listener as descriptor when serving"""

    TYPE: ClassVar[str] = "attach"
    protocol: int
    stored_version: int  #: version of the state that is stored for this module; 0 = none


@dataclass(frozen=True)
class Attached(Record):
    TYPE: ClassVar[str] = "attached"
    protocol: int
    phase: str  #: worker phase (phases.py)
    module_id: bytes
    name: str
    pid: int
    recipient: bytes  #: HPKE public key; empty in phase empty
    root: bytes  #: raw root key; empty in phase empty
    report: str  #: measures of the sandbox and the release


@dataclass(frozen=True)
class LoadState(Record):
    """A part of the stored state, before Boot; parallel tuples.  -> Done"""

    TYPE: ClassVar[str] = "load-state"
    names: tuple[str, ...]
    blobs: tuple[bytes, ...] = field(repr=False)


@dataclass(frozen=True)
class UseHsm(Record):
    """The module's keys live behind this socket: before Boot or Succeed, and again whenever the helper is another one.
    Descriptor: a stream socket that ends in the module's helper.  -> Done"""

    TYPE: ClassVar[str] = "use-hsm"


@dataclass(frozen=True)
class Boot(Record):
    """Open what was loaded (version > 0) or begin a new module (version 0), then serve.  -> Booted"""

    TYPE: ClassVar[str] = "boot"
    host_id: bytes
    root: bytes  #: raw Ed25519 root of a new module; ignored when state was loaded
    version: int  #: version of the loaded state
    created_at: int  #: seconds; for a new module
    settings: str  #: JSON: the operator's settings (settings.py of the worker names and checks them)


@dataclass(frozen=True)
class Booted(Record):
    TYPE: ClassVar[str] = "booted"
    recipient: bytes
    root: bytes
    report: str


@dataclass(frozen=True)
class Execute(Record):
    """A signed command.  -> Executed, or Error with the reason of the refusal"""

    TYPE: ClassVar[str] = "execute"
    request_id: str  #: stored beside the state that this command makes, in the same transaction
    command: bytes


@dataclass(frozen=True)
class Executed(Record):
    TYPE: ClassVar[str] = "executed"
    action: str
    material: str
    generation: int
    sequence: int
    signer: str
    report: str  #: the material's status afterwards
    compromised: bool  #: a key was destroyed for that: the worker's process is to be replaced


@dataclass(frozen=True)
class QueryStatus(Record):
    """-> Report: materials, generations, sequence number, connections, settings."""

    TYPE: ClassVar[str] = "query-status"


@dataclass(frozen=True)
class QueryStatistics(Record):
    """-> Report: counters and histograms."""

    TYPE: ClassVar[str] = "query-statistics"


@dataclass(frozen=True)
class Configure(Record):
    """The operator's settings, whole.  -> Done"""

    TYPE: ClassVar[str] = "configure"
    settings: str


@dataclass(frozen=True)
class SetPin(Record):
    """The operator's PIN for slot 0; empty takes it away.  -> Done"""

    TYPE: ClassVar[str] = "set-pin"
    request_id: str
    pin: bytes = field(repr=False)


@dataclass(frozen=True)
class SetTokenPresent(Record):
    """Attach or detach the token of slot 0 (C_WaitForSlotEvent tells).  -> Done"""

    TYPE: ClassVar[str] = "set-token-present"
    present: bool


@dataclass(frozen=True)
class Freeze(Record):
    """Change no state until Thaw: a successor is to be started from what is stored.  -> Frozen"""

    TYPE: ClassVar[str] = "freeze"


@dataclass(frozen=True)
class Frozen(Record):
    TYPE: ClassVar[str] = "frozen"
    version: int  #: of the state, which is stored


@dataclass(frozen=True)
class Thaw(Record):
    """There will be no successor.  -> Done"""

    TYPE: ClassVar[str] = "thaw"


@dataclass(frozen=True)
class Succeed(Record):
    """Open what was loaded, take the connections of the worker at the other end (handover.py) and serve.
    Descriptor: a socket.  -> Booted"""

    TYPE: ClassVar[str] = "succeed"
    host_id: bytes
    version: int
    settings: str


@dataclass(frozen=True)
class HandOver(Record):
    """Give all connections to the worker at the other end (handover.py), then end.  Descriptor: a socket.  -> HandedOver"""

    TYPE: ClassVar[str] = "hand-over"
    linger_ms: int  #: how long applications in a long operation are served before they are given without it


@dataclass(frozen=True)
class HandedOver(Record):
    TYPE: ClassVar[str] = "handed-over"
    applications: int
    connections: int
    lingering: int  #: applications that follow when their operations are done


@dataclass(frozen=True)
class PlugDevice(Record):
    """A virtual machine's front-end is connected: be its device.  Descriptors: the connection, the memory of stream keys, and those
    of `state` (which an earlier worker told in DeviceState; empty: the front-end begins).  -> Done"""

    TYPE: ClassVar[str] = "plug-device"
    plug: int  #: tells this connection from earlier and later ones
    cid: int  #: the guest's address
    state: bytes
    descriptors: int


@dataclass(frozen=True)
class QueryDevice(Record):
    """-> DeviceState, with the connection and the memory of stream keys before its descriptors; without any, it is no device"""

    TYPE: ClassVar[str] = "query-device"


@dataclass(frozen=True)
class PlugUsb(Record):
    """An importer is connected: be its USB device.  Descriptor: the connection.  -> Done"""

    TYPE: ClassVar[str] = "plug-usb"
    plug: int  #: tells this connection from earlier and later ones
    protocol: str  #: of USB_PROTOCOLS
    vendor: int
    product: int
    serial: str  #: the module's name: the device's serial number begins with it, and it is the bus id of USB/IP
    shown: bytes  #: what an earlier worker told in UsbShown; empty: nothing is known


@dataclass(frozen=True)
class UnplugUsb(Record):
    """Close the importer's connection.  -> Done"""

    TYPE: ClassVar[str] = "unplug-usb"


@dataclass(frozen=True)
class QueryUsb(Record):
    """-> UsbState"""

    TYPE: ClassVar[str] = "query-usb"


@dataclass(frozen=True)
class TakeConnection(Record):
    """A guest's program is connected by another way than the listening socket.  Descriptor: the connection.  -> Done, before
    anything is read: a connection that was not answered can be given to another worker"""

    TYPE: ClassVar[str] = "take-connection"
    peer: str  #: who that is, as its connections are shown


@dataclass(frozen=True)
class DropConnections(Record):
    """End the connections that TakeConnection brought from `peer`.  -> Done"""

    TYPE: ClassVar[str] = "drop-connections"
    peer: str


@dataclass(frozen=True)
class ServeTpm(Record):
    """The module's TPM runs: tell it which keys are wanted there, now and whenever that changes.  Descriptor: a stream socket that
    ends in the TPM's process (tpm.py).  -> Done"""

    TYPE: ClassVar[str] = "serve-tpm"


@dataclass(frozen=True)
class Shutdown(Record):
    """Drain operations for at most `drain_ms` and end.  -> Done"""

    TYPE: ClassVar[str] = "shutdown"
    drain_ms: int


# ---- supervisor -> TPM process of a module (hsmvisord/tpm) ---------------------------------------------------------


@dataclass(frozen=True)
class BootTpm(Record):
    """Open what is stored (version > 0), or manufacture a TPM (version 0).  -> TpmBooted"""

    TYPE: ClassVar[str] = "boot-tpm"
    version: int
    sealed: bytes = field(repr=False)
    firmware: bool  #: the guest has one, which takes the platform hierarchy for itself


@dataclass(frozen=True)
class TpmBooted(Record):
    TYPE: ClassVar[str] = "tpm-booted"
    endorsement_keys: tuple[bytes, ...]  #: SubjectPublicKeyInfo: RSA 2048, P-256
    attestation_key: bytes  #: SubjectPublicKeyInfo
    certificates: tuple[bytes, ...]  #: DER, of these keys and of the platform, as CertifyTpm brought them; empty: none yet
    report: str  #: measures of the sandbox


@dataclass(frozen=True)
class IdentifyTpm(Record):
    """Say again who it is: a state that came from elsewhere has other keys.  -> TpmBooted"""

    TYPE: ClassVar[str] = "identify-tpm"


@dataclass(frozen=True)
class CertifyTpm(Record):
    """Keep the certificates (DER) of the endorsement keys in it.  -> Done"""

    TYPE: ClassVar[str] = "certify-tpm"
    rsa: bytes
    p256: bytes
    platform: bytes


@dataclass(frozen=True)
class TakeKeys(Record):
    """The module's worker says which keys are wanted.  Descriptor: a stream socket that ends in it.  -> Done"""

    TYPE: ClassVar[str] = "take-keys"


@dataclass(frozen=True)
class PlugTpm(Record):
    """Somebody of the guest's side is connected.  Descriptors: the connection; of QEMU also memory of TPM_BUSY_SIZE bytes, where
    the process notes that it has taken a command and not answered it.  -> Done"""

    TYPE: ClassVar[str] = "plug-tpm"
    plug: int  #: tells this connection from earlier and later ones
    kind: str  #: of TPM_CONNECTIONS
    descriptors: int


@dataclass(frozen=True)
class QuoteTpm(Record):
    """Sign what the guest's boot was measured as (TPM2_Quote).  -> TpmQuoted"""

    TYPE: ClassVar[str] = "quote-tpm"
    nonce: bytes
    pcrs: tuple[int, ...]


@dataclass(frozen=True)
class TpmQuoted(Record):
    TYPE: ClassVar[str] = "tpm-quoted"
    attest: bytes  #: TPMS_ATTEST
    signature: bytes  #: ECDSA-Sig-Value, by the attestation key
    values: tuple[bytes, ...]  #: of the PCRs


@dataclass(frozen=True)
class HandOverTpm(Record):
    """Give all that a successor needs, answer nobody any more, and end.  -> TpmHandedOver, with the guest's connections"""

    TYPE: ClassVar[str] = "hand-over-tpm"


@dataclass(frozen=True)
class TpmHandedOver(Record):
    """Descriptors: QEMU's control connection, and the one for commands."""

    TYPE: ClassVar[str] = "tpm-handed-over"
    state: bytes = field(repr=False)  #: sealed; understood by a successor alone
    plug: int
    descriptors: int


@dataclass(frozen=True)
class SucceedTpm(Record):
    """Be what the TPM's earlier process was, instead of BootTpm.  Descriptors: the memory of PlugTpm, and what was handed over.
    -> TpmBooted"""

    TYPE: ClassVar[str] = "succeed-tpm"
    version: int
    sealed: bytes = field(repr=False)
    firmware: bool
    state: bytes = field(repr=False)  #: as handed over; empty: it ended without a word, and the TPM is off until the guest resets
    plug: int
    descriptors: int


# ---- TPM process -> supervisor ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoreTpm(Record):
    """Store the TPM's state and sync it; then -> Done.  `version` is the stored one plus 1 (or equal: then it was stored)."""

    TYPE: ClassVar[str] = "store-tpm"
    version: int
    sealed: bytes = field(repr=False)


@dataclass(frozen=True)
class TpmPlugged(Record):
    """Notification: what a successor needs of QEMU, should this process die.  Descriptors: the memory beside them, and
    both connections, as handed over."""

    TYPE: ClassVar[str] = "tpm-plugged"
    plug: int
    descriptors: int
    busy: bool  #: it has that memory: the first descriptor


@dataclass(frozen=True)
class TpmGone(Record):
    """Notification: who was connected is gone, or what it said ended the connection."""

    TYPE: ClassVar[str] = "tpm-gone"
    plug: int
    why: str


QEMU, TSS_COMMANDS, TSS_CONTROL = "qemu", "tss-commands", "tss-control"
TPM_CONNECTIONS = (QEMU, TSS_COMMANDS, TSS_CONTROL)

# ---- worker -> supervisor ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoreState(Record):
    """Store all of this in one transaction and sync it; then -> Done.  `version` is the stored one plus 1 (or equal,
    with the same digest: then it was stored already)."""

    TYPE: ClassVar[str] = "store-state"
    version: int
    request_id: str  #: of the Execute or SetPin that caused it, or empty
    result: bytes  #: encoded reply to that request, stored as its answer
    put_names: tuple[str, ...]
    put_blobs: tuple[bytes, ...] = field(repr=False)
    delete_names: tuple[str, ...]


@dataclass(frozen=True)
class Event(Record):
    """Notification: something for the event stream and the audit log."""

    TYPE: ClassVar[str] = "event"
    kind: str  #: one of EVENT_KINDS
    at_ms: int  #: milliseconds since 1970
    report: str


@dataclass(frozen=True)
class DeviceState(Record):
    """Notification: what the front-end has told of memory and rings, all that another worker needs to go on.  With descriptors."""

    TYPE: ClassVar[str] = "device-state"
    plug: int
    state: bytes  #: not understood by who keeps it (hsmvisord/transport/vsock/saved.py)
    descriptors: int


@dataclass(frozen=True)
class DeviceGone(Record):
    """Notification: the front-end is gone, or what it did ended the device."""

    TYPE: ClassVar[str] = "device-gone"
    plug: int
    why: str


@dataclass(frozen=True)
class UsbState(Record):
    """Which importer has the USB device."""

    TYPE: ClassVar[str] = "usb-state"
    plug: int  #: 0: none
    protocol: str
    shown: bytes


@dataclass(frozen=True)
class UsbCame(Record):
    """Notification: the guest's kernel imports the device by USB/IP over the guest's own vsock.  Descriptor: the connection."""

    TYPE: ClassVar[str] = "usb-came"


@dataclass(frozen=True)
class UsbGone(Record):
    """Notification: the importer is gone, or what it did ended the device."""

    TYPE: ClassVar[str] = "usb-gone"
    plug: int
    why: str


@dataclass(frozen=True)
class UsbShown(Record):
    """Notification: which keys the card has shown, so that the next worker's card refuses who holds an older certificate."""

    TYPE: ClassVar[str] = "usb-shown"
    plug: int
    shown: bytes  #: not understood by who keeps it (hsmvisord/face/card/generations.py)


EVENT_KINDS = frozenset(
    {
        "connection-opened",  # a guest's application began: peer, dialect, program
        "connection-closed",  # one of these ended: the same, and why
        "connection-refused",  # one ended without an application: peer, greeting and dialect as far as they came, and why
        "policy-refused",  # what the policy forbids was asked for: what, and how often since it was told last
        "connections-suppressed",  # more began, ended and were refused than are told one by one: how many since the worker began
        "events-suppressed",  # more happened than was kept while no supervisor was attached
        "generation-activated",
        "generation-retired",
        "generation-destroyed",
        "drain-extended",  # alert: still in use at the end of its drain
        "certificate-expired",
        "clock-leapt",  # alert: drains wait until the time can be believed
        "pin-wrong",
        "pin-locked",
        "signature",  # only where the module logs each one
        "tpm-keys",  # alert: its keys are not as wanted, and why; or they are again
        "tpm-said",  # what an operator should know of a TPM
        "measures",  # what the sandbox lacks
    }
)
TPM_EVENT_KINDS = frozenset({"tpm-keys", "tpm-said", "events-suppressed"})  #: what a TPM's process tells of these
