"""The console in a real browser: what a person does there, in the light and the dark, on a wide and on a narrow screen."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hsmvisor.manager.policy.questions import Source
from hsmvisor.manager.renewal.decisions import Rule
from hsmvisor.manager.store.rows import RequestRow
from hsmvisor_rpc.sealed.commands import Command
from hsmvisor_rpc.sealed.refusal import Reason, Refusal
from support.console import Rig, rig
from support.fleet import Clock, Fleet
from support.webdriver import Chromium, chromium

pytestmark = pytest.mark.real

DAY = 86400.0
POLICY = """
@id("own-resources")
permit (principal, action, resource) when { resource.owner == principal && resource.host.trusted };
@id("no-lab") @reason("hosts of the lab do not get names of customers' sites")
forbid (principal, action, resource) when { !resource.host.trusted && context.touches.contains("shop.example.net") };
"""
MOST_BYTES = 300_000  #: of the picture in the documentation

Scenario = Callable[[Rig, Chromium, dict[str, RequestRow]], Awaitable[None]]


async def _spread(fleet: Fleet) -> dict[str, RequestRow]:
    """A fleet of twelve resources that has been at work for a while."""
    clock, now = fleet.clock, time.time()
    clock.now = now - 21 * DAY
    racks = {name: await fleet.host(name, trusted=name != "lab-1") for name in ("fra-1", "fra-2", "ham-1", "lab-1")}
    for name, host, kind, role in (
        ("shop-1", "fra-1", "VM", "shop"),
        ("shop-2", "fra-2", "VM", "shop"),
        ("shop-3", "ham-1", "VM", "shop"),
        ("shop-test", "lab-1", "VM", "shop"),
        ("mail-1", "fra-1", "VM", "mail"),
        ("mail-2", "ham-1", "VM", "mail"),
        ("orders", "fra-2", "database", "orders"),
        ("stock", "ham-1", "database", "stock"),
        ("build-1", "fra-1", "server", "build"),
        ("vpn-1", "fra-2", "VM", "vpn"),
        ("vpn-2", "ham-1", "VM", "vpn"),
        ("archive", "fra-1", "volume", "archive"),
    ):
        racks[host].add(name, role=role, kind=kind)
    await fleet.settle()
    asked: dict[str, RequestRow] = {}

    async def ask(days_ago: float, material: str, names: tuple[str, ...], days: float, role: str, **more: Any) -> None:
        clock.now = now - days_ago * DAY
        await fleet.settle()
        selector = {"role": role}
        asked[material] = await fleet.ask(material=material, names=names, lifetime=int(days * DAY), selector=selector, **more)
        await fleet.settle()

    await ask(21, "shop-tls", ("dns:shop.example.net", "dns:www.example.net"), 90, "shop", source=Source.ISSUER)
    await ask(20, "vpn", ("dns:{name}.vpn.example.net",), 365, "vpn", key_type="P-384")
    await ask(19, "backups", ("dns:archive.example.net",), 30, "archive", renewal=Rule(enabled=False))
    await ask(17, "mail-tls", ("dns:{name}.example.net",), 30, "mail")
    await ask(3, "orders-db", ("dns:{name}.db.example.net",), 7, "orders")
    await ask(2, "stock-db", ("dns:{name}.db.example.net",), 7, "stock")
    await ask(0.02, "build-signer", ("dns:build.example.net",), 1, "build")
    away = ("ham-1",)

    def refuse(name: str, command: Command) -> Refusal | None:
        full = name == "orders" and command.action == "generate" and command.generation == 2
        return Refusal(Reason.LIMIT, "the module has no room for another key") if full else None

    racks["fra-2"].refuse = refuse
    async with fleet.database.transaction() as connection:
        await fleet.asking.rotate(connection, asked["orders-db"], "", False, False, "", "alice", "after an update")
    clock.now = now - 900
    await fleet.settle(away)
    async with fleet.database.transaction() as connection:
        await fleet.asking.rotate(connection, asked["shop-tls"], "", False, False, "", "alice", "a new layout of names")
    clock.now = now
    await fleet.settle(away)
    return asked


def play(directory: Path, scenario: Scenario, **options: Any) -> None:
    async def whole() -> None:
        fleet = await Fleet.begin(directory, policy=POLICY, clock=Clock(time.time()))
        asked = await _spread(fleet)
        async with rig(directory, fleet, **options) as made, chromium(directory) as browser:
            await scenario(made, browser, asked)

    asyncio.run(whole())


async def log_in(made: Rig, browser: Chromium, owner: str = "alice", *roles: str) -> None:
    await browser.go(made.url)
    assert await browser.path() == "/login"
    await browser.type("#token", await made.token(owner, *roles))
    await browser.click("button.main")
    await browser.until("location.pathname === '/' && document.readyState === 'complete'")


def test_a_material_is_rotated_and_the_page_follows(tmp_path: Path) -> None:
    async def scenario(made: Rig, browser: Chromium, asked: dict[str, RequestRow]) -> None:
        await browser.resize(1280, 1000)
        await log_in(made, browser)
        marks = await browser.run("return document.querySelectorAll('svg.chart a').length")
        assert marks >= 6
        assert "Live: new events appear here" in await _said(browser)
        await browser.go(f"{made.url}/materials/{asked['mail-tls'].id}")
        await browser.until("document.querySelector('[data-live-state]').textContent.startsWith('Live')")
        assert "Generation\n1, since" in await browser.text("#keys")
        await browser.click("a[href$='/rotate']")
        await browser.until("location.pathname.endsWith('/rotate')")
        await browser.type("#why", "before the audit")
        await browser.click("button.main")
        await browser.until("!location.pathname.endsWith('/rotate')")
        assert "A new generation is asked for." in await browser.text()
        await browser.until("document.querySelector('[data-live-state]').textContent.startsWith('Live')")
        await browser.run("window.same = true")
        made.fleet.clock.pass_(30)
        await made.fleet.settle()
        await browser.until("document.querySelector('tr.new [data-f=kind]')?.textContent === 'rotated'")
        await browser.until("/Generation\\s*2, since/.test(document.querySelector('#keys').innerText)")
        assert await browser.run("return window.same")  # the page was not loaded anew
        assert "before the audit" in await browser.text(".events")
        assert await browser.complaints() == []

    play(tmp_path, scenario)


async def _said(browser: Chromium) -> str:
    await browser.until("document.querySelector('[data-live-state]').textContent.startsWith('Live')")
    return await browser.text("[data-live-state]")


def test_every_page_fits_a_narrow_screen_and_keeps_its_policy(tmp_path: Path) -> None:
    async def scenario(made: Rig, browser: Chromium, asked: dict[str, RequestRow]) -> None:
        await browser.resize(400, 800)
        await browser.go(f"{made.url}/login")
        await _check(browser, "/login")
        await log_in(made, browser, "otto", "operator")
        orders = f"/materials/{asked['orders-db'].id}"
        for path in (
            "/",
            "/timeline",
            "/materials",
            orders,
            f"/materials/{asked['shop-tls'].id}",
            f"{orders}/rotate-urgently",
            "/denials",
            "/hosts",
            "/hosts/fra-1",
            "/resources",
            "/resources/fra-2/orders",
            "/policies",
            "/events",
            "/you",
            "/nothing",
        ):
            await browser.go(made.url + path)
            await _check(browser, path)
        complaints = [text for text in await browser.complaints() if "404 (Not Found)" not in text]
        assert complaints == []

    play(tmp_path, scenario)


#: Contrast of each element's own text with what is behind it (WCAG 2): returns those below 4.5.
_CONTRAST = """
const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
const light = ([r, g, b]) => [r, g, b].map((v) => v / 255).map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, n) => sum + v * [0.2126, 0.7152, 0.0722][n], 0);
const behind = (one) => { for (; one; one = one.parentElement) {
  const found = parse(getComputedStyle(one).backgroundColor);
  if (found.length === 3 || found[3] > 0) return found; } return [255, 255, 255]; };
