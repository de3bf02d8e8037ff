"""What a browser may send and keep open, in one place."""

from __future__ import annotations

# ---- a request
MAX_FORM = 16 * 1024  #: bytes of a form
MAX_FIELDS = 32  #: of a form
MAX_FIELD = 4096  #: characters of one field
REQUEST_SECONDS = 15.0  #: in which a form has come

# ---- sessions
MOST_SESSIONS = 5000  #: of this manager; the one that was not used for longest ends first
MOST_OF_ONE = 20  #: of one token or certificate

# ---- attempts to log in
BURST, RATE = 10.0, 1 / 6  #: at once, and a second after that, from one address
MOST_ADDRESSES = 10_000  #: that are remembered
LOGGED_BURST, LOGGED_RATE = 50.0, 1.0  #: refusals that stand in the audit log

# ---- events
MOST_STREAMS = 200  #: of all sessions
STREAMS_OF_ONE = 12  #: of one session
HEARTBEAT = 15.0  #: seconds after which an idle stream says that it lives, and whether its session does is looked at

# ---- what pages show
PAGE = 50  #: rows
SHOWN_LINES = 50  #: keys on a material's page
SHOWN_EVENTS = 25  #: beside something else
ATTENTION = 8  #: rows of each kind on the first page
CHART = 30  #: certificates in the chart
FIRST_CHART = 12  #: and in the one on the first page
CERTIFICATES = 300  #: in the table under it
