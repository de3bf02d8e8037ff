"""What a tour has running: a manager, and hosts that have joined it; and who types: an operator, alice, each host's root."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from processes import Processes, answers, free_port, listens, wait_for
from steps import BIN, ROOT, run, say

#: The web console comes with the manager.
CONSOLE = (ROOT / "control_domain/hsmvisor/manager/console/__init__.py").exists()


class ManagerService:
    """hsmvisor-manager, all of whose files are in one directory.  `database`: a URL; empty: a file of SQLite."""

    def __init__(self, processes: Processes, directory: Path, database: str = "", console: bool = False) -> None:
        self.directory, self._processes, self.database = directory, processes, database
        self.control = directory / "run/control.sock"
        self.port, self.join_port = free_port(), free_port()
        self.console_port = free_port() if console and CONSOLE else 0
        self.log = directory / "log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def console(self) -> str:
        return f"http://127.0.0.1:{self.console_port}/"

    @property
    def ports(self) -> list[int]:
        return [self.port, self.join_port]

    def start(self) -> None:
        self.directory.mkdir()
        config = self.directory / "manager.toml"
        config.write_text(
            f'name = "manager-1"\nstate_directory = "{self.directory}/state"\nruntime_directory = "{self.directory}/run"\n'
            f'[database]\nurl = "{self.database}"\n'
            f'[tls]\naddress = "127.0.0.1:{self.port}"\npublic = ["127.0.0.1:{self.port}"]\n'
            f'[join]\naddress = "127.0.0.1:{self.join_port}"\npublic = ["127.0.0.1:{self.join_port}"]\n'
            + (f'[console]\naddress = "127.0.0.1:{self.console_port}"\nplain = true\n' if self.console_port else "")
        )
        log = str(self.log.relative_to(self._processes.place))
        self._process = self._processes.start(BIN / "hsmvisor-manager", "--config", config, log=log)

    def wait(self) -> None:
        assert self._process is not None
        wait_for(lambda: answers(self.control), self._process, [self.log], "hsmvisor-manager")
        if self.console_port:
            wait_for(lambda: listens(self.console_port), self._process, [self.log], "the manager's console")


class HostService:
    """hsmvisor-host, all of whose files are in one directory."""

    def __init__(self, processes: Processes, directory: Path, managers: ManagerService) -> None:
        self.name, self.directory, self._processes, self._managers = directory.name, directory, processes, managers
        self.control = directory / "run/control.sock"
        self.log = directory / "log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.directory.mkdir()
        config = self.directory / "host.toml"
        config.write_text(
            f'state_directory = "{self.directory}/state"\nruntime_directory = "{self.directory}/run"\n'
            f"[guests]\nsocket_mode = 0o666\n[workers]\nstop_with_host = true\n[manager]\nports = {self._managers.ports}\n"
        )
        log = str(self.log.relative_to(self._processes.place))
        self._process = self._processes.start(BIN / "hsmvisor-host", "--config", config, log=log)

    def wait(self) -> None:
        assert self._process is not None
        wait_for(lambda: answers(self.control), self._process, [self.log], f"hsmvisor-host of {self.name}")

    def module(self, guest: str) -> str:
        """Returns the address by which the guest's programs reach its module."""
        return f"unix:path={self.directory}/run/modules/{guest}/pkcs11.sock"


class Site:
    """All files are in `place`; `stop` ends every process that was started."""

    def __init__(self, place: Path, *hosts: str, console: bool = False) -> None:
        self.place = place
        self.processes = Processes(place)
        self.manager = ManagerService(self.processes, place / "manager", console=console)
        self.hosts = {name: HostService(self.processes, place / name, self.manager) for name in hosts}

    def stop(self) -> None:
        self.processes.stop()

    def start(self) -> None:
        """The manager and all hosts, side by side."""
        self.manager.start()
        for host in self.hosts.values():
            host.start()
        self.manager.wait()
        for host in self.hosts.values():
            host.wait()

    # ---- who types commands -----------------------------------------------------------------------------------------

    def environment(self, who: str) -> dict[str, str]:
        """The operator comes by the manager's local socket, alice by TLS with her token, a host's root to that host."""
        if who in self.hosts:
            return {"HSMVISOR_HOST": f"unix:{self.hosts[who].control}", "HSMVISOR_AUTHORITY": str(self.place / "authority")}
        if who == "alice":
            return {"HSMVISOR_MANAGER_FILE": str(self.place / "alice.toml")}
        return {"HSMVISOR_MANAGER": f"unix:{self.manager.control}"}

    def hsmvisor(self, who: str, *words: str | Path, show: bool = True) -> str:
        """Runs it where the tour's files are, so that their names are short; returns what it printed."""
        log = self.hosts[who].log if who in self.hosts else self.manager.log
        more = self.environment(who)
        return run(BIN / "hsmvisor", *words, do=f"see {log}", show=show, more=more, who=who, where=self.place, timeout=330)

    def tell(self, who: str, *words: str | Path) -> None:
        """Runs it and shows what it printed, but for how far it was while it waited."""
        for line in self.hsmvisor(who, *words).strip().splitlines():
            if not line.endswith("..."):
                say(line.rstrip())

    def query(self, who: str, *words: str) -> Any:
        return json.loads(self.hsmvisor(who, "--json", *words, show=False))

    # ---- what all tours do ------------------------------------------------------------------------------------------

    def join(self, *owners: str) -> None:
        """Each host joins with a token of its own; `owners`: whose guests they may report."""
        for name in self.hosts:
            said = [word for owner in owners for word in ("--owner", owner)]
            self.hsmvisor("operator", "fleet", "host", "token", "--for", name, *said, "--out", f"{name}.token")
            self.tell(name, "host", "join", "--name", name, f"{name}.token")

    def welcome_alice(self) -> None:
        """She gets an access token, and what tells her where the manager is and whom to believe."""
        self.hsmvisor("operator", "fleet", "token", "create", "--owner", "alice", "--lifetime", "1d", "--out", "alice.token")
        state = self.manager.directory / "state"
        (self.place / "alice.toml").write_text(
            f'address = "127.0.0.1:{self.manager.join_port}"\nca = "{state}/authorities.pem"\ntoken_file = "alice.token"\n'
            f'root = "{(state / "fleet/root/root.pub").read_text().strip()}"\n'
        )

    def roots(self) -> Path:
        """Returns a file with the authorities' roots, which clients believe."""
        file = self.place / "roots.pem"
        file.write_text(self.hsmvisor("alice", "fleet", "authorities", "--pem", show=False))
        return file
