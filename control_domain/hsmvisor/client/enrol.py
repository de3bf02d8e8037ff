"""First contact with a host: both ends prove a one-time secret, then the host's identity key is pinned."""

from __future__ import annotations

import hmac
import os
import uuid

import grpc
from hsmvisor_rpc.sealed.identity import enrol_proof
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisor_rpc.v1 import hsmvisor_pb2_grpc as rpc


class WrongHost(Exception):
    """The other end does not know the one-time secret: it is not the host that issued it."""


def enrol(channel: grpc.Channel, secret: str, manager: str, timeout: float = 10) -> bytes:
    """Returns the host's identity key (raw Ed25519, 32 bytes) to pin; raises grpc.RpcError, WrongHost.

    `secret` is the text that HostService.CreateEnrolment gave; `manager` names us in the host's audit log.
    """
    key = secret.strip().encode()
    nonce = os.urandom(32)
    proof = enrol_proof(key, "manager", nonce)
    request = pb.EnrolRequest(request_id=str(uuid.uuid4()), nonce=nonce, proof=proof, manager=manager)
    answer = rpc.HostServiceStub(channel).Enrol(request, timeout=timeout)
    if not hmac.compare_digest(answer.proof, enrol_proof(key, "host", nonce, answer.host_key)):
        raise WrongHost("the host's proof does not fit the secret: somebody else answered")
    return answer.host_key
