"""One guest connection: a blocking thread that reads a frame, has it answered and writes the reply."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable

from hsmvisord.face import face
from hsmvisord.face.caller import Caller
from hsmvisord.token.token import Token
from hsmvisord.transport import limits
from hsmvisord.transport.parking import Parking
from hsmvisord.wire.calls import BadMessage, Request, WireError
from hsmvisord.wire.frames import FrameBuffer
from hsmvisord.wire.handshake import negotiate

_TIMEOUT = struct.pack("@ll", limits.FRAME_SECONDS, 0)


class Connection:
    """`run` returns when the connection has ended; `why` then says how.  `begun` is called once, after the handshake."""

    def __init__(
        self, sock: socket.socket, peer: str, token: Token, parking: Parking, refused: bool, begun: Callable[[Connection], None]
    ) -> None:
        self._sock, self._token, self._parking, self._begun = sock, token, parking, begun
        self._send_lock = threading.Lock()
        self._refused, self._peer = refused, peer
        self.caller: Caller | None = None
        self.why = "closed by the client"

    def run(self) -> None:
        try:
            self._sock.setblocking(True)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEOUT)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEOUT)
            first = self._sock.recv(1)
            if not first:
                return
            codec, answer = negotiate(first[0])
            self.caller = Caller(self._token, codec, self._peer, refused=self._refused)
            self._token.add_counters(self.caller.counters)
            self._sock.sendall(answer)
            self._serve(self.caller)
        except WireError as error:
            self.why = f"broken frame: {error}"
        except BlockingIOError:
            self.why = f"the peer did not read or write for {limits.FRAME_SECONDS} s within a frame"
        except OSError as error:
            self.why = f"connection lost: {error.strerror}"
        finally:
            self._end()

    def _serve(self, caller: Caller) -> None:
        recv, buffer, decode = self._sock.recv, FrameBuffer(), caller.codec.decode
        told = False
        while True:
            try:
                data = recv(limits.RECEIVE)
            except BlockingIOError:
                if buffer.mid_frame:
                    raise
                continue
            except InterruptedError:
                continue
            if not data:
                return
            buffer.feed(data)
            while (frame := buffer.next_frame()) is not None:
                try:
                    request = decode(*frame)
                except BadMessage as error:
                    self.send(caller.codec.error(error.request_id, error.rv))
                    continue
                reply = face.handle(caller, request, self._park)
                if reply is not None:
                    self.send(reply)
                if not told and caller.application_or_none is not None:
                    told = True
                    self._begun(self)

    def _park(self, request: Request, ready: Callable[[], tuple[object, ...] | None]) -> None:
        assert self.caller is not None
        self._parking.park(self.caller, request, ready, self._send_later)

    def send(self, frame: bytes) -> None:
        with self._send_lock:
            self._sock.sendall(frame)

    def _send_later(self, frame: bytes) -> None:
        """From the clock thread: a connection that is gone ends itself."""
        with contextlib.suppress(OSError):
            self.send(frame)

    def close(self) -> None:
        """From another thread: `run` returns soon after."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def _end(self) -> None:
        if self.caller is not None:
            self._parking.remove(self.caller)
            if self.caller.application_or_none is not None:
                self._token.leave(self.caller.application_or_none)
            self._token.remove_counters(self.caller.counters)
        self._sock.close()
