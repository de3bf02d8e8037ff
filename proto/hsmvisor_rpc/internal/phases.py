"""Who may ask what, and when: one table.  A message that is not in its row ends the connection, and a worker that
sends one is killed.

A worker's phases: `empty` (forked, knows nothing), `booting` (state is being loaded), `serving`, `leaving` (its
connections go to its successor), `closing`.
"""

from __future__ import annotations

import enum

from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.sealed.canonical import MalformedRecord, Record


class Phase(enum.StrEnum):
    EMPTY = "empty"
    BOOTING = "booting"
    SERVING = "serving"
    LEAVING = "leaving"
    CLOSING = "closing"


_ALWAYS: frozenset[type[Record]] = frozenset({m.Attach, m.Shutdown})

#: What the supervisor may ask a worker.
SUPERVISOR_MAY: dict[Phase, frozenset[type[Record]]] = {
    Phase.EMPTY: _ALWAYS | {m.LoadState, m.UseHsm, m.Boot, m.Succeed},
    Phase.BOOTING: _ALWAYS,
    Phase.SERVING: _ALWAYS
    | {m.Execute, m.QueryStatus, m.QueryStatistics, m.Configure, m.SetPin, m.SetTokenPresent}
    | {m.Freeze, m.Thaw, m.HandOver}
    | {m.UseHsm}
    | {m.PlugDevice, m.QueryDevice}
    | {m.PlugUsb, m.UnplugUsb, m.QueryUsb}
    | {m.TakeConnection, m.DropConnections}
    | {m.ServeTpm},
    Phase.LEAVING: _ALWAYS,
    Phase.CLOSING: _ALWAYS,
}

#: What a worker may ask or tell the supervisor: StoreState as a request, the others as notifications.  One that is told to shut
#: down may have sent a change before it heard of that.
WORKER_MAY: dict[Phase, frozenset[type[Record]]] = {
    Phase.EMPTY: frozenset(),
    Phase.BOOTING: frozenset({m.StoreState, m.Event, m.DeviceState, m.DeviceGone}),
    Phase.SERVING: frozenset({m.StoreState, m.Event, m.DeviceState, m.DeviceGone, m.UsbCame, m.UsbGone, m.UsbShown}),
    Phase.LEAVING: frozenset({m.Event, m.DeviceGone, m.UsbCame, m.UsbGone, m.UsbShown}),  # whose front-end went at that moment
    Phase.CLOSING: frozenset({m.StoreState, m.Event, m.DeviceState, m.DeviceGone, m.UsbCame, m.UsbGone, m.UsbShown}),
}

#: What the supervisor may ask a TPM's process, and what that may ask or tell.
TPM_MAY_BE_ASKED: dict[Phase, frozenset[type[Record]]] = {
    Phase.EMPTY: _ALWAYS | {m.BootTpm, m.SucceedTpm},
    Phase.BOOTING: _ALWAYS,
    Phase.SERVING: _ALWAYS | {m.IdentifyTpm, m.CertifyTpm, m.TakeKeys, m.PlugTpm} | {m.QuoteTpm, m.HandOverTpm},
    Phase.LEAVING: _ALWAYS,
    Phase.CLOSING: _ALWAYS,
}
TPM_MAY: dict[Phase, frozenset[type[Record]]] = {
    Phase.EMPTY: frozenset(),
    Phase.BOOTING: frozenset({m.StoreTpm, m.Event, m.TpmPlugged, m.TpmGone}),
    Phase.SERVING: frozenset({m.StoreTpm, m.Event, m.TpmPlugged, m.TpmGone}),
    Phase.LEAVING: frozenset({m.Event, m.TpmPlugged, m.TpmGone}),
    Phase.CLOSING: frozenset({m.StoreTpm, m.Event, m.TpmPlugged, m.TpmGone}),
}

#: Descriptors that one message may carry: those of a device with eight regions and two rings, its connection and its keys.
MAX_DESCRIPTORS = 16

#: Bytes of the memory where a worker notes the keys of live streams: 1,024 of them (hsmvisord/limits.py, MAX_STREAMS).
STREAM_KEYS_SIZE = 1024 * 8

#: Bytes of the memory where a TPM's process notes that it has taken a command, and that it has answered (plain.h, PLAIN_PAGE).
TPM_BUSY_SIZE = 8192

#: What importers of the USB device speak.
USB_PROTOCOLS = ("usbredir", "usbip")

_WITH_ONE = (m.Succeed, m.HandOver, m.TakeConnection, m.UseHsm, m.ServeWorker, m.PlugUsb, m.UsbCame, m.ServeTpm)
_WITH_ONE_OF_A_TPM = (m.TakeKeys,)
_WITH_SOME = (m.PlugDevice, m.DeviceState, m.TpmHandedOver, m.SucceedTpm, m.TpmPlugged, m.PlugTpm)


def descriptors_of(record: Record) -> int:
    """Returns how many descriptors come with it.  Raises MalformedRecord."""
    if isinstance(record, _WITH_SOME):
        if not 0 <= record.descriptors <= MAX_DESCRIPTORS:
            raise MalformedRecord(f"a {record.TYPE} with {record.descriptors} descriptors")
        return record.descriptors
    return int(isinstance(record, _WITH_ONE + _WITH_ONE_OF_A_TPM))


LAUNCHER_MAY_BE_ASKED: frozenset[type[Record]] = frozenset({m.Spawn, m.LauncherStatus})
HSM_MAY_BE_ASKED: frozenset[type[Record]] = frozenset({m.ServeWorker, m.HsmStatus})
PROVIDER_MAY_BE_ASKED: frozenset[type[Record]] = frozenset({m.DeriveKey, m.ProviderStatus})


def by_type(classes: frozenset[type[Record]]) -> dict[str, type[Record]]:
    """Returns the classes by their TYPE."""
    return {c.TYPE: c for c in classes}
