"""What one frame may hold, in one place.  Bytes unless said otherwise."""

MAX_MESSAGE = 1 << 20
MAX_PASSED = (1 << 31) - 1  #: of p11-kit; what is past MAX_MESSAGE is passed over: its client dies when a connection is closed
MAX_OPTIONS = 4096
MAX_NATIVE_OPTIONS = 256
MAX_ATTRIBUTES = 256  #: attributes of one message, with those of nested arrays
MAX_NESTING = 4  #: depth of templates in templates
MAX_ARRAY = 4096 * 3  #: elements of one array of CK_ULONG
MAX_MECHANISM_ITEMS = 8
