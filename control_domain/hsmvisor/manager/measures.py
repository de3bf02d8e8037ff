"""What the manager gives up for itself and the programs that it runs, and what it asks of the kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from hsmvisor.manager.config import Config
from hsmvisor.serving import measures, syscalls
from hsmvisor.serving.measures import Measure, apply
from hsmvisor_rpc.confine import capabilities

#: A socket of others' group; what the issuer needs to give up more, and to keep its memory out of swap.
_CAPABILITIES = frozenset(
    {capabilities.CHOWN, capabilities.FOWNER, capabilities.DAC_OVERRIDE, capabilities.SETPCAP, capabilities.IPC_LOCK}
)


def _before(config: Config) -> Iterator[tuple[str, Callable[[], str]]]:
    yield "core-dumps", measures.no_core
    yield "not-dumpable", measures.not_dumpable
    yield "no-new-privileges", measures.no_new_privileges
    yield "capabilities", lambda: capabilities.keep_only(wanted(config))
    yield "seccomp", syscalls.refuse


def apply_all(config: Config) -> tuple[Measure, ...]:
    """Applies to this process and its children what can be given up before anything is opened."""
    return tuple(apply(name, measure) for name, measure in _before(config))


def confine(config: Config) -> Measure:
    """The last one, once all modules are imported and all directories made, and before there is a second thread."""
    return apply("landlock", lambda: measures.confine_files(config.written(), config.writes + config.issuer.writes, tcp=0))


def wanted(config: Config) -> frozenset[int]:
    """Returns the capabilities that it keeps, where it has them."""
    return _CAPABILITIES | measures.low_ports(config.addresses().values())