return [...document.querySelectorAll("body *")].filter((one) => !one.closest("svg, template, .skip")
  && [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim())).map((one) => {
  const [a, b] = [light(parse(getComputedStyle(one).color)), light(behind(one))];
  return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), one.className + ": " + one.textContent.trim().slice(0, 40)];
}).filter(([contrast]) => contrast < 4.5).map(([contrast, text]) => contrast.toFixed(2) + " " + text);
"""
_NAMELESS = """
const all = document.querySelectorAll("a[href], button, input:not([type=hidden], [hidden]), select");
return [...all].filter((one) => !(one.textContent.trim()
  || one.getAttribute("aria-label") || one.labels?.length)).map((one) => one.outerHTML);
"""


async def _check(browser: Chromium, path: str) -> None:
    await browser.until("innerWidth === 400 && document.documentElement.scrollWidth <= 400")
    assert await browser.run("return document.querySelectorAll('h1').length") == 1, path
    assert await browser.run("return document.querySelectorAll('main').length") == 1, path
    assert await browser.run(_NAMELESS) == [], path
    ids = await browser.run("return [...document.querySelectorAll('[id]')].map((one) => one.id)")
    assert len(ids) == len(set(ids)), path
    levels = await browser.run("return [...document.querySelectorAll('h1,h2,h3,h4')].map((one) => Number(one.tagName[1]))")
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels)), (path, levels)
    for scheme in ("light", "dark"):
        await browser.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        assert await browser.run(_CONTRAST) == [], (path, scheme)


def test_it_is_used_with_the_keyboard(tmp_path: Path) -> None:
    async def scenario(made: Rig, browser: Chromium, asked: dict[str, RequestRow]) -> None:
        await log_in(made, browser)
        await browser.press("tab")
        assert await browser.run("return document.activeElement.className") == "skip"
        await browser.press("enter")
        await browser.until("document.activeElement.id === 'main'")
        seen: list[str] = []
        for _ in range(60):
            await browser.press("tab")
            seen.append(str(await browser.run("return document.activeElement.getAttribute('href') || ''")))
        assert f"/materials/{asked['vpn'].id}" in seen  # in the chart too

    play(tmp_path, scenario)


def test_nothing_of_others_is_run(tmp_path: Path) -> None:
    odd = "<img src=x onerror=window.run=1>"

    async def scenario(made: Rig, browser: Chromium, asked: dict[str, RequestRow]) -> None:
        made.fleet.hosts["fra-1"].add("odd", role="odd", note=odd)
        await made.fleet.settle(("ham-1",))
        row = await made.fleet.ask(material=odd, names=("dns:{name}.example.net",), lifetime=86400, selector={"role": "odd"})
        await log_in(made, browser)
        await browser.go(f"{made.url}/materials/{row.id}")
        await _said(browser)
        await made.fleet.settle(("ham-1",))
        await browser.until("document.querySelector('tr.new')")
        await browser.go(f"{made.url}/")
        await _said(browser)
        async with made.fleet.database.transaction() as connection:
            await made.fleet.asking.rotate(connection, row, "", False, False, "", odd, odd)
        await browser.until("document.querySelector('tr.new')")
        assert odd in await browser.text("tr.new")
        assert await browser.run("return window.run === undefined && document.querySelectorAll('main img').length === 0")
        for script in (
            "document.body.innerHTML = '<p>'",
            "const made = document.createElement('script'); made.textContent = 'window.run = 1'; document.body.append(made)",
            "document.body.setAttribute('onclick', 'window.run = 1')",
        ):
            refused = f"try {{ {script}; return false }} catch (error) {{ return true }}"
            assert await browser.run(refused) and await browser.run("return window.run === undefined"), script

    play(tmp_path, scenario)


def test_the_picture_for_the_documentation(tmp_path: Path) -> None:
    """With CONSOLE_PNG=FILE the picture is kept there."""

    async def scenario(made: Rig, browser: Chromium, asked: dict[str, RequestRow]) -> None:
        await browser.resize(1200, 1150)
        await log_in(made, browser, "otto", "operator")
        await _said(browser)
        pictures.append(await browser.screenshot())

    pictures: list[bytes] = []
    play(tmp_path, scenario)
    assert 20_000 < len(pictures[0]) < MOST_BYTES
    if kept := os.environ.get("CONSOLE_PNG"):
        Path(kept).write_bytes(pictures[0])
