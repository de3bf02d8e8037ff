"""What guests seed the random generator with (C_SeedRandom; PKCS#11 3.1, 5.20.1)."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable

_FRESH = 32  #: bytes of the generator that each mask is made of, beside the seeds


class Seeds:
    """All seeds of a module as one hash; any thread.  A worker's successor begins without.

    What the generator gives is masked with what the seeds and other bytes of the generator hash to: uniform bytes stay uniform
    whatever is added to them that does not depend on them.  So no seed can weaken the generator; keys are not made of it.
    """

    def __init__(self) -> None:
        self._pool = b""
        self._lock = threading.Lock()

    def add(self, seed: bytes) -> None:
        with self._lock:
            self._pool = hashlib.sha512(self._pool + seed).digest()

    def mixed(self, generate: Callable[[int], bytes], size: int) -> bytes:
        """Returns `size` bytes of the generator, with the seeds mixed in if there are any."""
        random, pool = generate(size), self._pool
        if not pool or not size:
            return random
        mask = hashlib.shake_256(pool + generate(_FRESH)).digest(size)
        return (int.from_bytes(random) ^ int.from_bytes(mask)).to_bytes(size)
