"""A guest as it is in service: Debian in a virtual machine of QEMU, where a module can be plugged in as a PCI device.

The image comes from scripts/guest-image.  Commands go over a virtio-serial port to scripts/guest/agent.py.  Whatever a
machine writes to its disk is gone when it is closed, and QEMU does not outlive the process that started it.
"""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qemu.qmp import ConnectError, QMPError
from support.accelerator import accelerator
from support.guest import REPOSITORY, free_port
from support.guest_channel import Channel
from support.qmp import Event, Monitor

PORTS = ("rp0", "rp1", "rp2")  #: PCI Express root ports, empty but for the device from the start, which sits in rp0
MEMORY = 256  #: MiB
COMMAND_LINE = "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check"  #: of the guest's kernel
GRACE = 15  #: seconds that the guest has for an answer beyond the time that a command was given
PIECE = 1 << 18  #: bytes of a file that are copied in one request

Command = str | Sequence[str | Path]


@functools.cache
def image() -> Path:
    """The guest's image, built if it is not there: vmlinux, initramfs, root.ext4."""
    script = [str(REPOSITORY / "scripts/guest-image"), "--quiet"]
    result = subprocess.run(script, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.splitlines()[-1])


def _arguments(command: Command) -> list[str]:
    return ["sh", "-c", command] if isinstance(command, str) else [str(part) for part in command]


