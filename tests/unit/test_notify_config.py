"""What channels may be, and what is said of those that cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hsmvisor.manager.notify import limits, secrets
from hsmvisor.manager.notify.channels import Mail, Webhook
from hsmvisor.manager.notify.errors import Undelivered
from hsmvisor.serving.errors import BadConfig
from support.channels import channels

HOOK = {"name": "ops", "url": "https://hooks.example.net/x?y=z", "secret_file": "/etc/hsmvisor/hook"}
MAIL = {"name": "mail", "host": "mx.example.net", "sender": "hsmvisor@example.net", "to": ["ops@example.net"]}


def hook(**changes: Any) -> dict[str, Any]:
    return {"webhooks": [HOOK | changes]}


def mail(**changes: Any) -> dict[str, Any]:
    return {"mails": [MAIL | changes]}


def test_channels() -> None:
    made = channels({"webhooks": [HOOK], "mails": [MAIL | {"kinds": ["denied"], "owners": ["alice"]}]})
    assert made == [
        Webhook("ops", HOOK["url"], HOOK["secret_file"]),
        Mail("mail", "mx.example.net", "hsmvisor@example.net", ("ops@example.net",), kinds=("denied",), owners=("alice",)),
    ]
    assert made[0].wants("denied", "") and made[0].wants("issued", "bob")
    assert [made[1].wants(*pair) for pair in (("denied", "alice"), ("denied", "bob"), ("denied", ""), ("issued", "alice"))] == [
        True,
        False,
        False,
        False,
    ]
    assert channels({}) == []
    ports = {tls: channels(mail(tls=tls))[0].real_port for tls in ("starttls", "tls", "none")}  # type: ignore[attr-defined]
    assert ports == {"starttls": 587, "tls": 465, "none": 25}


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1/x", "http://[::1]:8080/", "http://localhost", "https://[2001:db8::1]/", "https://x"]
)
def test_urls(url: str) -> None:
    channels(hook(url=url))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"webhooks": [HOOK, HOOK]}, "^CONFIG: x: webhooks and mails: each name stands once, 'ops' does not"),
        ({"webhooks": [HOOK], "mails": [MAIL | {"name": "ops"}]}, "each name stands once"),
        ({"webhooks": [HOOK | {"name": f"h{i}"} for i in range(51)]}, "^CONFIG: x: webhooks and mails are at most 50, not 51"),
        ({"webhooks": [{"name": "x", "url": "https://x"}]}, r"^CONFIG: x: webhooks\[0\].secret_file is missing"),
        (hook(color="red"), r"x: unknown key webhooks\[0\].color; known here: ca_file, kinds, name, owners, secret_file, url"),
        (hook(name="Ops"), r"^CONFIG: x: webhooks\[0\].name is 1-64 of a-z 0-9 . _ - and begins with a letter or digit"),
        (hook(name="x" * 65), "name is 1-64"),
        (hook(name=5), "name is of type str, not int"),
        (hook(kinds="denied"), "kinds is a list"),
        (hook(kinds=[1]), r"kinds\[0\] is of type str, not int"),
        (hook(kinds=["nonsense"]), "kinds has 'nonsense', which is no kind of event: there are cancelled, "),
        (hook(owners=[""]), "owners are 1-128 printable characters"),
        (hook(owners=["x" * 129]), "owners are 1-128 printable characters"),
        (hook(url="http://hooks.example.net/"), "url is https: http is for loopback addresses alone"),
        (hook(url="http://127.0.0.1.example.net/"), "url is https: http is for"),
        (hook(url="ftp://x/"), "url is https://HOST/PATH"),
        (hook(url="https:///x"), "url is https://HOST/PATH"),
        (hook(url="https://me:hunter2@x/"), "url has no user and no password"),
        (hook(url="https://x/#y"), "url has no fragment"),
        (hook(url="https://x:0/"), "url has a port of 1 to 65535"),
        (hook(url="https://x:65536/"), "url is https://HOST/PATH"),
        (hook(url="https://x/a b"), "url is printable ASCII without spaces"),
        (hook(url="https://x/\r\nHost: y"), "url is printable ASCII without spaces"),
        (hook(url="https://x_/"), "url names a host"),
        (hook(url="https://x/" + "y" * (limits.MAX_URL - 9)), "url has at most 2000 characters"),
        (hook(secret_file="hook"), "secret_file is an absolute path"),
        (hook(secret_file=""), "secret_file is an absolute path"),
        (hook(ca_file="ca.pem"), "ca_file is an absolute path"),
        (mail(tls="ssl"), r"^CONFIG: x: mails\[0\].tls is starttls, tls or none, not 'ssl'"),
        (mail(port=65536), "port is 1 to 65535"),
        (mail(port=True), "port is of type int, not bool"),
        (mail(host="x y"), "host is a name or an address"),
        (mail(sender="Ops <ops@example.net>"), "sender is an address, as hsmvisor@example.net"),
        (mail(sender="a@b\r\nBcc: c@d"), "sender is an address"),
        (mail(to=[]), "to has 1 to 50 addresses"),
        (mail(to=["a@b"] * 51), "to has 1 to 50 addresses"),
        (mail(to=["a@b", "c"]), "to has 'c', which is no address"),
        (mail(to=["a@b\nBcc: c@d"]), "which is no address"),
        (mail(to=["x" * 64 + "@" + "y" * 190]), "which is no address"),
        (mail(user="me"), "user and password_file stand together"),
        (mail(user="me", password_file="pass"), "password_file is an absolute path"),
        (mail(user="me", password_file="/p", tls="none"), "tls is none, and a password would be sent so that others can read it"),
    ],
)  # fmt: skip
def test_channels_that_cannot_be(config: Any, said: str) -> None:
    with pytest.raises(BadConfig, match=said) as caught:
        channels(config)
    assert "hunter2" not in str(caught.value)


def test_limits_are_reached() -> None:
    channels(hook(url="https://x/" + "y" * (limits.MAX_URL - 10), name="x" * 64, owners=["x" * 128] * limits.MOST_OWNERS))
    channels(mail(to=["a@b"] * 50, sender="x" * 64 + "@" + "y" * 189, port=65535))
    channels({"webhooks": [HOOK | {"name": f"h{i}"} for i in range(50)]})
    with pytest.raises(BadConfig, match="owners are at most 1000"):
        channels(hook(owners=["x"] * (limits.MOST_OWNERS + 1)))


def test_secrets_that_others_can_read(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("whsec_x")
    file.chmod(0o640)
    with pytest.raises(BadConfig, match=f"secret_file can be read by others: chmod 600 {file}"):
        channels(hook(secret_file=str(file)))
    with pytest.raises(Undelivered, match="secret_file can be read by others"):
        secrets.signing_keys(str(file))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "secret_file has 1 to 4 secrets, a line each, not 0"),
        (f"whsec_{'A' * 32}\n" * 5, "secret_file has 1 to 4 secrets, a line each, not 5"),
        ("whsec_!!", "a secret is whsec_ and base64"),
        ("hunter2", "a secret is whsec_ and base64"),
        ("whsec_" + "A" * 28, "a secret has 24 to 64 bytes, this one has 21"),
        ("whsec_" + "A" * 88, "a secret has 24 to 64 bytes, this one has 66"),
        ("x" * 4097, "is a text of at most 4096 bytes"),
        ("\udc80", "is a text of at most"),
    ],
)
def test_secrets_that_cannot_be_used(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "secret"
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    file.chmod(0o600)
    with pytest.raises(Undelivered, match=said) as caught:
        secrets.signing_keys(str(file))
    assert "hunter2" not in str(caught.value) and "AAAA" not in str(caught.value)


def test_secrets(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    with pytest.raises(Undelivered, match="No such file"):
        secrets.signing_keys(str(file))
    file.touch(0o600)
    file.write_text(f"whsec_{'A' * 32}\n{'B' * 84}BA==\n")
    assert [len(key) for key in secrets.signing_keys(str(file))] == [24, 64]
    file.write_text("hunter2 \n")
    assert secrets.password(str(file)) == "hunter2 "
    for bad in ("", "\n", "ü", "a\nb"):
        file.write_text(bad)
        with pytest.raises(Undelivered, match="one line of printable ASCII"):
            secrets.password(str(file))
