"""The console of a manager that is a process: started by its configuration, confined as it is, stopped with it."""

from __future__ import annotations

import ssl
import time

import httpx
import pytest
from support.guest import free_port
from support.manager_process import ManagerProcess


def test_over_tls_with_a_token_and_with_a_certificate() -> None:
    port = free_port()
    with ManagerProcess(f'[console]\naddress = "127.0.0.1:{port}"\n') as manager:
        url = f"https://localhost:{port}"
        own = {"origin": url, "sec-fetch-site": "same-origin"}
        context = ssl.create_default_context(cafile=str(manager.authorities))
        with httpx.Client(base_url=url, verify=context) as browser:
            assert browser.get("/").headers["location"] == "/login?next=%2F"
            answer = browser.post("/login", data={"token": manager.token("otto", "operator")}, headers=own)
            assert answer.status_code == 303 and "Secure" in answer.headers["set-cookie"]
            for path in ("/", "/timeline", "/materials", "/denials", "/resources", "/hosts", "/policies", "/events", "/you"):
                assert browser.get(path).status_code == 200, path
            shown = ssl.create_default_context(cafile=str(manager.authorities))
            manager.ca.issue_cert("operator.test").configure_cert(shown)
            with httpx.Client(base_url=url, verify=shown) as certified:
                assert certified.post("/login", data={"how": "certificate"}, headers=own).status_code == 303
                assert "operator" in certified.get("/you").text
                with certified.stream("GET", "/events/stream?after=1") as stream:
                    told = stream.iter_lines()
                    manager.token("alice", "operator")
                    while not next(told).startswith("data: "):
                        pass
                    began = time.monotonic()
                    assert manager.stop() == 0  # a page that follows events does not keep it
                    assert time.monotonic() - began < 10
                    list(told)
        audited = (manager.state / "audit.log").read_text()
        assert audited.count('"kind":"console.login"') == 2
        assert "Traceback" not in manager.log.read_text(), manager.log.read_text()


def test_plain_on_this_host() -> None:
    port = free_port()
    with ManagerProcess(f'[console]\naddress = "127.0.0.1:{port}"\nplain = true\n') as manager:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as browser:
            assert browser.get("/login").status_code == 200
            assert browser.get("/login", headers={"host": "manager.example.net"}).status_code == 421
        assert manager.stop() == 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ('address = "127.0.0.1:{port}"\ncertificate = "/nowhere"\nkey = "/nowhere"', "the console's certificate /nowhere"),
        ('address = "192.0.2.1:{port}"', "console.address 192.0.2.1"),
    ],
)
def test_one_that_cannot_be_begun_says_why(settings: str, says: str) -> None:
    manager = ManagerProcess("[console]\n" + settings.format(port=free_port()))
    try:
        assert says in manager.refuses_to_start()
    finally:
        manager.__exit__(None, None, None)
