"""What a guest may use of its module and of the time of its host, all in one place; every layer may import this.

Each stands in a test at the limit and one past it.  A guest over a limit is answered with an error, and never closed for it:
a stock p11-kit client dies when its connection does.  Only a frame that is broken or overdue is closed, or a reader that takes
nothing.  What a delivery may hold is the authority's side: hsmvisor_rpc/sealed/limits.py.  That one RSA key (or
prime of domain parameters) is generated at a time is in crypto/generation.py.
"""

from __future__ import annotations

# ---- connections --------------------------------------------------------------------------------------------------------

MAX_CONNECTIONS = 256  #: connections of a module, unless the operator sets another number
MOST_CONNECTIONS = 1024  #: that the operator may set
MAX_REFUSED = 64  #: connections over the limit that are answered (CKR_HOST_MEMORY) at the same time; others wait in the backlog
REFUSED_SECONDS = 10  #: one over the limit is closed this long after it came: its client has its answer, and others wait
MAX_JOINED = 64  #: connections of one application that the library may open
ACCEPTS_AT_ONCE = 16  #: before others have their turn
GREETING_SECONDS = 10  #: the first byte must come this long after the connection
FRAME_SECONDS = 10  #: a frame must be complete this long after its first byte; a reply must be taken in this time
MAX_PROGRAM = 64  #: bytes of a program's name for itself that are kept

# ---- frames and messages ------------------------------------------------------------------------------------------------

MAX_MESSAGE = (1 << 20) + (1 << 16)  #: bytes of a request's message, and of a reply's: 1 MiB of data, and what stands beside it
MAX_PASSED = (1 << 31) - 1  #: of p11-kit: one past MAX_MESSAGE is passed over, for its client dies when a connection is closed
MAX_OPTIONS = 4096  #: bytes of a frame's options
MAX_NATIVE_OPTIONS = 256  #: of them in the native dialect
MAX_ATTRIBUTES = 256  #: attributes of one message, with those of nested arrays
MAX_NESTING = 4  #: depth of templates in templates
MAX_ARRAY = 4096 * 3  #: elements of one array of CK_ULONG
MAX_MECHANISM_ITEMS = 33  #: of a mechanism's parameter: of SP 800-108 with eight data parameters
MAX_PARAMETER = 4096  #: bytes of one mechanism's parameter: an open operation keeps it

# ---- what waits ---------------------------------------------------------------------------------------------------------

RECEIVE = 4096  #: bytes asked of the socket at once: the buffer is filled before and wiped after (glibc.malloc.perturb)
FRAMES_AT_ONCE = 8  #: requests of one connection that are answered before others have their turn
SMALL_FRAME = 64 * 1024  #: bytes of a request or a reply that a connection may always have
MAX_LARGE_REQUESTS = 16 * 1024 * 1024  #: bytes of all larger requests of a module that are coming; others are not read meanwhile
MAX_LARGE_REPLIES = 16 * 1024 * 1024  #: bytes of all larger replies that wait for readers; beyond, CKR_HOST_MEMORY is the reply
MAX_UNSENT = 1 << 20  #: bytes of replies that wait for one slow reader; it is not read from meanwhile
MAX_PARKED = 64  #: parked requests of one connection
MAX_PARKED_ALL = 4096  #: parked requests of a module

# ---- a device of a virtual machine ------------------------------------------------------------------------------------

VSOCK_PORT = 9111  #: where the module listens; a guest connects to this port of cid 2
MAX_STREAMS = 1024  #: vsock streams of a guest, with those whose RST is not sent yet; one more is refused
STREAM_BUFFER = 256 * 1024  #: bytes of one stream that wait for their reader (buf_alloc)
LARGE_STREAMS = 64  #: streams that are opened with such a buffer at the same time
SMALL_STREAM_BUFFER = 16 * 1024  #: bytes: the buffer of all others
MAX_RESETS = 256  #: RST that wait for the guest's buffers; no more of its packets are read meanwhile
MAX_PACKET = 64 * 1024  #: bytes of data in one packet to a guest, and of one stream to it before others have their turn
PACKETS_AT_ONCE = 64  #: of a guest, and of one stream to it, before others have their turn
STREAM_END_SECONDS = 10  #: a stream that is being ended is reset this long after
MAX_RING = 1024  #: descriptors of a ring
MAX_CHAIN = 1 << 20  #: bytes of one chain of descriptors
MAX_REGIONS = 8  #: regions of a guest's memory (vhost-user's own limit)
MAX_VHOST_PAYLOAD = 512  #: bytes of a vhost-user message
VHOST_MESSAGE_SECONDS = 1.0  #: a vhost-user message must be whole this long after its first byte
SUSPEND_SECONDS = 5.0  #: that a device may take to stop between two packets

# ---- a USB device -------------------------------------------------------------------------------------------------------

