"""What a module needs of its host."""

from __future__ import annotations

from dataclasses import dataclass, field

from hsmvisor.host.config import Config
from hsmvisor.host.hsms import Hsms
from hsmvisor.host.identity import HostIdentity
from hsmvisor.host.launcher import Launcher, TpmLauncher
from hsmvisor.host.measures import Measure
from hsmvisor.host.places import Places
from hsmvisor.host.provider import Provider
from hsmvisor.host.purges import Purges
from hsmvisor.host.state import State
from hsmvisor.host.tpm_ca import TpmCa
from hsmvisor.serving.audit import Audit
from hsmvisor.serving.events import Events


@dataclass(frozen=True)
class Surroundings:
    config: Config
    places: Places
    state: State
    launcher: Launcher
    tpm_launcher: TpmLauncher
    tpm_ca: TpmCa
    provider: Provider
    identity: HostIdentity
    audit: Audit
    events: Events
    hsms: Hsms
    purges: Purges
    lacking: set[Measure] = field(default_factory=set)  #: what workers could not apply, and is said
