"""What plays the management plane from a command line: root and signer keys, pinned hosts, sealing and sending of material."""

from hsmvisor.authority.pusher import Pusher, SetBack, Staging
from hsmvisor.authority.store import Authority, AuthorityError
from hsmvisor.bundle import Bundle, BundleError

__all__ = ["Authority", "AuthorityError", "Bundle", "BundleError", "Pusher", "SetBack", "Staging"]