class GuestMachine:
    """One machine.  `device_socket` is where a vhost-user-vsock device of the start listens already; `share=False` gives it memory
    that no device can map; `arguments` are more of QEMU's.  With `network`, the host's loopback is 10.0.2.2 in the guest.

    `firmware` (a file, as QEMU's -bios takes it) starts the kernel, or what is on `boot_disk`.  `root` is written to, not
    the image.  With `incoming` (as QEMU's option) the guest comes from another machine, and `boot` does not wait for it.

    `qmp_socket` is a second monitor, for whoever else has to talk to QEMU.
    """

    def __init__(
        self,
        device_socket: Path | None = None,
        *,
        memory: int = MEMORY,
        cpus: int = 1,
        network: bool = True,
        share: bool = True,
        firmware: str = "qboot.rom",
        boot_disk: Path | None = None,
        root: Path | None = None,
        incoming: str = "",
        arguments: Sequence[str] = (),
    ) -> None:
        self.device_socket, self.memory, self.cpus, self.network, self.share = device_socket, memory, cpus, network, share
        self.firmware, self.boot_disk, self.root, self.incoming = firmware, boot_disk, root, incoming
        self.more = tuple(arguments)
        self.directory = Path(tempfile.mkdtemp(prefix="hsmg."))  # short: names of sockets are
        self.qmp_socket = self.directory / "qmp.sock"
        self.console = self.directory / "console"
        self.boot_seconds = 0.0  #: from QEMU's start to the first command's answer
        self._log = self.directory / "qemu.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._parent: ThreadPoolExecutor | None = None
        self._monitor: Monitor | None = None
        self._channel: Channel | None = None
        self._renewing = threading.Lock()

    # --- its life

    def _qemu(self) -> list[str]:
        files = image()
        share = "on" if self.share else "off"
        result = ["-accel", accelerator(files), "-machine", "q35,memory-backend=ram", "-cpu", "max", "-smp", str(self.cpus)]
        result += ["-m", str(self.memory), "-object", f"memory-backend-memfd,id=ram,size={self.memory}M,share={share}"]
        result += ["-nodefaults", "-no-user-config", "-display", "none", "-bios", self.firmware, "-serial", f"file:{self.console}"]
        if self.boot_disk is None:
            result += ["-kernel", str(files / "vmlinux"), "-initrd", str(files / "initramfs"), "-append", COMMAND_LINE]
        else:
            result += ["-drive", f"file={self.boot_disk},format=raw,if=none,id=boot,snapshot=on"]
            result += ["-device", "ide-hd,drive=boot,bootindex=0"]
        kept = f"{files / 'root.ext4'},snapshot=on" if self.root is None else self.root
        result += ["-drive", f"file={kept},format=raw,if=virtio,cache=unsafe"]
        if self.incoming:
            result += ["-incoming", self.incoming]
        for name, path in (("qmp", self.qmp_socket), ("own", self.directory / "own.sock")):
            result += ["-chardev", f"socket,id={name},path={path},server=on,wait=off", "-mon", f"chardev={name},mode=control"]
        result += ["-chardev", f"socket,id=agent,path={self.directory / 'agent.sock'},server=on,wait=off"]
        result += ["-device", "virtio-serial-pci", "-device", "virtserialport,chardev=agent,name=agent"]
        for number, port in enumerate(PORTS):
            result += ["-device", f"pcie-root-port,id={port},chassis={number + 1},bus=pcie.0"]
        if self.network:
            result += ["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="]
        if self.device_socket is not None:
            result += ["-chardev", f"socket,id=vsock,path={self.device_socket}"]
            result += ["-device", f"vhost-user-vsock-pci,id=vsock,chardev=vsock,bus={PORTS[0]}"]
        return [*result, *self.more]

    def _launch(self, command: list[str]) -> subprocess.Popen[bytes]:
        with self._log.open("wb") as log:
            return subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"TMPDIR": str(self.directory)},
            )

    def boot(self, within: float = 120) -> Self:
        """Returns when the guest carries out commands, or can come."""
        begin = time.monotonic()
        try:
            command = ["qemu-system-x86_64", *self._qemu()]
            begin = time.monotonic()
            # The signal comes when the thread that started QEMU ends, so one is kept for that.
            self._parent = ThreadPoolExecutor(1, "qemu")
            self._process = self._parent.submit(self._launch, command).result()
            self._monitor = self._connected(within)
            self._channel = Channel(self.directory / "agent.sock")
            if not self.incoming:
                self.wait_ready(within)
        except BaseException:
            self.close()
            raise
        self.boot_seconds = time.monotonic() - begin
        return self

    def _connected(self, within: float) -> Monitor:
        end = time.monotonic() + within
        while True:
            try:
                return Monitor(self.directory / "own.sock", self._happened)
            except ConnectError:
                assert self.running, f"QEMU ended with {self._process and self._process.returncode}:\n{self.said()}"
                assert time.monotonic() < end, f"QEMU has no monitor after {within} s:\n{self.said()}"
                time.sleep(0.02)

    def wait_ready(self, within: float = 120) -> None:
        """Waits until the guest carries out commands."""
        try:
            self._call("run", within, command=["true"], timeout=within, environment={}, directory="/")
        except TimeoutError as error:
            raise TimeoutError(f"the guest has not started: {error}") from None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """QEMU's."""
        assert self._process is not None
        return self._process.pid

    def said(self) -> str:
        """The end of what QEMU and the guest's kernel wrote."""
        return "\n".join(p.read_text(errors="replace")[-3000:] for p in (self._log, self.console) if p.exists())

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close("the machine is switched off")
        if self._monitor is not None:
            self._monitor.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait(30)
        if self._parent is not None:
            self._parent.shutdown()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.boot()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # --- commands

    def _call(self, do: str, within: float, body: bytes = b"", **values: Any) -> tuple[dict[str, Any], bytes]:
        with self._renewing:
            channel = self._channel
        assert channel is not None, "the machine was not booted"
        try:
            return channel.call({"do": do} | values, body, within)
        except TimeoutError:
            raise TimeoutError(f"no answer within {within} s; {self._state()}:\n{self.said()}") from None
        except ConnectionError as error:
            raise ConnectionError(f"{error}; {self._state()}") from None

    def _state(self) -> str:
        if not self.running:
            return f"QEMU has ended with {self._process and self._process.returncode}"
        try:
            return f"the machine is {self.qmp('query-status')['status']}"
        except (QMPError, TimeoutError, OSError) as error:
            return f"QEMU does not answer ({error})"

    def run(
        self,
        command: Command,
        *,
        stdin: bytes = b"",
        timeout: float = 30,
        check: bool = True,
        more: dict[str, str] | None = None,
        directory: str = "/root",
    ) -> subprocess.CompletedProcess[bytes]:
        """A string is for the shell.  Raises TimeoutError, with what the command had written, after it was killed; ConnectionError
        if the machine was reset or ended meanwhile; AssertionError, with `check`, if it failed."""
        arguments = _arguments(command)
        shown = command if isinstance(command, str) else shlex.join(arguments)
        values = {"command": arguments, "timeout": timeout, "environment": more or {}, "directory": directory}
        reply, data = self._call("run", timeout + GRACE, stdin, **values)
        result = subprocess.CompletedProcess(arguments, reply["code"], data[: reply["split"]], data[reply["split"] :])
        written = (result.stdout + result.stderr).decode(errors="replace")
        if reply["timed_out"]:
            raise TimeoutError(f"in the guest `{shown}` did not end within {timeout} s and was killed; it had written:\n{written}")
        assert not check or result.returncode == 0, f"in the guest `{shown}` ended with {result.returncode}:\n{written}"
        return result

    def start(
        self, command: Command, *, output: str = "/dev/null", more: dict[str, str] | None = None, directory: str = "/root"
    ) -> GuestProcess:
        """Starts it in the background; what it writes goes to the guest's file `output`."""
        values = {"command": _arguments(command), "output": output, "environment": more or {}, "directory": directory}
        reply, _ = self._call("start", GRACE, **values)
        return GuestProcess(self, reply["pid"], output)

    # --- files

    def write(self, path: str | Path, content: bytes | str, mode: int = 0o644) -> None:
        data = content.encode() if isinstance(content, str) else content
        for offset in range(0, max(len(data), 1), PIECE):
            self._call("write", 60, data[offset : offset + PIECE], path=str(path), offset=offset, mode=mode)

    def read(self, path: str | Path) -> bytes:
        parts: list[bytes] = []
        while not parts or len(parts[-1]) == PIECE:
            parts.append(self._call("read", 60, path=str(path), offset=len(parts) * PIECE, size=PIECE)[1])
        return b"".join(parts)

    def copy_in(self, source: Path, destination: str | Path) -> None:
        """Copies a file's content and mode."""
        self.write(destination, source.read_bytes(), source.stat().st_mode & 0o7777)

    def copy_out(self, source: str | Path, destination: Path) -> None:
        destination.write_bytes(self.read(source))

    # --- the machine

    @property
    def monitor(self) -> Monitor:
        assert self._monitor is not None, "the machine was not booted"
        return self._monitor

    def qmp(self, command: str, within: float = 30, **arguments: Any) -> Any:
        """In the names of arguments `_` stands for `-`.  Raises as Monitor.execute does."""
        return self.monitor.execute(command, {name.replace("_", "-"): value for name, value in arguments.items()}, within)

    def _happened(self, event: Event) -> None:
        # What was under way at a reset is lost, half a message perhaps: both sides begin anew.
        if event["event"] == "RESET":
            with self._renewing:
                if self._channel is not None:
                    self._channel.close("the machine was reset")
                    self._channel = Channel(self.directory / "agent.sock")

    def reset(self, within: float = 240) -> float:
        """As by the button; returns when the guest carries out commands again, after how many seconds."""
        begin, mark = time.monotonic(), self.monitor.mark()
        self.qmp("system_reset")
        self.monitor.wait("RESET", mark)
        while True:
            mark = self.monitor.mark()
            try:
                self.wait_ready(within)
                return time.monotonic() - begin
            except ConnectionError:  # SeaBIOS resets the machine once more
                self.monitor.wait("RESET", mark, 1)

    def stop(self) -> None:
        self.qmp("stop")

    def cont(self) -> None:
        self.qmp("cont")

    def plug(self, socket: Path, name: str = "vsock", port: str = PORTS[0]) -> None:
        """Plugs in the vhost-user-vsock device that listens on `socket`."""
        address = {"type": "unix", "data": {"path": str(socket)}}
        self.qmp("chardev-add", id=name, backend={"type": "socket", "data": {"addr": address, "server": False}})
        try:
            self.qmp("device_add", driver="vhost-user-vsock-pci", id=name, chardev=name, bus=port)
        except QMPError:
            self.qmp("chardev-remove", id=name)
            raise

    def unplug(self, name: str = "vsock", within: float = 30) -> None:
        mark = self.monitor.mark()
        self.qmp("device_del", id=name)
        self.monitor.wait("DEVICE_DELETED", mark, within, device=name)
        self.qmp("chardev-remove", id=name)

    def forward(self, guest_port: int) -> int:
        """Returns a TCP port of the host's loopback that leads to `guest_port`."""
        port = free_port()
        said = self.qmp("human-monitor-command", command_line=f"hostfwd_add net tcp:127.0.0.1:{port}-:{guest_port}")
        assert not said, said
        return port

    def dump_memory(self, path: Path) -> None:
        """Writes all of the guest's memory to `path`, as an ELF core file; the machine stands still meanwhile."""
        self.qmp("dump-guest-memory", 120, paging=False, protocol=f"file:{path}")


