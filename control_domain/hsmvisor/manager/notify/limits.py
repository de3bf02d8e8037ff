"""The limits of notices: what channels may be, how long an attempt takes, how often and how long it is tried."""

from __future__ import annotations

from hsmvisor.manager import limits

# ---- configuration
MOST_CHANNELS = 50
MAX_URL = 2000  #: characters
MAX_ADDRESS = 254  #: characters of a mail address (RFC 5321)
MOST_RECIPIENTS = 50
MOST_OWNERS = 1000
MAX_OWNER = limits.MAX_OWNER

# ---- secrets
MAX_SECRET_FILE = 4096  #: bytes
MOST_SECRETS = 4  #: of one webhook: the new one, and those that receivers still know
SECRET_SIZES = range(24, 65)  #: bytes (Standard Webhooks)

# ---- one attempt
CONNECT = 10.0  #: seconds for a connection
STEP = 15.0  #: seconds for each answer
WHOLE = 30.0  #: seconds for all of it, however busy the other side is
AFTER_CUT = 5.0  #: seconds that a thread has to notice that its connection was cut
MAX_REPLIES = 65536  #: bytes that a mail server says in one session

# ---- many
AT_ONCE = 4  #: webhooks of one channel; mails go one after the other
LEASE = 120.0  #: seconds that a manager has for one: more than WHOLE, and time for the database
POLL = 2.0  #: seconds between looks for what other managers wrote
DIGEST_OVER = 20  #: events of one kind that wait: then one mail lists them
DIGEST_MOST = 200  #: in one mail

# ---- again
FIRST_PAUSE = 5.0  #: seconds; each pause is twice the one before
LONGEST_PAUSE = 4 * 3600.0
GIVE_UP = 86400.0  #: seconds after the event, where there was at least one attempt
FORGET = 7 * 86400.0  #: seconds after the event, without any attempt: of channels that are off or gone
SWEEP_EVERY = 600.0
SWEPT_AT_ONCE = 500

# ---- texts
MAX_FAILURE = 300  #: characters
MAX_SUBJECT = 150
