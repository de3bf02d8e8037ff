"""The console over HTTP: who comes in, what is shown to whom, what is changed and how it is asked for, what is refused."""

from __future__ import annotations

import asyncio
import html
import json
import re
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from hsmvisor.manager import web as web_server
from hsmvisor.manager.config import BadConfig, Client, Config, parse
from hsmvisor.manager.config import Console as Settings
from hsmvisor.manager.console import limits
from hsmvisor.manager.history.events import Happened, Kind
from hsmvisor.manager.policy.engine import Policies
from hsmvisor.manager.policy.questions import Source
from hsmvisor.manager.roles import Role
from hsmvisor.manager.store import lines
from hsmvisor_rpc.sealed.refusal import Reason, Refusal
from support.console import Browser, Rig, rig, web

PAGES = ("/", "/timeline", "/materials", "/denials", "/resources", "/events", "/you")
STAFF_PAGES = ("/hosts", "/hosts/rack-1", "/policies", "/policies/1")

Scenario = Callable[[Rig], Awaitable[None]]


def play(directory: Path, scenario: Scenario, **options: Any) -> None:
    async def whole() -> None:
        async with rig(directory, **options) as made:
            await scenario(made)

    asyncio.run(whole())


def texts(page: str) -> str:
    """What a reader sees of it."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


# ---- coming in ------------------------------------------------------------------------------------------------------------


def test_a_stranger_sees_the_login_page_alone(tmp_path: Path) -> None:
    async def scenario(made: Rig) -> None:
        row = await web(made.fleet)
        stranger = made.browser()
        for path in (*PAGES, *STAFF_PAGES, f"/materials/{row.id}", f"/materials/{row.id}/rotate", "/nothing/such"):
            answer = await stranger.get(path)
            if path == "/nothing/such":
                assert answer.status_code == 404
                continue
            assert answer.status_code == 303, path
            assert answer.headers["location"].startswith("/login?next=%2F"), path
        assert (await stranger.get("/events/stream", **{"sec-fetch-dest": "empty"})).status_code == 401
        assert (await stranger.post(f"/materials/{row.id}/rotate", request="r")).status_code == 401
        assert (await stranger.post("/logout")).status_code == 401
        assert "Access token" in await stranger.text("/login")

    play(tmp_path, scenario)


def test_a_token_opens_a_session_and_a_wrong_one_does_not(tmp_path: Path) -> None:
    async def scenario(made: Rig) -> None:
        token, browser = await made.token("alice"), made.browser()
        for wrong in ("", "nothing", token[:-1] + ("A" if token[-1] != "A" else "B")):
            answer = await browser.post("/login", token=wrong)
            assert answer.status_code in (400, 401) and "set-cookie" not in answer.headers, wrong
        answer = await browser.post("/login", token=f" {token}\n", next="/timeline")
        assert (answer.status_code, answer.headers["location"]) == (303, "/timeline")
        cookie = answer.headers["set-cookie"]
        assert cookie.startswith("hsmvisor-console=") and token not in cookie
        for rule in ("HttpOnly", "Path=/", "SameSite=strict"):
            assert rule in cookie, cookie
        assert "Max-Age" not in cookie and "Domain" not in cookie
        assert "alice" in await browser.text("/you")
        audited = await made.audited()
        assert '"kind":"console.login"' in audited and '"method":"console.login","via":"console","result":"refused"' in audited
        assert token not in audited and token.rpartition(".")[2] not in audited

    play(tmp_path, scenario)


@pytest.mark.parametrize("target", ["//evil.example", "https://evil.example", "/\\evil.example", "/a\\b", "javascript:x", "/login"])
def test_nobody_is_sent_elsewhere_by_a_login(tmp_path: Path, target: str) -> None:
    async def scenario(made: Rig) -> None:
        browser = made.browser()
        answer = await browser.post("/login", token=await made.token(), next=target)
        assert answer.headers["location"] == "/"

    play(tmp_path, scenario)


def test_a_session_ends(tmp_path: Path) -> None:
    async def scenario(made: Rig) -> None:
        browser = await made.logged_in()
        made.ticks.now += 1700
        await browser.text("/")
        made.ticks.now += 1700
        await browser.text("/")  # it is used
        for _ in range(3):  # what a page asks for by itself is no use
            made.ticks.now += 800
            answer = await browser.get("/", **{"sec-fetch-dest": "empty"})
        assert answer.status_code == 401
        assert (await browser.get("/")).status_code == 303
        used = await made.logged_in()
        for _ in range(8 * 3600 // 1700):
            made.ticks.now += 1700
            assert (await used.get("/")).status_code == 200
        made.ticks.now += 1700
        assert (await used.get("/")).status_code == 303  # in any case

    play(tmp_path, scenario)


def test_logging_out_and_a_revoked_token_end_it(tmp_path: Path) -> None:
    async def scenario(made: Rig) -> None:
        browser = await made.logged_in()
        before = dict(browser.client.cookies)
        assert (await browser.post("/logout", csrf="wrong")).status_code == 403
        answer = await browser.post("/logout", csrf=await browser.csrf())
        assert answer.status_code == 303 and "Max-Age=0" in answer.headers["set-cookie"]
        again = made.browser(cookies=before)  # what somebody copied
        assert (await again.get("/")).status_code == 303

        token, other = await made.token("alice"), made.browser()
        await other.post("/login", token=token)
        await other.text("/")
        await made.revoke(token)
        assert (await other.get("/")).status_code == 303

    play(tmp_path, scenario)


def test_each_login_has_a_session_of_its_own(tmp_path: Path) -> None:
    async def scenario(made: Rig) -> None:
        token, browser = await made.token("alice"), made.browser()
        answer = await browser.post("/login", {**_own(made), "cookie": "hsmvisor-console=chosen-by-somebody-else"}, token=token)
        first = answer.cookies["hsmvisor-console"]
        assert first != "chosen-by-somebody-else"
        answer = await browser.post("/login", token=token)
        assert answer.status_code == 303 and answer.cookies["hsmvisor-console"] != first
        stolen = made.browser(cookies={"hsmvisor-console": first})
        assert (await stolen.get("/")).status_code == 303  # it ended with the new one

    play(tmp_path, scenario)


def test_attempts_are_counted(tmp_path: Path) -> None:
    async def scenario(made: Rig) -> None:
        browser, token = made.browser(), await made.token()
        found = [(await browser.post("/login", token="hsmvisor-token:wrong")).status_code for _ in range(int(limits.BURST) + 2)]
        assert found[: int(limits.BURST)] == [401] * int(limits.BURST)
        assert found[-1] == 429
        assert (await browser.post("/login", token=token)).status_code == 429

    play(tmp_path, scenario)


def _own(made: Rig) -> dict[str, str]:
    return {"origin": made.url, "sec-fetch-site": "same-origin"}


# ---- what comes from elsewhere --------------------------------------------------------------------------------------------


def test_forms_of_other_pages_are_refused(tmp_path: Path) -> None:
    async def scenario(made: Rig) -> None:
        row = await web(made.fleet)
        browser, other = await made.logged_in(), await made.logged_in()
        path = f"/materials/{row.id}/rotate"
        csrf, foreign = await browser.csrf(), await other.csrf()
        good = {"origin": made.url, "sec-fetch-site": "same-origin"}
        for headers, form in (
            (good, {}),
            (good, {"csrf": ""}),
            (good, {"csrf": "wrong"}),
            (good, {"csrf": foreign}),
            ({}, {"csrf": csrf}),
            ({"origin": "null"}, {"csrf": csrf}),
            ({"origin": "https://evil.example"}, {"csrf": csrf}),
            ({"origin": made.url.replace("http:", "https:")}, {"csrf": csrf}),
            (good | {"sec-fetch-site": "cross-site"}, {"csrf": csrf}),
            (good | {"sec-fetch-site": "same-site"}, {"csrf": csrf}),
        ):
            answer = await browser.post(path, headers, request="r-1", **form)
            assert answer.status_code == 403, (headers, form)
        for headers in ({}, {"origin": "https://evil.example"}):
            assert (await made.browser().post("/login", headers, token=await made.token())).status_code == 403
        assert [line.triggered_at for line in await made.fleet.lines(row)] == [0.0, 0.0]
        assert 'RequestService/Rotate","via":"console","result":"refused","reason":"CSRF"' in await made.audited()
        assert (await browser.get(path)).status_code == 200  # a GET changes nothing
        assert [line.triggered_at for line in await made.fleet.lines(row)] == [0.0, 0.0]

    play(tmp_path, scenario)


def test_other_names_do_not_lead_to_a_plain_console(tmp_path: Path) -> None:
    async def scenario(made: Rig) -> None:
        browser = made.browser()
        for name in ("evil.example", "localhost.evil.example", ""):
            assert (await browser.get("/login", host=name)).status_code in (400, 421), name
        for name in ("localhost:8473", "127.0.0.1", "[::1]:8473"):
            assert (await browser.get("/login", host=name)).status_code == 200, name

    play(tmp_path, scenario)


def test_every_answer_has_the_headers(tmp_path: Path) -> None:
    policy = (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
        "base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types console"
    )

    async def scenario(made: Rig) -> None:
        row = await web(made.fleet)
        browser = await made.logged_in("otto", "operator")
        one = f"/materials/{row.id}"
        paths = (*PAGES, *STAFF_PAGES, one, f"{one}/rotate", "/login", "/nothing/such", "/materials/unknown", "/static/console.js")
        answers = [await browser.get(path) for path in paths]
        answers.append(await browser.post(f"{one}/rotate"))
        for answer in answers:
            assert answer.headers["content-security-policy"] == policy, answer.url
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["referrer-policy"] == "same-origin"
            assert answer.headers["cache-control"] == ("no-cache" if "/static/" in str(answer.url) else "no-store")
            assert "server" not in answer.headers
            if "/static/" not in str(answer.url):
                page = answer.text.lower()
                assert not re.search(r"\son[a-z]+=|javascript:|style=|<style|<script(?! src=\"/static/)", page), answer.url
                assert not re.search(r"(?:src|href|action)=\"(?!/|#)", page), answer.url

    play(tmp_path, scenario)


def test_what_is_too_large_or_odd_is_refused(tmp_path: Path) -> None:
    async def scenario(made: Rig) -> None:
        browser = await made.logged_in()
        own = {"origin": made.url, "sec-fetch-site": "same-origin"}
        assert (await browser.post("/login", token="x" * (limits.MAX_FORM + 1))).status_code == 400
        assert (await browser.post("/login", token="x" * (limits.MAX_FIELD + 1))).status_code == 400
        form = own | {"content-type": "application/x-www-form-urlencoded"}
        many = "&".join(f"f{n}=1" for n in range(limits.MAX_FIELDS + 1))
        for content in (many, "token=a&token=b", "token=%FF"):
            assert (await browser.client.post("/login", content=content, headers=form)).status_code == 400, content[:20]
        assert (await browser.client.post("/login", json={"token": "x"}, headers=own)).status_code == 400
        assert (await browser.client.request("DELETE", "/")).status_code == 405
        assert (await browser.client.post("/", headers=own)).status_code == 405
        assert (await browser.get("/" + "x" * web_server.MAX_HEADERS * 2)).status_code in (400, 431)
        assert (await browser.get("/events?page=xyz")).status_code == 400
        assert (await browser.get("/events?kind=xyz")).status_code == 400
        assert (await browser.get("/policies/99999999999999999999")).status_code == 403

    play(tmp_path, scenario)


def test_a_request_that_does_not_come_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REQUEST_SECONDS", 0.5)
    monkeypatch.setattr(web_server, "KEEP_ALIVE", 0.5)

    async def scenario(made: Rig) -> None:
        for beginning in (b"", b"GET /login HTTP/1.1\r\nhost: local"):
            reader, writer = await asyncio.open_connection("127.0.0.1", made.console.server.port)
            writer.write(beginning)
            assert await asyncio.wait_for(reader.read(), 5) == b""
            writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", made.console.server.port)
        head = "POST /login HTTP/1.1\r\nhost: localhost\r\norigin: http://localhost\r\ncontent-length: 9\r\n"
        writer.write(f"{head}content-type: application/x-www-form-urlencoded\r\n\r\nto".encode())
        assert b" 400 " in await asyncio.wait_for(reader.readline(), 5)
        writer.close()

    play(tmp_path, scenario)


# ---- whose things ---------------------------------------------------------------------------------------------------------


def test_owners_see_what_is_theirs(tmp_path: Path) -> None:
    async def scenario(made: Rig) -> None:
        row = await web(made.fleet)
        made.fleet.hosts["rack-1"].add("box", owner="bob", role="bobs")
        await made.fleet.settle()
        await made.fleet.ask("bob", material="bobs-own", names=("dns:{name}.example.net",), selector={"role": "bobs"})
        await made.fleet.settle()
        bob, alice, otto = await made.logged_in("bob"), await made.logged_in("alice"), await made.logged_in("otto", "operator")
        unknown = await bob.get("/materials/" + "0" * 32)
        for path in (f"/materials/{row.id}", f"/materials/{row.id}/rotate", f"/materials/{row.id}/cancel"):
            assert (await bob.get(path)).status_code == 404, path
        hidden = await bob.get(f"/materials/{row.id}")
        assert hidden.text.replace(row.id, "0" * 32) == unknown.text  # it is as if there were none
        assert (await bob.get("/resources/rack-1/web-1")).status_code == 404
        answer = await bob.post(f"/materials/{row.id}/rotate", csrf=await bob.csrf(), request="r-1")
        assert answer.status_code == 404
        for path in (*PAGES, "/materials?owner=alice", "/resources?with=owner=alice", "/events?kind=delivered"):
            page = await bob.text(path)
            assert "web-1" not in page and row.id not in page, path
        for path in STAFF_PAGES:
            assert (await bob.get(path)).status_code == 403, path
            assert (await otto.get(path)).status_code == 200, path
        page = await otto.text("/materials")
        assert row.id in page and "bobs-own" in page
        assert row.id in await alice.text("/materials") and "bobs-own" not in await alice.text("/materials")
        assert "web-1" in await otto.text("/resources?with=role=web") and "box" not in await otto.text("/resources?with=role=web")

    play(tmp_path, scenario)


def test_an_auditor_sees_all_and_changes_nothing(tmp_path: Path) -> None:
    async def scenario(made: Rig) -> None:
        row = await web(made.fleet)
        auditor = await made.logged_in("audrey", "auditor")
        for path in (*PAGES, *STAFF_PAGES, f"/materials/{row.id}"):
            page = await auditor.text(path)
        assert "/rotate" not in page
        assert (await auditor.get(f"/materials/{row.id}/rotate")).status_code == 403
        assert (await auditor.post(f"/materials/{row.id}/rotate", csrf=await auditor.csrf(), request="r-1")).status_code == 403
        assert '"reason":"ROLE"' in await made.audited()
        assert [line.triggered_at for line in await made.fleet.lines(row)] == [0.0, 0.0]

    play(tmp_path, scenario)


# ---- what pages tell ------------------------------------------------------------------------------------------------------


def test_a_material_with_all_that_keeps_it_waiting(tmp_path: Path) -> None:
    async def scenario(made: Rig) -> None:
        fleet = made.fleet
        row = await web(fleet)
        away = await fleet.host("rack-2")
        away.add("web-9", role="web")
        lying = await fleet.host("rack-3", trusted=False)
        lying.add("web-7", role="web")
        for host in (away, lying):
            await fleet.exchange(host, carry_out=False)
        await fleet.settle(away=("rack-2",))
        await fleet.pass_(90, step=30, away=("rack-2",))
        browser = await made.logged_in()
        page = texts(await browser.text(f"/materials/{row.id}"))
        assert "Its 4 keys" in page
        assert "rack-1/web-1 serving Generation 1, since 2027-01-15 08:00 UTC" in page
        assert "Next renewal its certificate nears its end, at 2027-02-0" in page
        assert "Rule and reason Since rack-3/web-7 distribute no rule permits it (policies, version 1)" in page
        assert "rack-2/web-9 away" in page
        denials = texts(await browser.text("/denials"))
        assert "tls rack-3/web-7 distribute no rule permits it version 1" in denials
        first = texts(await browser.text("/"))
        assert "1 denied" in first and "4 resources" in first
        host = texts(await (await made.logged_in("otto", "operator")).text("/hosts"))
        assert "rack-2 away" in host and "rack-1 there" in host
        resource = texts(await browser.text("/resources/rack-1/web-1"))
        assert "role web" in resource and "tls active 1 1 1" in resource

    play(tmp_path, scenario)


def test_the_timeline(tmp_path: Path) -> None:
    async def scenario(made: Rig) -> None:
        await web(made.fleet)
        host = made.fleet.hosts["rack-1"]
        host.add("short", role="short")
        await made.fleet.settle()
        await made.fleet.ask(material="brief", names=("dns:{name}.example.net",), lifetime=3600, selector={"role": "short"})
        await made.fleet.settle()
        browser = await made.logged_in()
        page = await browser.text("/timeline")
        labels = re.findall(r'<a href="/materials/\w+" class="(\w+)" aria-label="([^"]+)"', page)
        assert [(state, label.partition(":")[0]) for state, label in labels] == [
            ("good", "brief · rack-1/short"),
            ("good", "tls · rack-1/web-1"),
            ("good", "tls · rack-1/web-2"),
        ]
        assert "renewed 2027-01-15 08:2" in labels[0][1] and "ends 2027-01-15 09:00 UTC" in labels[0][1]
        for element in ("<title", "<desc", 'role="group"', "<table>"):
            assert element in page
        made.fleet.clock.now += 7200
        assert 'class="expired"' in await browser.text("/timeline")
        assert "1 expired" in texts(await browser.text("/"))

    play(tmp_path, scenario)


ODD = "<img src=x onerror=alert(1)>\"'{{7*7}}"


def test_names_of_others_are_shown_as_text(tmp_path: Path) -> None:
    async def scenario(made: Rig) -> None:
        fleet = made.fleet
        reason = "<script>alert(1)</script>"
        fleet.policies = Policies(
            '@id("own") permit (principal, action, resource) when { resource.owner == principal };\n'
            f'@id("no") @reason("{reason}") forbid (principal, action, resource) when {{ resource.host.trusted == false }};',
            2,
        )
        host, lying = await fleet.host("rack-1"), await fleet.host("rack-2", trusted=False)
        for one in (host, lying):
            one.add(f"web-{one.name}", role="web", note=ODD)
        await fleet.settle()
        row = await fleet.ask(
            material=ODD, names=("dns:{name}.example.net",), lifetime=86400, selector={"role": "web", "note": ODD}
        )
        await fleet.settle()
        async with fleet.database.transaction() as connection:
            (line, *_) = await lines.lines_of_request(connection, row.id)
            await lines.change_line(connection, line.id, failures=2, failed_at=fleet.clock(), why=f"{ODD} failed")
            await fleet.history.add(
                connection, Happened(Kind.FAILED, "alice", row.id, ODD, line.resource_id, detail={"why": f"{ODD} event", ODD: 1})
            )
        alice, otto = await made.logged_in(), await made.logged_in("otto", "operator")
        one = f"/materials/{row.id}"
        answer = await alice.confirm(f"{one}/rotate", why=ODD)
        assert answer.status_code == 303
        seen = 0
        for browser in (alice, otto):
            for path in (
                *PAGES,
                one,
                f"{one}/rotate",
                f"{one}/cancel",
                "/resources/rack-1/web-rack-1",
                f"/resources?with=note={ODD}",
            ):
                page = await browser.text(path)
                assert "<img src=x" not in page and reason not in page, path
                shown = html.unescape(page)
                assert shown.count("<img src=x") == shown.count(ODD), path  # whole: nobody reckoned what is in its braces
                seen += shown.count(ODD)
        assert seen > 30
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in await alice.text("/denials")
        assert texts(await alice.text(one)).startswith(f"{ODD} · hsmvisor")
        async with alice.client.stream("GET", "/events/stream?after=1") as stream:
            async for event in events_of(stream):
                if event["material"] == ODD:
                    break
        assert event["material"] == ODD  # JSON, put in as text by the script

    play(tmp_path, scenario)


# ---- changing -------------------------------------------------------------------------------------------------------------


def test_rotating_is_asked_for_once_more_and_done_once(tmp_path: Path) -> None:
    async def scenario(made: Rig) -> None:
        fleet = made.fleet
        row = await web(fleet)
        await fleet.pass_(60, step=30)
        browser = await made.logged_in()
        path = f"/materials/{row.id}"
        assert f'href="{path}/rotate"' in await browser.text(path)
        page = await browser.text(f"{path}/rotate?resource=rack-1/web-2")
        assert '<option value="rack-1/web-2" selected>' in page and "Nothing in the guests restarts" in page
        form = {name: found[1] for name in ("csrf", "request") if (found := re.search(rf'name="{name}" value="([^"]+)"', page))}
        form |= {"resource": "rack-1/web-2", "why": "a new key, please"}
        for _ in range(2):  # the same form twice
            answer = await browser.post(f"{path}/rotate", **form)
            assert (answer.status_code, answer.headers["location"]) == (303, path)
        assert "A new generation is asked for." in await browser.text(path)
        assert "A new generation is asked for." not in await browser.text(path)
        await fleet.settle()
        assert {line.resource_id: line.serving for line in await fleet.lines(row)} == {"rack-1/web-1": 1, "rack-1/web-2": 2}
        lines_of_it = [json.loads(line) for line in (await made.audited()).splitlines() if '"kind":"request.rotate"' in line]
        assert [line["result"] for line in lines_of_it] == ["ok", "repeated"]
        assert lines_of_it[0]["who"].startswith("token:") and lines_of_it[0]["why"] == "a new key, please"
        assert (lines_of_it[0]["via"], lines_of_it[0]["material"]) == ("console", "tls")
        told = [event for event in await fleet.events("changed") if event.detail.get("what") == "rotate"]
        assert len(told) == 1 and told[0].detail["why"] == "a new key, please"
        form["why"] = "another"
        assert (await browser.post(f"{path}/rotate", **form)).status_code == 409  # the same id for something else

    play(tmp_path, scenario)


def test_the_other_buttons(tmp_path: Path) -> None:
    async def scenario(made: Rig) -> None:
        fleet = made.fleet
        row = await web(fleet, count=1)
        await fleet.pass_(60, step=30)
        browser, path = await made.logged_in(), f"/materials/{row.id}"

        async def go(action: str, **form: str) -> None:
            answer = await browser.confirm(f"{path}/{action}", **form)
            assert answer.status_code == 303, texts(answer.text)
            await fleet.pass_(60, step=30)

        line = await fleet.line(row)
        answer = await browser.confirm(f"{path}/rotate-urgently")
        assert answer.status_code == 400 and "tick that you are sure" in answer.text
        await go("rotate-urgently", sure="yes", reason="key_compromise", why="it was seen")
        states = {g.number: (g.state, bool(g.revoked_at)) for g in await fleet.generations(line)}
        assert states == {1: ("superseded", True), 2: ("serving", False)}
        answer = await browser.confirm(f"{path}/roll-back", sure="yes")  # to one that is revoked
        assert answer.status_code == 409 and "no generation before" in answer.text and 'role="alert"' in answer.text
        await go("rotate")
        await go("roll-back", sure="yes", why="it was better before")
        assert (await fleet.line(row)).serving == 2
        await go("revoke", sure="yes", generation="2", reason="superseded")
        assert {g.number for g in await fleet.generations(line) if g.revoked_at} >= {1, 2}
        assert (await browser.confirm(f"{path}/revoke", sure="yes", generation="x")).status_code == 400
        assert (await browser.confirm(f"{path}/revoke", sure="yes", reason="because")).status_code == 400
        answer = await browser.confirm(f"{path}/activate")
        assert answer.status_code == 409 and "no generation is staged" in answer.text
        await go("cancel", sure="yes", keep="yes", why="it is over")
        page = await browser.text(path)
        assert "cancelled" in page and "/rotate" not in page and "/cancel" not in page
        assert (await browser.get(f"{path}/nothing")).status_code == 404
        kinds = set(re.findall(r'"kind":"(request\.\w+)"', await made.audited()))
        assert kinds == {"request.rotate", "request.rollback", "request.revoke", "request.activate", "request.cancel"}

    play(tmp_path, scenario)


def test_activating_what_is_staged(tmp_path: Path) -> None:
    async def scenario(made: Rig) -> None:
        fleet = made.fleet
        row = await web(fleet, names=("dns:www.example.net",), two_step=True, source=Source.ISSUER)
        fleet.hosts["rack-1"].refuse = _refuse_stage("web-2")
        await fleet.pass_(60, step=30)
        browser, path = await made.logged_in(), f"/materials/{row.id}"
        assert (await browser.confirm(f"{path}/rotate")).status_code == 303
        await fleet.pass_(30, step=15)
        assert (await fleet.line(row)).serving == 1
        assert f"{path}/activate" in await browser.text(path)
        assert (await browser.confirm(f"{path}/activate")).status_code == 303
        await fleet.pass_(30, step=15)
        assert (await fleet.line(row)).serving == 2
        page = texts(await browser.text(path))
        assert "rack-1/web-2 pending 1 1 2 1 current not now" in page  # staged, active, wanted, what it has, and why
        assert "rack-1/web-1 active 2 2 2" in page

    play(tmp_path, scenario)


def _refuse_stage(module: str) -> Any:
    def refuse(name: str, command: Any) -> Refusal | None:
        return (
            Refusal(Reason.REPLAY, "not now") if name == module and command.action == "stage" and command.generation == 2 else None
        )

    return refuse


# ---- events ---------------------------------------------------------------------------------------------------------------


async def events_of(stream: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in stream.aiter_lines():
        if line.startswith("data: {") and len(line) > 9:
            yield json.loads(line[6:])


def test_events_are_followed_and_resumed(tmp_path: Path) -> None:
    async def scenario(made: Rig) -> None:
        fleet = made.fleet
        row = await web(fleet)
        alice, bob = await made.logged_in(), await made.logged_in("bob")
        last = max(event.id for event in await fleet.events())
        page = await alice.text(f"/materials/{row.id}")
        newest = max(event.id for event in await fleet.events() if event.request_id == row.id)
        assert f'data-stream="/events/stream?after={newest}&amp;request={row.id}"' in page

        async def happen(number: int, owner: str = "alice", request_id: str = row.id) -> None:
            async with fleet.database.transaction() as connection:
                await fleet.history.add(connection, Happened(Kind.CHANGED, owner, request_id, "tls", detail={"what": str(number)}))

        async def take(browser: Browser, count: int, path: str, **headers: str) -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = []
            async with asyncio.timeout(10), browser.client.stream("GET", path, headers=headers) as stream:
                assert stream.headers["content-type"].startswith("text/event-stream")
                async for event in events_of(stream):
                    found.append(event)
                    if len(found) == count:
                        break
            return found

        path = f"/events/stream?after={last}&request={row.id}"
        coming = asyncio.create_task(take(alice, 1, path))
        await asyncio.sleep(0.3)
        await happen(1)
        (first,) = await coming
        assert (first["text"], first["material_href"], first["id"]) == ("what 1", f"/materials/{row.id}", last + 1)
        await happen(2)
        await happen(3, "bob", "other")
        await happen(4)
        # the browser comes again with what it saw last, which counts more than what the page said
        resumed = await take(alice, 2, path, **{"last-event-id": str(first["id"])})
        assert [event["text"] for event in resumed] == ["what 2", "what 4"]
        (own,) = await take(bob, 1, f"/events/stream?after={last}")
        assert own["text"] == "what 3"
        for wrong in ("x", "-1", "9" * 25):
            assert (await alice.get("/events/stream?after=" + wrong)).status_code == 400
        async with asyncio.timeout(10), alice.client.stream("GET", "/events/stream?after=999999") as stream:
            async for line in stream.aiter_lines():
                if line == "event: lost":
                    break

    play(tmp_path, scenario)


def test_a_stream_ends_with_its_session_and_with_the_manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HEARTBEAT", 0.1)
    monkeypatch.setattr(limits, "STREAMS_OF_ONE", 2)

    async def scenario(made: Rig) -> None:
        browser = await made.logged_in()
        async with asyncio.timeout(10), browser.client.stream("GET", "/events/stream") as stream:
            told = stream.aiter_lines()
            while await anext(told) != ": still here":
                pass
            made.ticks.now += 1801
            while await anext(told) != "event: over":
                pass
        again = await made.logged_in()
        opened = []
        for _ in range(2):
            opened.append(again.client.stream("GET", "/events/stream"))
            await opened[-1].__aenter__()
        assert (await again.get("/events/stream")).status_code == 429
        for one in opened:
            await one.__aexit__(None, None, None)
        async with asyncio.timeout(20):  # those that were closed make room
            while True:
                last = again.client.stream("GET", "/events/stream")
                stream = await last.__aenter__()
                if stream.status_code != 429:
                    break
                await last.__aexit__(None, None, None)
                await asyncio.sleep(0.02)
        assert stream.status_code == 200
        async with asyncio.timeout(5):
            await made.console.__aexit__(None, None, None)
            assert [line async for line in stream.aiter_lines()][-1:] != ["event: over"]
        await last.__aexit__(None, None, None)
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", made.console.server.port), 1)
        await made.console.server.start()  # for the end of the rig

    play(tmp_path, scenario)


# ---- TLS ------------------------------------------------------------------------------------------------------------------


def test_a_client_certificate_opens_a_session_that_needs_it(tmp_path: Path) -> None:
    ca, stranger_ca = trustme.CA(), trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "owners.pem")
    config = Config(clients=(Client(owner="ann", san="ann.test"), Client(owner="otto", san="otto.test", roles=(Role.OPERATOR,))))

    def shown(made: Rig, name: str = "", by: trustme.CA = ca) -> Browser:
        context = ssl.create_default_context(cafile=str(made.own.authorities))
        if name:
            by.issue_cert(name).configure_cert(context)
        return made.browser(verify=context)

    async def scenario(made: Rig) -> None:
        await web(made.fleet)
        ann, nobody, without = shown(made, "ann.test"), shown(made, "nobody.test"), shown(made)
        assert "Your browser shows a client certificate" in await ann.text("/login")
        assert "client certificate" not in await without.text("/login")
        answer = await ann.post("/login", how="certificate")
        assert answer.status_code == 303
        cookie = answer.headers["set-cookie"]
        assert cookie.startswith("__Host-hsmvisor=") and "Secure" in cookie and "HttpOnly" in cookie and "Path=/" in cookie
        assert "ann" in await ann.text("/you")
        assert (await nobody.post("/login", how="certificate")).status_code == 403
        assert (await without.post("/login", how="certificate")).status_code == 401
        for other in (shown(made), shown(made, "otto.test")):  # the session alone is not enough
            other.client.cookies = ann.client.cookies
            assert (await other.get("/")).status_code == 303
        assert (await ann.get("/")).status_code == 303  # and it ended when somebody tried
        with pytest.raises(httpx.TransportError):
            await shown(made, "ann.test", stranger_ca).get("/login")
        assert (await without.post("/login", token=await made.token("bob"))).status_code == 303
        assert "bob" in await without.text("/you")

    play(tmp_path, scenario, config=config, tls=True, client_ca=tmp_path / "owners.pem")


def test_a_renewed_certificate_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hsmvisor.manager.web.LOOK_EVERY", 0.05)

    async def scenario(made: Rig) -> None:
        def serial() -> str:
            return ssl.get_server_certificate(("127.0.0.1", made.console.server.port))

        before = await asyncio.to_thread(serial)
        made.own.file.write_text("half a file")
        await asyncio.sleep(0.2)
        assert await asyncio.to_thread(serial) == before
        await made.own.ensure()
        async with asyncio.timeout(20):
            while await asyncio.to_thread(serial) == before:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    play(tmp_path, scenario, tls=True)


def test_the_settings(tmp_path: Path) -> None:
    base = f'state_directory = "{tmp_path}"\n[console]\n'
    good = parse(base + 'address = "127.0.0.1:8473"\nplain = true\nidle_seconds = 60\n', "test")
    assert good.console == Settings("127.0.0.1:8473", plain=True, idle_seconds=60)
    for wrong in (
        'address = "0.0.0.0:8473"\nplain = true',
        'address = "127.0.0.1:8473"\nplain = true\ncertificate = "/a"\nkey = "/b"',
        'address = "127.0.0.1:8473"\nidle_seconds = 1',
        "plain = true",
    ):
        with pytest.raises(BadConfig):
            parse(base + wrong, "test")
    assert "console.test" in replace(good, console=Settings("console.test:443")).served_names
