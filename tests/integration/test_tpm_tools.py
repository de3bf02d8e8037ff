"""tpm2-tools say the same of a module's TPM as of swtpm: command after command, the same results.

But for the platform hierarchy, which is the module's (test_tpm_host).
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Protocol, cast

import pytest
from hsmvisor.cli.tpm_tcp import MAX_CONNECTIONS
from support.certificates import new_key, private_pem
from support.command import Command
from support.host import Host
from support.tpm_host import create, machine, tool
from support.tpm_rig import TpmProcess, two_ports

pytestmark = pytest.mark.real

#: In this order; the first word without `tpm2_`.  A line that begins with ! fails.
STORY = """
getcap properties-fixed
getcap algorithms
getcap handles-persistent
selftest
gettestresult
getrandom 16 -o random
stirrandom random
pcrread sha256:0,16,23
pcrextend 16:sha256=0000000000000000000000000000000000000000000000000000000000000001
pcrread sha256:16
pcrreset 16
!pcrreset 0
createprimary -C o -g sha256 -G ecc256 -c primary.ctx
createprimary -C e -G rsa2048 -c endorsement.ctx
create -C primary.ctx -G ecc256 -u key.pub -r key.priv -a fixedtpm|fixedparent|sensitivedataorigin|userwithauth|sign
load -C primary.ctx -u key.pub -r key.priv -c key.ctx
readpublic -c key.ctx -f pem -o key.pem
sign -c key.ctx -g sha256 -o key.sig random
verifysignature -c key.ctx -g sha256 -m random -s key.sig
create -C primary.ctx -G rsa2048 -u rsa.pub -r rsa.priv
load -C primary.ctx -u rsa.pub -r rsa.priv -c rsa.ctx
rsaencrypt -c rsa.ctx -o rsa.out random
rsadecrypt -c rsa.ctx -o rsa.back rsa.out
evictcontrol -C o -c key.ctx 0x81000001
readpublic -c 0x81000001
sign -c 0x81000001 -g sha256 -o persistent.sig random
!evictcontrol -C o -c key.ctx 0x81800002
evictcontrol -C o -c 0x81000001
createpolicy --policy-pcr -l sha256:16 -L pcr.policy
create -C primary.ctx -i random -u seal.pub -r seal.priv -L pcr.policy
load -C primary.ctx -u seal.pub -r seal.priv -c seal.ctx
unseal -c seal.ctx -p pcr:sha256:16 -o unsealed
pcrextend 16:sha256=0000000000000000000000000000000000000000000000000000000000000002
!unseal -c seal.ctx -p pcr:sha256:16
nvdefine 0x1500001 -C o -s 32 -a ownerread|ownerwrite|authread|authwrite
nvwrite 0x1500001 -C o -i random
nvread 0x1500001 -C o -s 16 -o nv.out
nvreadpublic 0x1500001
nvdefine 0x1500002 -C o -s 8 -a ownerread|ownerwrite|nt=counter
nvincrement 0x1500002 -C o
nvread 0x1500002 -C o -s 8
nvundefine 0x1500001 -C o
nvundefine 0x1500002 -C o
createek -c 0x81010001 -G ecc -u ek.pub
createak -C 0x81010001 -c ak.ctx -G ecc -g sha256 -s ecdsa -u ak.pub -n ak.name
quote -c ak.ctx -l sha256:0,16 -q 0011 -m quote.msg -s quote.sig -o quote.pcrs -g sha256
checkquote -u ak.pub -m quote.msg -s quote.sig -f quote.pcrs -g sha256 -q 0011
startauthsession -S session.ctx
policycommandcode -S session.ctx -L duplicate.policy TPM2_CC_Duplicate
flushcontext session.ctx
createprimary -C o -G ecc256 -c parent.ctx
create -C primary.ctx -G ecc256 -u moved.pub -r moved.priv -L duplicate.policy -a sensitivedataorigin|userwithauth|decrypt|sign
load -C primary.ctx -u moved.pub -r moved.priv -c moved.ctx
readpublic -c parent.ctx -o parent.pub
startauthsession --policy-session -S session.ctx
policycommandcode -S session.ctx TPM2_CC_Duplicate
loadexternal -C o -u parent.pub -c external.ctx
duplicate -C external.ctx -c moved.ctx -G null -p session:session.ctx -r moved.dup -s moved.seed
flushcontext session.ctx
import -C parent.ctx -u moved.pub -i moved.dup -r moved.back -s moved.seed
load -C parent.ctx -u moved.pub -r moved.back -c back.ctx
import -C parent.ctx -G ecc -i outside.pem -u outside.pub -r outside.priv
load -C parent.ctx -u outside.pub -r outside.priv -c outside.ctx
sign -c outside.ctx -g sha256 -o outside.sig random
hash -C o -g sha256 -o digest told
create -C primary.ctx -G hmac -u mac.pub -r mac.priv
load -C primary.ctx -u mac.pub -r mac.priv -c mac.ctx
hmac -c mac.ctx -o mac random
create -C primary.ctx -G aes128cfb -u aes.pub -r aes.priv
load -C primary.ctx -u aes.pub -r aes.priv -c aes.ctx
encryptdecrypt -c aes.ctx -o aes.out random
encryptdecrypt -c aes.ctx -d -o aes.back aes.out
changeauth -c o owner
!createprimary -C o -c refused.ctx
createprimary -C o -P owner -c permitted.ctx
changeauth -c o -p owner
dictionarylockout -s -n 5 -t 10 -l 10
dictionarylockout -c
readclock
clear
getcap handles-persistent
shutdown
"""
LINES = [line for line in STORY.splitlines() if line]
#: What two TPMs do not differ in, to the last digit: PCRs, policies, what is defined and counted.
SAME = (
    "getcap algorithms", "getcap handles-persistent", "pcrread", "pcrextend", "pcrreset", "createpolicy", "policycommandcode",
    "nvdefine", "nvreadpublic", "nvread", "nvincrement", "hash", "flushcontext",
)  # fmt: skip
SAME_FILES = ("pcr.policy", "duplicate.policy", "digest")
#: What they differ in otherwise: keys, names, random numbers, clocks, makers' versions.
_OWN = re.compile(r"[0-9a-f]{8,}|\b\d{3,}\b|(?<=reset_count: )\d+", re.I)
_VERSIONS = re.compile(r"TPM2_PT_(FIRMWARE_VERSION|VENDOR|MANUFACTURER)\w*:.*?(?=TPM2_PT_)", re.S)


SECRET = b"a secret of a verifier"
OUTSIDE = private_pem(new_key("p256"))  #: a key that comes from elsewhere


class Run(Protocol):
    """One of tpm2-tools' commands."""

    def __call__(self, *words: str | Path, check: bool = True, cwd: Path | None = None) -> subprocess.CompletedProcess[bytes]: ...


