"""Times and sizes of a guest's connection, in one place."""

FRAME_SECONDS = 10  #: a frame must be complete this long after its first byte; a reply must be taken in this time
RECEIVE = 65536  #: bytes asked of the socket at once
THREAD_STACK = 256 * 1024  #: bytes
MAX_REFUSED = 64  #: connections over the limit that are answered (CKR_HOST_MEMORY) at the same time; others wait in the backlog
MAX_PARKED = 256  #: parked requests of one connection
ACCEPT_PAUSE = 0.05  #: seconds after an accept that failed (no descriptors left)