USB_CHANNELS = 12  #: interfaces for the PKCS#11 library, each one connection of one process: endpoints 3 to 14
MAX_USB_STRING = 252  #: bytes of a string in UTF-16 (bLength is a byte)
MAX_USB_TRANSFER = 1 << 20  #: bytes of one transfer
MAX_PARKED_URBS = 256  #: transfers of a device that wait for data or room; one more ends the device
MAX_PARKED_URB_BYTES = 8 * 1024 * 1024  #: bytes of them that go OUT
MAX_USB_READ = 64 * 1024  #: bytes of a channel in one transfer
MAX_USB_UNSENT = 1 << 20  #: bytes that wait for the importer; it is not read from meanwhile
MAX_USBIP_OPERATIONS = 16  #: questions of one connection before it imports
MAX_USBREDIR_FILTER = 4096  #: bytes of a guest's filter
MAX_USBREDIR_CAPABILITIES = 16  #: words of 32 of them
USBIP_PORT = 3240  #: of vsock, at which a guest's own kernel imports the device
USB_IMPORT_BURST = 10  #: such connections at once
USB_IMPORT_RATE = 0.5  #: and a second after that; beyond, they are refused
USB_IMPORT_SECONDS = 10.0  #: a connection has imported the device this long after it came
MAX_CCID_MESSAGE = 65544  #: bytes of a message to the reader and of an answer, with its head (dwMaxCCIDMessageLength)
MAX_CCID_ANSWERS = 16  #: answers of the reader that nobody has read; beyond, it takes no message

# ---- the TPM ------------------------------------------------------------------------------------------------------------

MAX_TPM_COMMAND = 4096  #: bytes of a command and of a response, with their heads (libtpms' TPM2_MAX_COMMAND_SIZE)
MAX_TPM_BLOB = 512 * 1024  #: bytes of a state blob that QEMU brings, as swtpm has it
MAX_TPM_HASH = 64 * 1024  #: bytes of one HASH_DATA
MAX_TPM_HASHED = 1 << 20  #: and of all between HASH_START and HASH_END
MAX_TPM_LOCALITY = 4  #: that a guest has; higher ones are the module's own
MAX_TPM_CERTIFICATE = 2048  #: bytes, DER (libtpms' MAX_NV_INDEX_SIZE)
MIN_TPM_NONCE, MAX_TPM_NONCE = 8, 64  #: bytes of a quote's nonce
MAX_TSS_CONNECTIONS = 8  #: of the TSS to one TPM; one too many is closed
TPM_LINGER_SECONDS = 0.1  #: that QEMU's next command is waited for in one system call; then in two
TPM_QUESTION_SECONDS = 20.0  #: that the rest of a question may take once it has begun
TPM_MOVE_SECONDS = 900.0  #: from the permission for a machine to go to another host until its state has left, or has come
#: Wrong passwords that a TPM takes before it locks its guest out, seconds until it forgets one, and until that hierarchy does.
#: A power cut counts as one: with libtpms' three a guest that crashes thrice waits a quarter of an hour for its disk's key.
TPM_LOCKOUT = (32, 600, 1000)
TPM_STORE_BURST = 200  #: changes of a TPM's state that are stored at once
TPM_STORE_RATE = 20.0  #: and a second after that; beyond, the guest's commands wait

# ---- a smart card -------------------------------------------------------------------------------------------------------

MAX_APDU = 65544  #: bytes of one command: an extended one with 65535 bytes of data, and both its lengths
MAX_APDU_CHAIN = 65535  #: bytes of data of one command that comes in a chain
MAX_TLV_OBJECTS = 16  #: objects in a row that a guest sends
MAX_CARD_SHOWN = 4096  #: bytes of what a card remembers of what it has shown
CARD_OUT_SECONDS = 2.0  #: that a card stays out when its keys change: OpenSC needs more than 0.3 to notice
CARD_HIDDEN_SECONDS = 1.0  #: after a driver's first message, until it sees a card come: pcscd looks twice before it watches
CARD_PATIENCE = 1.0  #: seconds after which an importer is told again that the card is at work

# ---- threads and their time ---------------------------------------------------------------------------------------------

THREADS = 4  #: that read or sign, of one module
MAX_THREADS = 64  #: of a module's processes, whatever they do (RLIMIT_NPROC of its user)
MAX_OPEN_FILES = 3584  #: of a worker: MOST_CONNECTIONS, both ends of MAX_STREAMS, and the rest; less than lanes.c has room for
TURN = 100_000  #: nanoseconds of processor time after which a worker lets others go first
THREAD_STACK = 256 * 1024  #: bytes
SWEEP = 1.0  #: seconds between looks for overdue frames, and for descriptors after an accept that found none left
SLOW = 150e-6  #: seconds: before the next request of a connection whose last one took longer, another thread takes the lead
SPIN = 100e-6  #: seconds that a reactor looks for the next request before it sleeps
MOST_VAIN = 6  #: looks in vain in a row that still make the pause before the next one longer: 62 ms
LOOK_PAUSE = 1e-3  #: seconds: after the second look in vain it is two of them, and then doubles
ALONE = 8  #: requests in a row of one connection, after which it counts as the only busy one
LANE_THREADS = 4  #: that serve lanes, of one module; at most one a core
LANE_AFTER = 8  #: equal requests in a row, after which a connection gets a lane
LANE_SECONDS = 1.0  #: that a hand-over waits for lanes to end
LANE_MOST = 4096  #: of them at most: a lane that served less than a connection waited for it comes later the next time