@pytest.fixture
def ours() -> Iterator[Run]:
    with Host() as host:
        yield partial(tool, create(host, "tools"))


@pytest.fixture
def theirs(tmp_path: Path) -> Iterator[Run]:
    tpm = TpmProcess(tmp_path / "theirs", "swtpm")
    yield tpm.run
    tpm.close()


def told(run: Run, line: str, place: Path) -> tuple[bool, str]:
    """Whether it succeeded, and what it said, without what is each TPM's own."""
    name, *words = line.removeprefix("!").split()
    done = run(f"tpm2_{name}", *words, check=False, cwd=place)
    for what in ("--transient-object", "--loaded-session"):  # a TPM has room for three, and here is no resource manager
        run("tpm2_flushcontext", what)
    said = done.stdout.decode(errors="replace") + done.stderr.decode()
    if not line.startswith(SAME):
        said = _OWN.sub("*", _VERSIONS.sub("", said))
    return done.returncode == 0, said


def test_a_story(ours: Run, theirs: Run, tmp_path: Path) -> None:
    assert len({line.removeprefix("!").split()[0] for line in LINES}) >= 40
    places = [tmp_path / "at-ours", tmp_path / "at-theirs"]
    for place in places:
        place.mkdir()
        (place / "outside.pem").write_bytes(OUTSIDE)
        (place / "told").write_bytes(b"the same for both")
    for line in LINES:
        (fine, said), (expected, wanted) = (told(run, line, place) for run, place in zip((ours, theirs), places, strict=True))
        assert (fine, said) == (expected, wanted), line
        assert fine == (not line.startswith("!")), f"{line}: {said}"
    pcrs = ours("tpm2_getcap", "pcrs").stdout.decode()
    assert re.findall(r"(sha\d+): \[ (0, 1, .*23)? ?\]", pcrs) == [
        ("sha1", ""),
        ("sha256", ", ".join(map(str, range(24)))),
        ("sha384", ""),
        ("sha512", ""),
    ], pcrs
    for name in SAME_FILES:
        assert len({(place / name).read_bytes() for place in places}) == 1, name
    for place in places:
        random = (place / "random").read_bytes()
        assert [(place / name).read_bytes() for name in ("rsa.back", "unsealed", "nv.out", "aes.back")] == [random] * 4


