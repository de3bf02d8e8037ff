"""The limits of events: what one may hold, how many are kept, how they are read."""

from __future__ import annotations

from hsmvisor.manager import limits

# ---- what one event holds (the widths of the columns are those of manager/store/tables.py)
MAX_OWNER = limits.MAX_OWNER  #: characters
MAX_REQUEST = 32
MAX_MATERIAL = 64
MAX_RESOURCE = 130
MAX_HOST = 64

MAX_TEXT = 500  #: characters of one text in an event's detail
MAX_KEY = 64  #: characters of the name of one detail
MOST_KEYS = 32  #: details of one event, and of one object in it
MOST_ITEMS = 50  #: of one list in it
MAX_DEPTH = 3  #: objects and lists in one another
LARGEST_NUMBER = 2**63 - 1  #: what readers of JSON understand; larger ones are told as texts
MAX_DETAIL = 8192  #: bytes of the whole detail as JSON

# ---- what is kept
MOST_EVENTS = 1_000_000
LONGEST_KEPT = 400 * 86400.0  #: seconds
PRUNED_AT_ONCE = 1000  #: events that one transaction deletes
MOST_BATCHES = 50  #: of them in one round
PRUNE_EVERY = 3600.0  #: seconds between rounds

# ---- how it is read
LOOK_EVERY = 0.5  #: seconds between looks for what other managers wrote
LOOK_AGAIN = 0.1  #: seconds, while an event is on its way that has a lower number than one that is there
LEAST_PAUSE = 0.02  #: seconds between two looks in any case
READ_AT_ONCE = 500  #: events of one look
REMEMBERED = 2000  #: events in memory, for all followers of this manager
START_WINDOW = 1000  #: newest events among which a missing one may still be on its way
LONGEST_HOLD = 10.0  #: seconds that followers wait for it
MOST_OVERDUE = 1000  #: of those that took longer, that are still looked for
