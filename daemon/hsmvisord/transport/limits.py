"""Times and sizes of a guest's connections, in one place."""

FRAME_SECONDS = 10  #: a frame must be complete this long after its first byte; a reply must be taken in this time
GREETING_SECONDS = 10  #: the first byte must come this long after the connection
RECEIVE = 4096  #: bytes asked of the socket at once: the buffer is filled before and wiped after (glibc.malloc.perturb)
THREAD_STACK = 256 * 1024  #: bytes
FRAMES_AT_ONCE = 8  #: requests of one connection that are answered before others have their turn
MAX_UNSENT = 1 << 20  #: bytes of replies that wait for a slow reader; it is not read from meanwhile
MAX_REFUSED = 64  #: connections over the limit that are answered (CKR_HOST_MEMORY) at the same time; others wait in the backlog
MAX_PARKED = 256  #: parked requests of one connection
ACCEPTS_AT_ONCE = 16  #: before others have their turn
SWEEP = 1.0  #: seconds between looks for overdue frames, and for descriptors after an accept that found none left
THREADS = 4  #: that read or sign, of one module
SLOW = 150e-6  #: seconds: before the next request of a connection whose last one took longer, another thread takes the lead
SPIN = 100e-6  #: seconds that a reactor looks for the next request before it sleeps
MOST_VAIN = 6  #: looks in vain in a row that still make the next one rarer: once in 2**6 sleeps
ALONE = 8  #: requests in a row of one connection, after which it counts as the only busy one
