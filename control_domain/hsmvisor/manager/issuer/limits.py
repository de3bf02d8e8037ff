"""The limits of what the issuer is asked, in one place: both ends keep to them."""

import os

from hsmvisor_rpc.sealed.limits import MAX_CERTIFICATE, MAX_ENVELOPE, MAX_NAME, MAX_NAMES

__all__ = ["MAX_CERTIFICATE", "MAX_ENVELOPE", "MAX_NAME", "MAX_NAMES"]

MAX_TARGETS = 20_000  #: modules that one call seals a key to
PORTION = 1_000  #: of them in one frame
PORTION_BYTES = 4 << 20  #: of envelopes in one frame, but for the last one of them
MAX_CALLS = 64  #: calls at once, those that wait included
MAX_TARGETS_AT_ONCE = 2 * MAX_TARGETS  #: of all these calls together

HOST_ID, MODULE_ID = 32, 16  #: bytes
MAX_ID = 64  #: characters of a line's or a request's id
MAX_NUMBER = (1 << 53) - 1  #: of a generation, of a time
MAX_NAME_TEXT = 2100  #: characters of a certificate's name, with its kind
MAX_GIVEN = 32  #: certificates that come with an imported key, roots included
MAX_SPKI = 8192  #: bytes of a public key
MAX_WRAPPED = MAX_ENVELOPE + MAX_SPKI + 1024  #: bytes of an escrowed key
MAX_SAID = 400  #: characters of a complaint
MAX_PIN = 256  #: bytes of the PIN's file

START_SECONDS = 15.0  #: until it has said that it is ready
PROBE_SECONDS = 10.0  #: of these for its token
CHILD_SECONDS = 120  #: for one key, in the child that makes it
CALL_SECONDS = 600.0  #: for one call, its wait included
END_SECONDS = 2.0  #: that it has to end once its socket is closed
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0  #: seconds before it is started again
STEADY = 30.0  #: seconds of life after which a death counts as the first one again

MAX_OUTGOING = 16 << 20  #: bytes that wait for the manager to read them; children wait then
MAX_MEMORY = 1 << 30  #: bytes of the process, and of each child
MAX_OPEN_FILES = 256
MAX_DEATHS = 8  #: in a row: then it is not started again before somebody asks for it


def children() -> int:
    """How many keys are made at once."""
    return max(2, os.cpu_count() or 2)
