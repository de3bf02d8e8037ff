"""Reaching a host's control API: channels, signed requests, first contact."""

from hsmvisor.client.channel import TlsFiles, connect
from hsmvisor.client.enrol import WrongHost, enrol
from hsmvisor.client.signing import SigningKey

__all__ = ["SigningKey", "TlsFiles", "WrongHost", "connect", "enrol"]
