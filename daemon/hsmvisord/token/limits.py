"""What a guest may use of its module, in one place."""

MAX_SESSIONS = 4096  #: sessions of a module, unless the operator sets another number
MAX_CONNECTIONS = 256  #: connections of a module, unless the operator sets another number
MAX_FOUND = 4096  #: object handles that one search keeps
MAX_SESSION_OBJECTS = 1024  #: session objects of one application
MAX_TEMPLATE = 64  #: attributes of one search or one new object
MAX_RANDOM = 64 * 1024  #: bytes of one C_GenerateRandom
MAX_SECRET = 4096  #: bytes of a derived secret
FIRST_SESSION_OBJECT = 0x40000000  #: handles of session objects begin here; those of token objects stay below
RANDOM_START = 3  #: bytes: how far behind it an application begins, by chance
LAST_HANDLE = 0x7FFFFFFF  #: 32-bit guests
VIEW_PAUSE = 2.0  #: seconds after which a search sees the newest generations (DESIGN "Material and generations")
SMALL_JOURNAL = 512  #: bytes of an open operation's requests that are kept in any case
MAX_JOURNAL = 64 * 1024  #: bytes of them at most; beyond, the operation is not handed to a successor
MAX_JOURNALS = 4 * 1024 * 1024  #: bytes of all that are not small
