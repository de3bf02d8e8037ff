"""The limits of what may be delivered to a module, in one place."""

MAX_NAME = 64  #: characters of a material's or module's name
MAX_CERTIFICATES = 10  #: certificates of one chain
MAX_CERTIFICATE = 64 * 1024  #: bytes of one DER certificate
MAX_PKCS8 = 32 * 1024  #: bytes of one DER private key
MAX_ENVELOPE = MAX_PKCS8 + 4096  #: bytes of one sealed private key
MAX_SIGNED = 1024 * 1024  #: bytes of one signed command
MAX_ALIAS_ID = 64  #: bytes of an alias CKA_ID
MAX_CLOCK_SKEW = 60  #: seconds that a signer's clock may be ahead of the host's
MAX_COMMAND_LIFETIME = 24 * 3600  #: seconds from issued_at to expires_at
MAX_DRAIN = 10 * 365 * 86400  #: seconds of a drain window
MAX_MATERIALS = 256  #: materials of one module
MAX_GENERATIONS = 16  #: generations of one material that are not destroyed

MAX_NAMES = 100  #: names of one certificate, or of a request for one
MAX_DNS_NAME = 253  #: characters of a host name (RFC 1035, 2.3.4, without the last dot)
MAX_NAME_TEXT = 2048  #: characters of a URI in it, or of an e-mail address
MAX_NAMES_TEXT = 16 * 1024  #: characters of all names of a request, with their kinds
