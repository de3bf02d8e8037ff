"""The limits of what hosts and owners may ask of a manager, in one place."""

from __future__ import annotations

MAX_NAME = 64  #: characters of a host's, a resource's, a material's name
MAX_OWNER = 128  #: characters of an owner's or a group's name
MAX_GROUPS = 64  #: of one owner
MAX_ATTRIBUTES = 64  #: of one resource
MAX_KEY, MAX_VALUE = 64, 256  #: characters of an attribute
MAX_NAMES = 100  #: of one certificate
MAX_TEMPLATE = 512  #: characters of a name as it is asked for
MAX_REQUESTS = 1000  #: of one owner
CANCELLED_KEPT = 90 * 86400  #: seconds that a cancelled request is shown after the last of it is gone
MAX_CRON = 200  #: characters of a schedule
MAX_RESOURCES = 1000  #: that one request names one by one
MAX_SELECTOR = 16  #: attributes of a selector
MAX_LIFETIME = 10 * 365 * 86400  #: seconds of a certificate
MAX_DRAIN = 10 * 365 * 86400  #: seconds
MAX_WHY = 300  #: characters of a reason that somebody gives
MAX_GUESTS = 10_000  #: of one host
MAX_REPORTED = 500  #: guests in one exchange
MAX_RESULTS = 500  #: results in one exchange
MAX_COMMANDS = 200  #: given to a host in one exchange
MAX_MATERIALS = 256  #: of one module
MAX_GENERATIONS = 64  #: of one material in a report
MAX_REPORT = 32 << 20  #: bytes of one request: a host that begins tells of all its guests
MAX_GENERATION = 2**31 - 1  #: number that a module may name
MOST_AHEAD = 1000  #: generations by which a module may be ahead of what is known here
MAX_SEQUENCE = 2**62  #: number of a command that a module may name
MAX_OPERATIONS = 2**62
MAX_HOST_CSR = 8192  #: bytes of a host's own certificate request
MAX_WAIT = 30  #: seconds of an exchange
MAX_DETAIL = 500  #: characters that a host tells of a failure
MAX_VERSION = 64
MAX_BY = 200  #: characters of who made something
MAX_COMMENT = 300  #: characters of what is said of policies
MAX_TOKEN_LIFETIME = 366 * 86400
MAX_JOIN_LIFETIME = 30 * 86400
HEARTBEAT = 20  #: seconds between exchanges that tell nothing
AWAY = 3 * HEARTBEAT  #: seconds of silence after which a host is away
MANAGER_AWAY = 90  #: seconds of silence after which a manager is not listed
COMMAND_LIFETIME = 3600  #: seconds that a command is valid
ENVELOPE_LIFETIME = 24 * 3600 - 60  #: seconds that a key on its way is (sealed.limits.MAX_COMMAND_LIFETIME)
KEPT_GENERATIONS = 6  #: of a material in a module, before the oldest that retires is destroyed