# ---- sessions, objects, results -----------------------------------------------------------------------------------------

MOST_IN_POLICY = 1_000_000  #: bits, operations a second, operations at once
MAX_SESSIONS = 4096  #: sessions of a module, unless the operator sets another number
MOST_SESSIONS = 65536  #: that the operator may set
MAX_FOUND = 32768  #: object handles that one search keeps: of all objects that an application can see
MAX_FOUND_ALL = 1 << 20  #: object handles that all open searches of a module keep
MAX_SESSION_OBJECTS = 1024  #: session objects of one application
MAX_SESSION_OBJECTS_ALL = 8192  #: session objects of a module
MAX_TEMPLATE = 64  #: attributes of one search or one new object
MAX_VALUE = 1024  #: bytes of one attribute that a guest gives a new object
MAX_OBJECT_VALUE = 32 * 1024  #: of a key's part, a certificate and data
MAX_RANDOM = 64 * 1024  #: bytes of one C_GenerateRandom, and of one C_SeedRandom
MAX_SECRET = 4096  #: bytes of a derived secret
FIRST_SESSION_OBJECT = 0x40000000  #: handles of session objects begin here; those of token objects stay below
RANDOM_START = 3  #: bytes: how far behind it an application begins, by chance
LAST_HANDLE = 0x7FFFFFFF  #: 32-bit guests
VIEW_PAUSE = 2.0  #: seconds after which a search sees the newest generations (DESIGN "Material and generations")
MAX_CACHED_VIEWS = 16  #: views that one index remembers
MAX_CACHED_SEARCHES = 128  #: answers that one view remembers
MAX_CACHED_TEMPLATE = 4096  #: bytes of values in a search that is remembered

MAX_GUEST_OBJECTS = 16384  #: token objects that a guest keeps in slot 1
MAX_GUEST_BYTES = 16 * 1024 * 1024  #: bytes of them, with those of their keys
OBJECT_COST = 256  #: bytes that each counts beside its attributes
STORE_BURST = 1000  #: changes of token objects that are stored at once
STORE_RATE = 20.0  #: and a second after that; beyond, CKR_FUNCTION_REJECTED

# ---- operations ---------------------------------------------------------------------------------------------------------

MAX_MULTIPART = 1 << 20  #: bytes of a message in parts that is kept whole (EdDSA, ML-DSA, CCM, GCM decryption)
MAX_MULTIPART_ALL = 16 * 1024 * 1024  #: bytes of all of them in a module
MAX_IV = 1024  #: bytes of a GCM IV
MAX_MADE_IV = 32  #: bytes of an IV that the token makes for a message
MAX_MESSAGE_DATA = 4096  #: bytes of the associated data of a message in parts: an open message keeps it
MAX_SIGNATURE = 8192  #: bytes of a signature that comes before its data (C_VerifySignatureInit): an open operation keeps it
MAX_CONTEXT = 255  #: bytes (FIPS 204, 5.2; RFC 8032, 5.1 and 5.2)
MAX_LABEL = 1024  #: bytes of an OAEP label
MAX_CACHED = 64  #: ready operations of one key: parameters come from the guest
SMALL_JOURNAL = 512  #: bytes of an open operation's requests that are kept in any case
MAX_JOURNAL = 64 * 1024  #: bytes of them at most; beyond, the operation is not handed to a successor
MAX_JOURNALS = 4 * 1024 * 1024  #: bytes of all that are not small

HSM_SECONDS = 30.0  #: that a hardware security module may take for an operation (an RSA key of 4096 bits)
RSA_WAIT = 15.0  #: seconds that a signed command waits for an RSA key that its guest is having made
HSM_WAIT = 3.0  #: seconds that an operation waits for another helper, when the one before it ended

# ---- what a guest makes its host do -------------------------------------------------------------------------------------

PIN_BURST = 20  #: tries of a PIN that change the stored state (wrong ones, and the right one after them), at once
PIN_RATE = 0.2  #: and a second after that; beyond, CKR_PIN_LOCKED
EVENT_BACKLOG = 1000  #: events that wait for the supervisor; older ones are dropped, counted and told
EVENT_BURST = 200  #: connections whose begin and end (or end alone, without an application) are told one by one, at once
EVENT_RATE = 5.0  #: and a second after that; the others are counted and told together
