"""What plays the management plane from a command line: root and signer keys, pinned hosts, sealing and sending of material."""

from hsmvisor.authority.bundle import Bundle, BundleError
from hsmvisor.authority.pusher import Pusher, SetBack, Staging
from hsmvisor.authority.store import Authority, AuthorityError

__all__ = ["Authority", "AuthorityError", "Bundle", "BundleError", "Pusher", "SetBack", "Staging"]
