"""A module as a vhost-user-vsock device: one thread between a front-end (QEMU), the guest's rings and local sockets.

A guest that does what it must not gets RST where that tells which stream it is about; otherwise the device ends, with the reason.
Whatever happens, the next packet of the guest is read only when the answers to those before have room (limits.MAX_RESETS), and data
of the guest waits in no more memory than its streams were told that there is.

Rings: NO_NOTIFY is never set, so that every buffer that the driver adds is told by a kick.  Where a guest has no buffer for us,
local sockets are not read until it has: a level-triggered poll would spin.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import replace

from hsmvisor_rpc.internal.descriptors import close_descriptors

from hsmvisord import limits, memory
from hsmvisord.transport.vsock.bridges import Bridges
from hsmvisord.transport.vsock.front_end import Change, Ended, FrontEnd, change
from hsmvisord.transport.vsock.keys import StreamKeys
from hsmvisord.transport.vsock.memory import BadMemory, GuestMemory, SharedRing
from hsmvisord.transport.vsock.saved import Saved
from hsmvisord.wire import vhost_user
from hsmvisord.wire.vhost_user import BrokenMessage, Message
from hsmvisord.wire.virtio_vsock import PACKET, Packet, Reset, Streams
from hsmvisord.wire.virtqueue import BrokenQueue, Virtqueue

TO_GUEST, FROM_GUEST = 0, 1
EVENTS = 64  #: at once

_ONE = struct.pack("<Q", 1)
_SUSPEND, _CLOSE = "suspend", "close"


class Device:
    """A device lives until its front-end goes, it is closed, or something about it cannot be; then its streams are closed."""

    def __init__(
        self,
        sock: socket.socket,
        cid: int,
        accept: Callable[[int, str], socket.socket | None],
        keys: StreamKeys,
        saved: Saved | None,
        changed: Callable[[Saved], None],
        ended: Callable[[str], None],
    ) -> None:
        """All callables are called by the device's thread and must not raise.

        `sock`: the connection of the front-end, the device's from now on, as are `keys` and all descriptors of `saved`.
        `accept(port, peer)`: returns the device's end of a socketpair for a port that listens, else None.
        `saved`: what a predecessor told last, or gave when it was suspended; each stream in `keys` that is not in it is reset.
        `changed`: is told all that a successor needs, before the front-end is answered; its descriptors are valid during the call.
        `ended`: once, at the end, with the reason, when all has been given back; not after `close`.
        """
        self.cid = cid
        self._keys, self._changed, self._ended = keys, changed, ended
        self._saved = saved or Saved()
        self._fresh = saved is None
        self._config = struct.pack("<Q", cid)
        self._epoll = select.epoll()
        self._front_end = FrontEnd(sock)
        self._memory = GuestMemory(())
        self._rings: list[SharedRing | None] = [None, None]
        self._queues: list[Virtqueue | None] = [None, None]
        self._completed = [False, False]  #: chains that the driver has not been told of
        self._streams = Streams(cid)
        self._bridges = Bridges(cid, self._streams, keys, self._epoll, accept, self._send_data)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._kicks = [-1, -1]  #: those that are watched
        self._more = False  #: there is work without an event
        self._begun = self._over = False
        self._asked = ""  #: _SUSPEND or _CLOSE; guarded by the lock, as is `_running`
        self._running = False
        self._lock = threading.Lock()
        self._stopped = threading.Condition(self._lock)

    # ---- any thread but the device's own ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the thread."""
        with self._lock:
            self._asked, self._running = "", True
        memory.start_thread("device", self._run)

    def suspend(self) -> Saved:
        """Stops the thread between two packets; returns what a successor goes on with, streams and all.  Then `resume` or `close`.

        Descriptors stay the device's until `close`.  Raises TimeoutError, or OSError when the device has ended.
        """
        self._stop(_SUSPEND)
        if self._over:
            raise OSError("the device has ended")
        return self._bridges.saved(self._saved)

    def resume(self) -> None:
        """Goes on after `suspend`."""
        self.start()

    def close(self) -> None:
        """Stops and gives back all it has.  After `suspend` keys and guest are left alone, for they are a successor's; else streams
        are reset, as far as the guest has room for that, and their keys cleared.  Raises TimeoutError."""
        suspended = self._asked == _SUSPEND
        self._stop(_CLOSE)
        if not self._over:
            if not suspended:
                with contextlib.suppress(BrokenQueue):
                    self._say_goodbye()
            self._give_back(keep_keys=suspended)

    def _stop(self, how: str) -> None:
        with self._stopped:
            self._asked = how
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)
            if not self._stopped.wait_for(lambda: not self._running, limits.SUSPEND_SECONDS):
                self._asked = ""
                raise TimeoutError(f"the device has not stopped in {limits.SUSPEND_SECONDS:g} s")

    @property
    def streams(self) -> int:
        """Returns how many there are."""
        return len(self._streams)

    # ---- the thread -------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        why = ""
        try:
            self._begin()
            while not self._told_to_stop():
                self._turn()
        except (Ended, BrokenMessage, BrokenQueue, BadMemory) as error:
            why = str(error)
        except Exception as error:  # a fault of ours ends this device alone
            why = f"fault: {error!r}"
        if why:
            self._give_back(keep_keys=False)
        with self._stopped:
            self._running = False
            self._stopped.notify_all()
        if why:
            self._ended(why)

    def _told_to_stop(self) -> bool:
        if not self._asked:
            return False
        with self._stopped:
            if self._asked:  # else whoever asked waits no more
                self._running = False
                self._stopped.notify_all()
                return True
        return False

    def _begin(self) -> None:
        """Once; and after `resume` there is all to be looked at again."""
        self._more = True
        if self._begun:
            return
        self._begun = True
        self._handle(self._front_end.sock.fileno(), self._hear)
        self._handle(self._wake, self._woken)
        if self._fresh:
            for key in self._keys.found():
                self._keys.clear(key.slot)
        else:
            saved, self._saved = self._saved, replace(self._saved, streams=(), resets=())
            restored = self._bridges.restore(saved)
            lost = [Reset(key.guest_port, key.our_port, slot=key.slot) for key in self._keys.found() if key.slot not in restored]
            self._streams.reset(lost)
            self._adopt(Saved(), after_another=True)

    def _handle(self, fd: int, handler: Callable[[int], None]) -> None:
        self._epoll.register(fd, select.EPOLLIN)
        self._handlers[fd] = handler

    def _turn(self) -> None:
        for fd, events in self._epoll.poll(0 if self._more else self._bridges.wait(), EVENTS):
            handler = self._handlers.get(fd)
            if handler is not None:
                handler(events)
            else:
                self._bridges.event(fd, events)
        self._bridges.end_overdue()
        self._send_packets()
        self._more = self._take_packets()
        self._signal()

    def _woken(self, events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    # ---- the front-end ----------------------------------------------------------------------------------------------------

    def _hear(self, events: int) -> None:
        message = self._front_end.look()
        if message is None:
            return
        made = self._change(message)
        if made.begins:
            self._bridges.forget_all()
        before, self._saved = self._saved, made.saved
        try:
            if made.saved != before:
                self._adopt(before)
                self._changed(self._saved)
            self._front_end.take()
            if made.answer:
                self._front_end.answer(made.answer)
        except (BadMemory, BrokenQueue):
            if message.need_reply:
                self._refuse(message)
            raise
        finally:
            close_descriptors(made.closed)

    def _change(self, message: Message) -> Change:
        try:
            return change(self._saved, message, self._config, self._position)
        except BrokenMessage:
            if message.need_reply:
                self._refuse(message)
            raise

    def _refuse(self, message: Message) -> None:
        with contextlib.suppress(Ended):
            self._front_end.take()
            self._front_end.answer(vhost_user.reply_number(message.request, 1))

    def _position(self, index: int) -> int:
        queue = self._queues[index]
        return queue.next if queue is not None else self._saved.rings[index].base

    def _adopt(self, before: Saved, after_another: bool = False) -> None:
        """Makes memory and rings what `_saved` says.  Raises BadMemory."""
        saved = self._saved
        remapped = saved.regions != before.regions
        for index in (TO_GUEST, FROM_GUEST):
            ring, old = saved.rings[index], before.rings[index]
            if remapped or ring != old:
                self._stop_ring(index)
        if remapped:
            self._memory.close()
            self._memory = GuestMemory(())
            self._memory = GuestMemory(saved.regions)
        for index in (TO_GUEST, FROM_GUEST):
            if self._queues[index] is None and self._runs(index):
                self._start_ring(index, after_another)

    def _runs(self, index: int) -> bool:
        ring = self._saved.rings[index]
        return ring.started and ring.enabled and bool(self._saved.regions)

    def _start_ring(self, index: int, after_another: bool) -> None:
        place = self._saved.rings[index]
        if not self._saved.features & vhost_user.VIRTIO_F_VERSION_1:
            raise BrokenQueue("a driver without VIRTIO_F_VERSION_1")
        ring = self._rings[index] = SharedRing(self._memory, place)
        self._queues[index] = Virtqueue(ring, self._memory, ring.used_idx() if after_another else place.base)
        for fd in (place.kick, place.call):
            _never_block(fd)
        try:
            self._handle(place.kick, self._kicked_to_guest if index == TO_GUEST else self._kicked_from_guest)
        except OSError as error:  # EPERM: a file
            raise BadMemory(f"a kick descriptor that cannot be waited for: {error.strerror}") from None
        self._kicks[index] = place.kick
        self._more = True  # a kick may have come before
        self._completed[index] = True  # whoever was there before may not have told the driver, or told it by another descriptor
        if index == TO_GUEST:
            self._bridges.ready()

    def _stop_ring(self, index: int) -> None:
        kick, self._kicks[index] = self._kicks[index], -1
        if kick >= 0:
            self._epoll.unregister(kick)
            del self._handlers[kick]
        ring, self._rings[index], self._queues[index] = self._rings[index], None, None
        if ring is not None:
            ring.release()

    # ---- the rings --------------------------------------------------------------------------------------------------------

    def _kicked_to_guest(self, events: int) -> None:
        self._read_kick(TO_GUEST)
        self._bridges.ready()

    def _kicked_from_guest(self, events: int) -> None:
        self._read_kick(FROM_GUEST)

    def _read_kick(self, index: int) -> None:
        try:
            if not os.read(self._kicks[index], 8):
                raise Ended("a kick descriptor that is closed at its other end")
        except BlockingIOError:
            pass
        except OSError as error:
            raise Ended(f"a kick descriptor that cannot be read: {error.strerror}") from None

    def _take_packets(self) -> bool:
        """Takes what the guest sent, as much as is fair; returns whether there may be more."""
        queue = self._queues[FROM_GUEST]
        if queue is None:
            return False
        for _ in range(limits.PACKETS_AT_ONCE):
            if self._streams.full:
                return False  # until the guest takes what waits for it
            chain = queue.peek()
            if chain is None:
                return False
            with chain:
                head = chain.read(0, PACKET.size)
                if len(head) < PACKET.size:
                    raise BrokenQueue(f"a packet of {len(head)} bytes")
                packet = Packet.decode(head)
                data = chain.read(PACKET.size, packet.len)
            stream = self._streams.receive(packet, data)
            if stream is not None:
                self._bridges.changed(stream)
            self._send_packets()  # before it is completed: a successor then takes it again, rather than never answer
            queue.complete(chain, 0)
            self._completed[FROM_GUEST] = True
        return True

    def _send_packets(self) -> None:
        """Gives the guest what needs no data, as far as it has buffers."""
        queue = self._queues[TO_GUEST]
        while queue is not None and self._streams.owes:
            chain = queue.peek()
            if chain is None:
                return
            with chain:
                packet, slot = self._streams.next_packet()
                chain.write(packet.encode())
                queue.complete(chain, PACKET.size)
                self._completed[TO_GUEST] = True
            if slot >= 0:
                self._keys.clear(slot)

    def _send_data(self, receive: Callable[[list[memoryview]], int], most: int, packet: Callable[[int], Packet]) -> int | None:
        """Gives the guest one packet of data: `receive` puts it into the guest's memory and returns how much, 0 at the end.

        Returns what `receive` did, or None when the guest has no buffer.
        """
        self._send_packets()
        queue = self._queues[TO_GUEST]
        chain = queue.peek() if queue is not None and not self._streams.owes else None
        if chain is None or queue is None:
            return None
        with chain:
            if chain.writable_size <= PACKET.size:
                raise BrokenQueue(f"a buffer of {chain.writable_size} bytes for data")
            room = chain.room(PACKET.size, most)
            try:
                count = receive(room)
            finally:
                for view in room:
                    view.release()
            if count:
                chain.write(packet(count).encode())
                queue.complete(chain, PACKET.size + count)
                self._completed[TO_GUEST] = True
            return count

    def _signal(self) -> None:
        for index, completed in enumerate(self._completed):
            queue = self._queues[index]
            if not completed or queue is None:
                continue
            self._completed[index] = False
            call = self._saved.rings[index].call
            if call >= 0 and queue.wants_signal():
                with contextlib.suppress(OSError):  # EAGAIN: enough signals are on their way; else it is the front-end's loss
                    os.write(call, _ONE)

    # ---- the end ----------------------------------------------------------------------------------------------------------

    def _say_goodbye(self) -> None:
        self._bridges.reset_all()
        self._send_packets()
        self._signal()

    def _give_back(self, keep_keys: bool) -> None:
        self._over = True
        if not keep_keys:
            self._bridges.forget_all()
        self._bridges.close()
        for index in (TO_GUEST, FROM_GUEST):
            self._stop_ring(index)
        with contextlib.suppress(BufferError):
            self._memory.close()
        self._front_end.sock.close()
        close_descriptors(self._saved.descriptors())
        self._saved = Saved()
        self._epoll.close()
        with self._lock:
            os.close(self._wake)
            self._wake = -1
        self._keys.close()


def _never_block(fd: int) -> None:
    if fd >= 0:
        with contextlib.suppress(OSError):
            os.set_blocking(fd, False)