class GuestProcess:
    """A program that runs in a guest's background."""

    def __init__(self, machine: GuestMachine, pid: int, path: str) -> None:
        self.machine, self.pid, self._path = machine, pid, path

    def output(self) -> bytes:
        return self.machine.read(self._path)

    def poll(self) -> int | None:
        code: int | None = self.machine._call("wait", GRACE, pid=self.pid, timeout=0)[0]["code"]
        return code

    def wait(self, timeout: float = 30) -> int:
        """Returns its exit code; raises TimeoutError with what it has written, and lets it run."""
        code: int | None = self.machine._call("wait", timeout + GRACE, pid=self.pid, timeout=timeout)[0]["code"]
        if code is None:
            written = self.output().decode(errors="replace")[-4000:] if self._path != "/dev/null" else ""
            raise TimeoutError(f"in the guest process {self.pid} did not end within {timeout} s; it had written:\n{written}")
        return code

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal to it and its children."""
        self.machine._call("kill", GRACE, pid=self.pid, signal=int(number))

    def stop(self, timeout: float = 10) -> int:
        """Ends it by SIGTERM, or by SIGKILL after `timeout`; returns its exit code."""
        self.kill(signal.SIGTERM)
        try:
            return self.wait(timeout)
        except TimeoutError:
            self.kill()
            return self.wait()