@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_a_credential_is_activated_by_the_tpm_whose_key_it_names(
    request: pytest.FixtureRequest, whose: str, tmp_path: Path
) -> None:
    run = partial(cast(Run, request.getfixturevalue(whose)), cwd=tmp_path)
    (tmp_path / "told").write_bytes(SECRET)

    def activated(key: str, name: str) -> bool:
        """Whether a credential for the key of that name comes out by `key`, of the endorsement key's TPM."""
        named = (tmp_path / f"{name}.name").read_bytes().hex()
        run("tpm2_makecredential", "-u", "ek.pub", "-s", "told", "-n", named, "-o", "credential")
        run("tpm2_startauthsession", "--policy-session", "-S", "session.ctx")
        run("tpm2_policysecret", "-S", "session.ctx", "-c", "e")
        words = ("-c", f"{key}.ctx", "-C", "0x81010001", "-i", "credential", "-o", "back", "-P", "session:session.ctx")
        done = run("tpm2_activatecredential", *words, check=False)
        run("tpm2_flushcontext", "session.ctx", check=False)
        run("tpm2_flushcontext", "-t")
        return done.returncode == 0 and (tmp_path / "back").read_bytes() == SECRET

    run("tpm2_createek", "-c", "0x81010001", "-G", "ecc", "-u", "ek.pub")
    for key in ("one", "other"):
        run(
            "tpm2_createak", "-C", "0x81010001", "-c", f"{key}.ctx", "-G", "ecc", "-g", "sha256", "-s", "ecdsa", "-n", f"{key}.name"
        )
        run("tpm2_flushcontext", "-t")
    assert activated("one", "one") and activated("other", "other")
    assert not activated("one", "other")


def test_by_tcp(tmp_path: Path) -> None:
    """As swtpm's socket mode; it ends by Ctrl-C, and a machine's TPM is the machine's alone."""
    with Host() as host:
        module, port = create(host, "tools"), two_ports()
        command = Command(f"unix:{host.process.socket}", tmp_path)
        with command.start("module", "tpm-tcp", module.name, "--port", str(port)) as carrying:
            assert carrying.stdout is not None
            tcti = carrying.stdout.readline().decode().strip().removeprefix("TPM2TOOLS_TCTI=")
            assert tcti == f"swtpm:host=127.0.0.1,port={port}"
            environment = os.environ | {"TPM2TOOLS_TCTI": tcti}
            for words in (("tpm2_getrandom", "8"), ("tpm2_pcrread", "sha256:0"), ("tpm2_createprimary", "-c", "primary.ctx")):
                subprocess.run(words, env=environment, cwd=tmp_path, check=True, timeout=60, capture_output=True)
            with contextlib.ExitStack() as stack:
                for _ in range(MAX_CONNECTIONS + 1):
                    last = stack.enter_context(socket.create_connection(("127.0.0.1", port), 10))
                assert last.recv(1) == b"", "one too many"
            assert "Address already in use" in failed(command, "module", "tpm-tcp", module.name, "--port", str(port))
            carrying.send_signal(signal.SIGINT)
            assert carrying.wait(10) == 0 and carrying.stdout.read() == b""
        with machine(module):
            assert "is its machine's" in failed(command, "module", "tpm-tcp", module.name)
        host.create("bare")
        assert "--tpm" in failed(command, "module", "tpm-tcp", "bare")


def failed(command: Command, *words: str) -> str:
    command(*words, code=1)
    return command.errors
