"""Answers the questions of a module's workers, each on a thread of its own; the hardware is asked one at a time."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading

from hsmvisor_rpc.internal import hsm
from hsmvisor_rpc.sealed.canonical import MalformedRecord, Record

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.hsm.hardware import Hardware, SessionOver


class Service:
    def __init__(self, hardware: Hardware) -> None:
        self._hardware = hardware
        self._one = threading.Lock()
        self._serving = 0
        self._changed = threading.Condition()

    def serve(self, sock: socket.socket) -> None:
        """Answers on `sock` until it closes, in the background."""
        with self._changed:
            self._serving += 1
        threading.Thread(target=self._run, args=(sock,), name="serving", daemon=True).start()

    def wait(self) -> None:
        """Returns when nobody is served any more."""
        with self._changed:
            self._changed.wait_for(lambda: not self._serving)

    def _run(self, sock: socket.socket) -> None:
        try:
            with sock, contextlib.suppress(OSError, MalformedRecord):
                hsm.send(sock, hsm.Welcome(self._hardware.token, self._hardware.mechanisms))
                while (question := hsm.receive(sock, hsm.QUESTIONS)) is not None:
                    hsm.send(sock, self._answer(question))
        finally:
            with self._changed:
                self._serving -= 1
                self._changed.notify_all()

    def _answer(self, question: Record) -> Record:
        try:
            with self._one:
                return self._ask(question)
        except CkError as error:
            return hsm.Failed(error.rv, str(error))
        except MalformedRecord:
            return hsm.Failed(ck.CKR_MECHANISM_PARAM_INVALID, "a parameter that cannot be")
        except SessionOver as error:
            print(f"hsmvisord: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        except Exception as error:
            return hsm.Failed(ck.CKR_DEVICE_ERROR, f"{type(error).__name__} in the helper")

    def _ask(self, question: Record) -> Record:
        hardware = self._hardware
        match question:
            case hsm.Use():
                return hsm.Data(hardware.use(question, hsm.decode_parameter(question.parameter)))
            case hsm.MakePair():
                return hardware.make_pair(question)
            case hsm.MakeSecret():
                return hardware.make_secret(question)
            case hsm.TakePrivate():
                return hardware.take_private(question)
            case hsm.TakeSecret():
                return hardware.take_secret(question)
            case hsm.Wrap():
                return hsm.Data(hardware.wrap(question, hsm.decode_parameter(question.parameter)))
            case hsm.Unwrap():
                return hardware.unwrap(question, hsm.decode_parameter(question.parameter))
            case hsm.Export():
                return hsm.Data(hardware.export(question.key))
            case hsm.Destroy():
                hardware.destroy(question.key)
                return hsm.Data(b"")
            case hsm.List():
                return hsm.Keys(hardware.names())
        raise CkError(ck.CKR_FUNCTION_NOT_SUPPORTED, question.TYPE)
