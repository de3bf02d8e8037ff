"""libhsmvisor-pkcs11.so over USB: how it finds its module, shares it with other processes, loses it, and what is left of it."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hsmvisord import ck
from hsmvisord.wire.calls import Call
from support.scripted_module import ScriptedModule
from support.usb_bus import CHANNELS, UsbBus, claim, claimed, with_channels

NEW, JOIN, FORK, RESUME = range(4)
ALL = range(1, CHANNELS + 1)


@pytest.fixture
def module(tmp_path: Path) -> Iterator[ScriptedModule]:
    module = ScriptedModule(tmp_path / "guest.sock")
    yield module
    module.end()


@pytest.fixture
def bus() -> UsbBus:
    return UsbBus()


@pytest.fixture
def node(bus: UsbBus, module: ScriptedModule) -> Path:
    return bus.plug("VSM-1", module.path)


def told(bus: UsbBus, address: str = "usb:", libusb: Path | None = None) -> str:
    """What the library says when its module cannot be reached; to an application that is a library without slots."""
    script = (
        "p11.initialize(); assert p11.slots() == []; assert p11.finalize() == 0; print(threads(ALONE), os.listdir('/proc/self/fd'))"
    )
    result = bus.run(script, address, libusb, HSMVISOR_PKCS11_DEBUG="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "['python'] ['0', '1', '2', '3']\n"  # 3 is the list's own
    return result.stderr


# ---- a connection ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [None, 1, 511, 4096])
def test_signs_whatever_the_size_of_transfers(bus: UsbBus, node: Path, piece: int | None) -> None:
    script = """
        p11.initialize()
        session = p11.open_session()
        for size in (0, 1, 495, 496, 497, 1008, 65535, 65536, 70000 if sys.argv[1:] else 1 << 20):
            signs(session, b"x" * size)
        for size in (1, 488, 512, 65536, 300000):
            room = ctypes.create_string_buffer(size)
            p11.good("C_GenerateRandom", session, room, size)
            assert room.raw == b"r" * size
        p11.finalize()
    """
    more = {} if piece is None else {"FAKE_USB_PIECE": str(piece)}
    bus.good(script.replace("sys.argv[1:]", str(piece == 1)), "usb:serial=VSM-1", **more)
    assert claimed(node) == set()


def test_one_channel_for_calls_that_queue_and_one_for_a_call_that_waits(bus: UsbBus, node: Path, module: ScriptedModule) -> None:
    script = """
        p11.initialize()
        waits = [threading.Thread(target=p11.call, args=("C_WaitForSlotEvent", 0, byref(c_ulong()), None)) for _ in range(3)]
        ended = []

        def work():
            session = p11.open_session()
            while not ended:
                signs(session)

        workers = [threading.Thread(target=work) for _ in range(4)]
        for thread in waits + workers:
            thread.start()
        time.sleep(0.3)
        began = time.monotonic()
        assert p11.rotation_wait(7, 300)[0] == ck.CKR_FUNCTION_CANCELED  # waits for the channel, and for no longer than it was told
        assert 0.25 < time.monotonic() - began < 3
        print(threads().count("hsmvisor-usb"), flush=True)
        sys.stdin.readline()
        ended.append(True)
        for thread in workers:
            thread.join()
        began = time.monotonic()
        assert p11.finalize() == 0
        for thread in waits:
            thread.join()
        assert time.monotonic() - began < 3
        print(threads(ALONE), os.listdir("/proc/self/fd"))
    """
    process = bus.start(script)
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == "2\n"
    assert len(claimed(node)) == 2
    process.stdin.write("\n")
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "['python'] ['0', '1', '2', '3']\n"), err
    assert claimed(node) == set()
    assert "ROTATION_WAIT" not in module.names()


def test_the_time_that_a_wait_spent_on_its_channel_is_not_waited_again(bus: UsbBus, node: Path, module: ScriptedModule) -> None:
    script = """
        p11.initialize()
        first = threading.Thread(target=p11.rotation_wait, args=(7, 400))
        first.start()
        time.sleep(0.1)
        began = time.monotonic()
        assert p11.rotation_wait(7, 1000)[0] == ck.CKR_FUNCTION_CANCELED
        assert 0.9 < time.monotonic() - began < 4
        p11.finalize()
    """
    bus.good(script)
    assert [100 < 1000 - r.deadline < 1000 for r in module.requests if r.call is Call.ROTATION_WAIT][1]


# ---- which module ----------------------------------------------------------------------------------------------------------


def test_no_module(bus: UsbBus) -> None:
    assert "the module at usb: is not there (no module is on the USB bus)" in told(bus)


def test_no_usb(bus: UsbBus) -> None:
    for directory in (bus.devices, bus.nodes):
        directory.rename(f"{directory}.gone")
    assert "(no module is on the USB bus)" in told(bus, "usb:serial=VSM-1")


def test_another_serial_number(bus: UsbBus, node: Path) -> None:
    assert "no module on the USB bus has this serial number; there is VSM-1)" in told(bus, "usb:serial=VSM-12")
    assert "no module on the USB bus has this serial number; there is VSM-1)" in told(bus, "usb:serial=VSM")


def test_a_serial_number_that_stands_for_keys_too(bus: UsbBus, module: ScriptedModule) -> None:
    bus.plug("VSM-12~0123abcd", module.path)
    assert "no module on the USB bus has this serial number; there is VSM-12~0123abcd)" in told(bus, "usb:serial=VSM-1")
    bus.good("p11.initialize(); assert p11.slots() == [0]; p11.finalize()", "usb:serial=VSM-12")


def test_several_modules_are_named(bus: UsbBus, module: ScriptedModule) -> None:
    for number, serial in enumerate(("VSM-1", "b\x1b[31mad", None)):
        bus.plug(serial, module.path, port=f"1-{number + 1}")
    said = told(bus)
    assert "several modules are on the USB bus, and usb:serial=NAME says which: " in said
    names = said.partition("NAME says which: ")[2].partition(")")[0]
    assert sorted(names.split(", ")) == ["VSM-1", "b?[31mad", "one without a serial number"]
    bus.good("p11.initialize(); assert p11.slots() == [0]; p11.finalize()", "usb:serial=VSM-1")


def test_the_longest_serial_number_and_many_modules(bus: UsbBus, module: ScriptedModule) -> None:
    longest = "N" * 126
    for number in range(5):
        bus.plug(f"{longest[1:]}{number}", module.path, port=f"1-{number + 1}")
    bus.plug(longest, module.path, port="2-1.4")
    assert "says which: NNN" in told(bus)
    bus.good("p11.initialize(); assert p11.slots() == [0]; p11.finalize()", f"usb:serial={longest}")


def test_each_of_two_modules(bus: UsbBus, module: ScriptedModule, tmp_path: Path) -> None:
    other = ScriptedModule(tmp_path / "other.sock")
    bus.plug("VSM-1", module.path)
    bus.plug("VSM 2; #", other.path, port="1-2")
    bus.good("p11.initialize(); assert p11.slots() == [0]; p11.finalize()", "usb:serial=VSM 2; #")
    assert other.names() == ["HELLO", "GET_SLOT_LIST"] and not module.names()
    other.end()


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("usb:VSM-1", "an address usb: has serial=NAME, or nothing behind it for the only module: VSM-1"),
        ("usb:serial=", "the serial number of a module is 1 to 126 printable characters: "),
        ("usb:serial=" + "N" * 127, "the serial number of a module is 1 to 126 printable characters: NNN"),
        ("usb:serial=\u00e9", "the serial number of a module is 1 to 126 printable characters: "),
    ],
)
def test_wrong_addresses_are_explained(bus: UsbBus, address: str, why: str) -> None:
    result = bus.run("print(p11.call('C_Initialize', None))", address, HSMVISOR_PKCS11_DEBUG="1")
    assert result.stdout.strip() == str(ck.CKR_GENERAL_ERROR)
    assert why in result.stderr


def test_the_address_may_stand_in_the_configuration(bus: UsbBus, node: Path, tmp_path: Path) -> None:
    config = tmp_path / "pkcs11.conf"
    config.write_text("address = usb:serial=VSM-1   # the card\n")
    bus.good("p11.initialize(); assert p11.slots() == [0]; p11.finalize()", "", HSMVISOR_PKCS11_CONFIG=str(config))


def test_a_device_that_cannot_be_opened(bus: UsbBus, node: Path) -> None:
    node.unlink()
    assert f"{node}: No such file or directory" in told(bus)


def test_a_device_that_is_not_for_this_user(bus: UsbBus, node: Path) -> None:
    node.chmod(0)
    script = """
        if os.getuid() == 0:
            os.setresuid(65534, 65534, 65534)
        p11.initialize()
        assert p11.slots() == []
        p11.finalize()
    """
    result = bus.run(script, HSMVISOR_PKCS11_DEBUG="1")
    assert result.returncode == 0, result.stderr
    assert f"{node}: Permission denied (a udev rule would give access)" in result.stderr


def test_a_module_that_opens_no_channel(bus: UsbBus, node: Path, module: ScriptedModule) -> None:
    module.stop()
    assert "the module opens no channel: LIBUSB_ERROR_PIPE" in told(bus)
    assert claimed(node) == set()


# ---- libusb ----------------------------------------------------------------------------------------------------------------


def test_without_libusb_the_library_works_and_says_what_to_install(
    bus: UsbBus, node: Path, module: ScriptedModule, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "libusb-1.0.so.0").touch()
    assert "(libusb is needed, install libusb-1.0-0 (" in told(bus, libusb=broken)
    bus.good("p11.initialize(); assert p11.slots() == [0]; p11.finalize()", module.address, libusb=broken)


def test_a_libusb_that_is_too_old(bus: UsbBus, node: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    source = "void libusb_init(void){} void libusb_set_option(void){} void libusb_exit(void){}"
    subprocess.run(["cc", "-shared", "-fPIC", "-xc", "-", "-o", old / "libusb-1.0.so.0"], input=source, text=True, check=True)
    assert "libusb-1.0.so.0 has no libusb_wrap_sys_device: libusb 1.0.23 or newer is needed" in told(bus, libusb=old)


def test_the_systems_libusb_refuses_what_is_no_device(bus: UsbBus, node: Path, tmp_path: Path) -> None:
    assert "(libusb cannot use the device: LIBUSB_ERROR_" in told(bus, libusb=tmp_path)


def test_libusb_is_loaded_for_usb_alone(bus: UsbBus, module: ScriptedModule) -> None:
    script = """
        p11.initialize()
        assert p11.slots() == [0] and "libusb" not in Path("/proc/self/maps").read_text()
        p11.finalize()
    """
    bus.good(script, module.address)


@pytest.mark.parametrize("newer", [False, True], ids=["1.0.26", "1.0.27"])
@pytest.mark.parametrize("had", [False, True], ids=["", "the program has libusb itself"])
def test_libusb_looks_for_no_devices(bus: UsbBus, node: Path, newer: bool, had: bool) -> None:
    """Its thread runs only where forbidding it would also forbid it to the program."""
    script = f"""
        if {had}:
            libusb = ctypes.CDLL("libusb-1.0.so.0")
        p11.initialize()
        signs(p11.open_session())
        print(threads())
        assert p11.finalize() == 0
        if {had}:
            context = ctypes.c_void_p()
            libusb.libusb_init(byref(context))
            assert threads(["libusb_event", "python"]) == ["libusb_event", "python"]  # finds devices as ever
            libusb.libusb_exit(context)
        print(threads(ALONE))
    """
    said = bus.good(script, libusb=bus.made.newer if newer else bus.made.libusb)
    during = "['hsmvisor-usb', 'libusb_event', 'python']" if had and not newer else "['hsmvisor-usb', 'python']"
    assert said == f"{during}\n['python']\n"


# ---- threads ---------------------------------------------------------------------------------------------------------------


def test_an_application_that_allows_no_threads(bus: UsbBus, node: Path, module: ScriptedModule) -> None:
    script = """
        assert p11.call("C_Initialize", byref(CkInitializeArgs(flags=3))) == %s
        if not %s:
            assert p11.call("C_Initialize", None) == 0  # as NSS then does
        assert p11.slots() == [0]
        assert p11.call("C_Finalize", None) == 0
    """
    bus.good(script % (ck.CKR_NEED_TO_CREATE_THREADS, 0))
    bus.good(script % (0, 1), module.address)


def test_the_thread_handles_no_signals(bus: UsbBus, node: Path) -> None:
    script = """
        p11.initialize()
        for task in Path("/proc/self/task").iterdir():
            if (task / "comm").read_text() == "hsmvisor-usb\\n":
                blocked = dict(line.split(":\\t", 1) for line in (task / "status").read_text().splitlines())["SigBlk"]
        usual = ~int(blocked, 16) & (1 << 64) - 1
        assert usual & ~(1 << 8 | 1 << 18 | 3 << 31) == 0, blocked  # all but SIGKILL, SIGSTOP and the C library's own
        p11.finalize()
    """
    bus.good(script)


def test_finalized_and_unloaded_it_leaves_nothing(bus: UsbBus, node: Path) -> None:
    script = """
        before = sorted(os.listdir("/proc/self/fd"))
        for _ in range(30):
            p11.initialize()
            signs(p11.open_session())
            assert p11.finalize() == 0
            ctypes.CDLL(None).dlclose(ctypes.c_void_p(p11.library._handle))
            maps = Path("/proc/self/maps").read_text()
            assert "libhsmvisor" not in maps and "libusb" not in maps
            assert threads(ALONE) == ALONE and sorted(os.listdir("/proc/self/fd")) == before
            p11 = Cryptoki()
    """
    bus.good(script)


def test_unloaded_without_finalize_it_leaves_nothing(bus: UsbBus, node: Path) -> None:
    script = """
        before = sorted(os.listdir("/proc/self/fd"))
        p11.initialize()
        signs(p11.open_session())
        ctypes.CDLL(None).dlclose(ctypes.c_void_p(p11.library._handle))
        assert "libhsmvisor" not in Path("/proc/self/maps").read_text()
        assert threads(ALONE) == ALONE and sorted(os.listdir("/proc/self/fd")) == before
    """
    bus.good(script)


def test_a_program_may_end_without_finalize_and_with_threads_in_calls(bus: UsbBus, node: Path) -> None:
    script = """
        p11.initialize()
        def work():
            session = p11.open_session()
            while True:
                signs(session)
        def wait():
            p11.call("C_WaitForSlotEvent", 0, byref(c_ulong()), None)
        for target in (wait, work, work):
            threading.Thread(target=target, daemon=True).start()
        time.sleep(0.2)
    """
    bus.good(script)
    assert claimed(node) == set()


def test_transfers_that_never_come_back_do_not_stop_the_application(bus: UsbBus, node: Path) -> None:
    script = """
        p11.initialize()
        began = time.monotonic()
        assert p11.finalize() == 0
        assert 2 < time.monotonic() - began < 9
        assert threads(ALONE) == ALONE
    """
    bus.good(script, FAKE_USB_STUCK="1")
    assert claimed(node) == set()


# ---- a module that goes away -------------------------------------------------------------------------------------------------


def test_a_module_that_is_unplugged_and_comes_back_as_another_device(bus: UsbBus, node: Path, module: ScriptedModule) -> None:
    script = """
        p11.initialize()
        session = p11.open_session()
        signs(session)
        print(flush=True)
        sys.stdin.readline()
        began = time.monotonic()
        signs(session)
        assert 1 < time.monotonic() - began < 5
        assert threads(CARRIED) == CARRIED
        p11.finalize()
    """
    process = bus.start(script)
    assert process.stdout is not None and process.stdin is not None
    process.stdout.readline()
    module.requests.clear()
    module.applications.clear()
    bus.unplug()
    module.stop()
    process.stdin.write("\n")
    process.stdin.flush()
    time.sleep(2.5)
    module.start()
    bus.plug("VSM-1", module.path, port="1-2")
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert module.names() == ["HELLO", "RESTORE_SESSIONS", "SIGN_ONCE"]
    assert module.requests[0].args[1] == RESUME


def test_a_channel_that_the_module_ends(bus: UsbBus, node: Path, module: ScriptedModule) -> None:
    script = """
        p11.initialize()
        session = p11.open_session()
        signs(session)
        for _ in range(10):
            print(flush=True)
            sys.stdin.readline()
            signs(session)
        p11.finalize()
    """
    process = bus.start(script)
    assert process.stdout is not None and process.stdin is not None
    for number in range(10):
        process.stdout.readline()
        module.restart() if number % 2 else module.cut()
        process.stdin.write("\n")
        process.stdin.flush()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert claimed(node) == set()


def test_many_threads_lose_and_find_their_module_together(bus: UsbBus, node: Path, module: ScriptedModule) -> None:
    script = """
        p11.initialize()
        end, done, wrong = time.monotonic() + 2, [], []

        def work():
            session = p11.open_session()
            signs(session)
            while time.monotonic() < end:
                rv = p11.sign_init(session, KEY)
                result = p11.sign(session, b"y")
                (done if (rv, result) == (0, (0, signature(b"y"))) else wrong).append((rv, result))

        workers = [threading.Thread(target=work) for _ in range(5)]
        for thread in workers:
            thread.start()
        for thread in workers:
            thread.join()
        assert len(done) > 50 and not wrong, (len(done), wrong[:3])
        p11.finalize()
    """
    ended = threading.Event()

    def restart_often() -> None:
        time.sleep(0.6)
        while not ended.wait(0.15):
            module.restart()

    restarter = threading.Thread(target=restart_often)
    restarter.start()
    try:
        bus.good(script)
    finally:
        ended.set()
        restarter.join()


def test_an_answer_that_came_just_before_the_end_is_heard(bus: UsbBus, node: Path, module: ScriptedModule) -> None:
    """C_Login is asked once alone: without its answer it would have failed."""

    def answer_and_go(module: ScriptedModule, *_: object) -> tuple[()]:
        for sock in module._sockets:
            sock.shutdown(socket.SHUT_RD)
        return ()

    module.answers[Call.LOGIN] = answer_and_go
    script = """
        p11.initialize()
        session = p11.open_session()
        for _ in range(20):
            p11.good("C_Login", session, 1, b"1234", 4)
            time.sleep(0.05)
        p11.finalize()
    """
    bus.good(script, FAKE_USB_GONE="1")
    assert module.names().count("LOGIN") == 20


# ---- several processes -------------------------------------------------------------------------------------------------------


def test_when_all_channels_are_taken(bus: UsbBus, node: Path, module: ScriptedModule) -> None:
    with claim(node, ALL):
        said = told(bus)
        assert f"all {CHANNELS} channels of the module are taken by connections of this system" in said
    for free in ALL:
        with claim(node, [number for number in ALL if number != free]):
            bus.good("p11.initialize(); signs(p11.open_session()); p11.finalize()")


def test_a_channel_that_becomes_free_is_taken(bus: UsbBus, node: Path) -> None:
    script = """
        p11.initialize()
        assert p11.slots() == []
        print(flush=True)
        sys.stdin.readline()
        assert p11.slots() == [0]
        p11.finalize()
    """
    with claim(node, ALL):
        process = bus.start(script)
        assert process.stdout is not None and process.stdin is not None
        process.stdout.readline()
    _, err = process.communicate("\n", timeout=20)
    assert process.returncode == 0, err


def test_a_module_with_fewer_channels(bus: UsbBus, module: ScriptedModule) -> None:
    node = bus.plug("VSM-1", module.path, with_channels(2))
    with claim(node, [1, 2]):
        assert "all 2 channels of the module are taken" in told(bus)
    with claim(node, [1]):
        bus.good("p11.initialize(); signs(p11.open_session()); p11.finalize()")


def test_twelve_processes_side_by_side(bus: UsbBus, node: Path) -> None:
    script = """
        p11.initialize()
        session = p11.open_session()
        print(flush=True)
        sys.stdin.readline()
        for _ in range(20):
            signs(session)
        assert p11.finalize() == 0
    """
    processes = [bus.start(script) for _ in range(CHANNELS)]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    assert claimed(node) == set(ALL)
    assert "are taken" in told(bus)
    for process in processes:
        _, err = process.communicate("\n", timeout=60)
        assert process.returncode == 0, err
    assert claimed(node) == set()


# ---- fork --------------------------------------------------------------------------------------------------------------------

CHILD = """
    p11.initialize()
    session = p11.open_session()
    signs(session)
    parent_fds = set(os.listdir("/proc/self/fd"))

    def child():
        assert threads(ALONE) == ALONE
        assert p11.call("C_GetSlotList", 1, None, byref(c_ulong())) == ck.CKR_CRYPTOKI_NOT_INITIALIZED
        if %s:
            assert p11.finalize() == 0
        p11.initialize()
        assert p11.sign_init(session, KEY) == ck.CKR_SESSION_HANDLE_INVALID
        signs(p11.open_session(), b"child")
        assert threads(CARRIED) == CARRIED
        assert len(os.listdir("/proc/self/fd")) <= len(parent_fds)
        print(flush=True)
        sys.stdin.readline()
        assert p11.finalize() == 0

    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        try:
            child()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    signs(session, b"parent")
    p11.finalize()
