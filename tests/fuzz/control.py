"""The control API of a real host: messages of every method with arbitrary content, and bytes that are no message.

Not guided by coverage: the host is another process.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from typing import Any

import grpc
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc import StatusCode
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from support.certificates import new_key
from support.host import Host, Module
from support.host_process import reason

INVARIANT = (
    "every call is answered, or refused with a reason of the host's own and a code other than INTERNAL, UNKNOWN and UNAVAILABLE; a "
    "refused call changes nothing; the host goes on with the same workers and writes no traceback"
)

METHODS = tuple(method for service in pb.DESCRIPTOR.services_by_name.values() for method in service.methods_by_name.values())
NEVER = {StatusCode.INTERNAL, StatusCode.UNKNOWN, StatusCode.UNAVAILABLE, StatusCode.UNIMPLEMENTED, StatusCode.DATA_LOSS}
WITHIN = 20.0  #: seconds for one call
STREAM = 0.05  #: seconds that a stream is listened to

TEXTS = ("", "a", "web", "no-such", "-bad", "A", "ü", "\0", "x" * 65, "y" * 5000, "../etc", "{}", "a\nb", "MTIz", "====", "🔑" * 70)


def _bytes(rng: random.Random) -> bytes:
    size = rng.choice((0, 1, 16, 31, 32, 33, 64, 255, 256, 1500, 70_000))
    return rng.randbytes(size)


class ControlFuzzer:
    """`run` makes so many calls; a module with material is there for them to meet."""

    def __init__(self, host: Host, seed: int) -> None:
        self.host, self.rng = host, random.Random(seed)
        self.module: Module = host.create(f"fuzz-{os.getpid()}")
        self.module.push("web", new_key("p256"))
        self.names = [self.module.name, f"{self.module.name}-new"]
        self.messages = [b""]
        self.codes: Counter[str] = Counter()
        self.channel = host.process.connect()

    # ---- what is asked ------------------------------------------------------------------------------------------

    def message(self, kind: Descriptor) -> Message:
        made = GetMessageClass(kind)()
        for field in kind.fields:
            if self.rng.random() < 0.85:
                self._fill(made, field)
        return made

    def _fill(self, made: Message, field: FieldDescriptor) -> None:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
            for _ in range(self.rng.choice((0, 1, 2, 40, 400))):
                getattr(made, field.name)[self._value(key)] = self._value(value)
        elif field.message_type is not None:
            getattr(made, field.name).CopyFrom(self.message(field.message_type))
        elif field.is_repeated:
            getattr(made, field.name).extend(self._value(field) for _ in range(self.rng.choice((0, 1, 2, 40, 400))))
        else:
            setattr(made, field.name, self._value(field))

    def _value(self, field: FieldDescriptor) -> Any:
        rng = self.rng
        if field.type == field.TYPE_STRING:
            likely = {"name": self.names, "module": self.names, "request_id": [f"{rng.getrandbits(64):x}", "again"]}
            likely["cryptoprocessor"] = [""]
            likely["mechanisms"] = ["ECDSA", "CKM_EDDSA", "sha256-rsa-pkcs"]
            texts = likely.get(field.name, TEXTS) if rng.random() < 0.7 else TEXTS
            return rng.choice(texts)
        if field.type == field.TYPE_BYTES:
            return _bytes(rng)
        if field.type == field.TYPE_BOOL:
            return rng.random() < 0.5
        signed = field.type in (field.TYPE_INT32, field.TYPE_INT64, field.TYPE_ENUM)
        width = 32 if field.type in (field.TYPE_INT32, field.TYPE_UINT32, field.TYPE_ENUM) else 64
        numbers = (0, 1, 2, 1000, 2**31 - 1, -(2**31) if signed else 2**width - 1, rng.getrandbits(width - signed))
        return rng.choice(numbers)

    def body(self, method: MethodDescriptor) -> bytes:
        """A message, or a damaged one, or what was meant for another method."""
        rng = self.rng
        what = rng.random()
        if what < 0.15:
            return rng.choice(self.messages)
        data = self.message(method.input_type).SerializeToString()
        self.messages = [*self.messages[-50:], data]
        if what < 0.7:
            return data
        if what < 0.75:
            return rng.randbytes(rng.choice((1, 5, 40)))
        damaged = bytearray(data or b"\n\1a")
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(damaged))
            damaged[at : at + rng.randint(0, 2)] = rng.randbytes(rng.randint(0, 3))
            damaged = damaged or bytearray(b"\0")
        return bytes(damaged)

    # ---- what is answered ---------------------------------------------------------------------------------------

    def run(self, calls: int) -> None:
        before = self.everything()
        for _ in range(calls):
            method = self.rng.choice(METHODS)
            body = self.body(method)
            code = self.call(method, body)
            self.codes[code.name] += 1
            after = self.everything()
            if code is not StatusCode.OK:
                assert after == before, f"{method.name} was refused with {code.name} and changed something: {body.hex()}"
            before = after
        self.check_host()

    def call(self, method: MethodDescriptor, body: bytes) -> StatusCode:
        path = f"/{method.containing_service.full_name}/{method.name}"
        parse = GetMessageClass(method.output_type).FromString
        metadata = (("hsmvisor-why", self.rng.choice(("", "fuzzing", "x" * 400, "a ~ b"))),)
        try:
            if method.server_streaming:
                for count, _ in enumerate(self.channel.unary_stream(path, None, parse)(body, timeout=STREAM, metadata=metadata)):
                    if count > 20:
                        break
            else:
                self.channel.unary_unary(path, None, parse)(body, timeout=WITHIN, metadata=metadata)
        except grpc.RpcError as error:
            code = error.code()
            if code is StatusCode.DEADLINE_EXCEEDED and method.server_streaming:
                return StatusCode.OK
            assert code not in NEVER, f"{method.name}: {code.name} {error.details()}: {body.hex()}"
            assert code is not StatusCode.DEADLINE_EXCEEDED, f"{method.name} was not answered in {WITHIN} s: {body.hex()}"
            assert reason(error)[1]
            return code
        return StatusCode.OK

    def everything(self) -> Any:
        """What no refused call may change."""
        process = self.host.process
        rows = []
        for module in process.modules.ListModules(pb.ListModulesRequest(page_size=1000), timeout=WITHIN).modules:
            module.connections = module.sessions = 0
            rows.append(module.SerializeToString(deterministic=True))
            if module.name in self.names and module.state == "serving":
                asked = pb.ListMaterialsRequest(module=module.name)
                rows.append(process.material.ListMaterials(asked, timeout=WITHIN).SerializeToString(deterministic=True))
        return rows

    def check_host(self) -> None:
        assert self.host.process.process is not None
        assert self.host.process.process.poll() is None
        log = self.host.process.log.read_text()
        assert "Traceback" not in log, log[log.index("Traceback") :][:3000]

    def clean(self) -> None:
        for module in self.host.process.modules.ListModules(pb.ListModulesRequest(), timeout=WITHIN).modules:
            if module.name in (*self.names, *TEXTS):
                Module(self.host, module.name, module.address).destroy()
