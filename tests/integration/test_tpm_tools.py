"""tpm2-tools say the same of our TPM as of swtpm: command after command, the same results."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.certificates import new_key, private_pem
from support.tpm_rig import TpmProcess

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
!evictcontrol -C p -c key.ctx 0x81000002
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
hash -C o -g sha256 -o digest random
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
#: What two TPMs differ in: keys, names, random numbers, clocks, makers' versions.
_OWN = re.compile(r"[0-9a-f]{8,}|\b\d{3,}\b|(?<=reset_count: )\d+", re.I)
_VERSIONS = re.compile(r"TPM2_PT_(FIRMWARE_VERSION|VENDOR|MANUFACTURER)\w*:.*?(?=TPM2_PT_)", re.S)


OUTSIDE = private_pem(new_key("p256"))  #: a key that comes from elsewhere


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[TpmProcess]:
    tpm = TpmProcess(tmp_path / "ours")
    yield tpm
    tpm.close()


@pytest.fixture
def theirs(tmp_path: Path) -> Iterator[TpmProcess]:
    tpm = TpmProcess(tmp_path / "theirs", "swtpm")
    yield tpm
    tpm.close()


def told(tpm: TpmProcess, line: str, place: Path) -> tuple[bool, str]:
    """Whether it succeeded, and what it said, without what is each TPM's own."""
    name, *words = line.removeprefix("!").split()
    done = tpm.run(f"tpm2_{name}", *words, check=False, cwd=place)
    for what in ("--transient-object", "--loaded-session"):  # a TPM has room for three, and here is no resource manager
        tpm.run("tpm2_flushcontext", what)
    said = done.stdout.decode(errors="replace") + done.stderr.decode()
    return done.returncode == 0, _OWN.sub("*", _VERSIONS.sub("", said))


def test_a_story(ours: TpmProcess, theirs: TpmProcess, tmp_path: Path) -> None:
    assert len({line.removeprefix("!").split()[0] for line in LINES}) >= 40
    places = [tmp_path / "at-ours", tmp_path / "at-theirs"]
    for place in places:
        place.mkdir()
        (place / "outside.pem").write_bytes(OUTSIDE)
    for line in LINES:
        (fine, said), (expected, wanted) = (told(tpm, line, place) for tpm, place in zip((ours, theirs), places, strict=True))
        assert (fine, said) == (expected, wanted), line
        assert fine == (not line.startswith("!")), f"{line}: {said}"
    pcrs = ours.run("tpm2_getcap", "pcrs").stdout.decode()
    assert re.findall(r"(sha\d+): \[ (0, 1, .*23)? ?\]", pcrs) == [
        ("sha1", ""),
        ("sha256", ", ".join(map(str, range(24)))),
        ("sha384", ""),
        ("sha512", ""),
    ], pcrs
    for place in places:
        random = (place / "random").read_bytes()
        assert [(place / name).read_bytes() for name in ("rsa.back", "unsealed", "nv.out", "aes.back")] == [random] * 4