"""


@pytest.mark.parametrize("finalize", [False, True], ids=["C_Initialize", "C_Finalize and C_Initialize"])
def test_a_child_has_a_channel_of_its_own_and_leaves_its_parent_alone(
    bus: UsbBus, node: Path, module: ScriptedModule, finalize: bool
) -> None:
    process = bus.start(CHILD % finalize)
    assert process.stdout is not None
    process.stdout.readline()
    assert len(claimed(node)) == 2
    out, err = process.communicate("\n", timeout=20)
    assert process.returncode == 0, out + err
    hellos = [r for r in module.requests if r.call is Call.HELLO]
    assert [r.args[1] for r in hellos] == [NEW, FORK]
    parent = [r.name for r in module.requests if r.connection == hellos[0].connection]
    assert parent == ["HELLO", "OPEN_SESSION", "SIGN_INIT", "SIGN", "SIGN_ONCE"]
    assert claimed(node) == set()


@pytest.mark.parametrize("how", ["C_Finalize", "killed"])
def test_a_child_holds_no_channel_of_its_parent(bus: UsbBus, node: Path, module: ScriptedModule, how: str) -> None:
    script = """
        p11.initialize()
        signs(p11.open_session())
        pid = os.fork()
        if pid == 0:
            print(os.getpid(), flush=True)
            time.sleep(30)
            os._exit(0)
        sys.stdin.readline()
        p11.finalize()
        print("done", flush=True)
        sys.stdin.readline()
    """
    process = bus.start(script)
    assert process.stdout is not None and process.stdin is not None
    child = int(process.stdout.readline())
    assert len(claimed(node)) == 1
    if how == "killed":
        process.kill()
        process.wait(10)
    else:
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "done\n"
    assert claimed(node) == set()
    end = time.monotonic() + 5
    while module.applications:
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(child, 9)
    process.communicate("\n", timeout=10)


def test_programs_that_are_started_inherit_nothing(bus: UsbBus, node: Path) -> None:
    script = """
        p11.initialize()
        signs(p11.open_session())
        said = subprocess.run(["ls", "/proc/self/fd"], close_fds=False, capture_output=True, text=True).stdout.split()
        assert said == ["0", "1", "2", "3"], said
        p11.finalize()
    """
    bus.good(script)


def test_forks_while_other_threads_are_in_calls_and_the_module_comes_and_goes(
    bus: UsbBus, node: Path, module: ScriptedModule
) -> None:
    script = """
        p11.initialize()
        ended = []

        def work():
            session = p11.open_session()
            while not ended:
                p11.sign_init(session, KEY)
                p11.sign(session, b"x")

        threads_ = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads_:
            thread.start()
        for _ in range(30):
            pid = os.fork()
            if pid == 0:
                signal.alarm(20)
                p11.finalize()
                p11.initialize()
                p11.slots()
                p11.finalize()
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
        ended.append(True)
        for thread in threads_:
            thread.join()
        p11.finalize()
        assert threads(ALONE) == ALONE
    """
    ended = threading.Event()

    def cut_often() -> None:
        while not ended.wait(0.05):
            module.cut()

    cutter = threading.Thread(target=cut_often)
    cutter.start()
    try:
        bus.good(script)
    finally:
        ended.set()
        cutter.join()
    assert claimed(node) == set()
