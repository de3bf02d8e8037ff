"""Where a module's keys are: in its worker, or in hardware behind a helper's socket; destroyed ones are gone from either."""

from __future__ import annotations

import contextlib
import gc
import socket

from hsmvisord.ck import CkError
from hsmvisord.crypto.hardware.provider import HardwareProvider
from hsmvisord.crypto.software import SoftwareProvider

_OTHER = "the module's cryptoprocessor is another one"


class Cryptoprocessor:
    """Software until `use` is called, which comes before any key."""

    def __init__(self) -> None:
        self.provider: SoftwareProvider | HardwareProvider = SoftwareProvider()
        self._collected = 0  #: version of the state whose keys alone are left in hardware

    @property
    def _hardware(self) -> HardwareProvider | None:
        return self.provider if isinstance(self.provider, HardwareProvider) else None

    def use(self, sock: socket.socket) -> None:
        """The keys are behind this socket.  Raises Away."""
        provider = self._hardware or HardwareProvider()
        self.provider = provider
        provider.connect(sock)

    def go_on(self, sock: socket.socket) -> None:
        """Another helper takes the place of one that ended.  Raises Away, and ValueError for keys in software."""
        if self._hardware is None:
            sock.close()
            raise ValueError(_OTHER)
        self._hardware.connect(sock)

    def check(self, wanted: str) -> None:
        """Raises ValueError: keys do not move from hardware to software, nor back.  `wanted`: as Settings.cryptoprocessor."""
        if bool(wanted) != (self._hardware is not None):
            raise ValueError(_OTHER)

    def retire(self, wanted: bool) -> None:
        """What is dropped here while a successor is made, that may still have."""
        if self._hardware is not None:
            self._hardware.retired = wanted

    def sweep(self) -> None:
        """Once the whole state is loaded: what an earlier worker left in hardware goes."""
        if self._hardware is not None:
            with contextlib.suppress(CkError):  # tried again at the next start
                self._hardware.sweep()

    def forget(self, destroyed: bool, version: int) -> None:
        """A destroyed key leaves the memory now; keys and what is cached of them refer to each other: a collection frees them.
        From hardware goes what no object refers to any more, after each change of the state (`version`)."""
        changed = self._hardware is not None and version != self._collected
        if destroyed or changed:
            self._collected = version
            gc.collect()
        with contextlib.suppress(CkError):  # tried again with the next one
            self.provider.clean()
