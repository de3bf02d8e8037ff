"""A headless Chromium of a test's own, over the WebDriver protocol (W3C): no more than the tests need."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
_KEYS = {"tab": "\ue004", "enter": "\ue007"}


class Chromium:
    def __init__(self, client: httpx.AsyncClient, session: str) -> None:
        self._client, self._session = client, session

    async def _do(self, method: str, path: str, **body: Any) -> Any:
        answer = await self._client.request(method, f"/session/{self._session}{path}", json=body if method == "POST" else None)
        value = answer.json()["value"]
        assert answer.status_code == 200, value
        return value

    async def go(self, url: str) -> None:
        await self._do("POST", "/url", url=url)

    async def find(self, css: str) -> str:
        return str((await self._do("POST", "/element", using="css selector", value=css))[_ELEMENT])

    async def click(self, css: str) -> None:
        await self._do("POST", f"/element/{await self.find(css)}/click")

    async def type(self, css: str, text: str) -> None:
        await self._do("POST", f"/element/{await self.find(css)}/value", text=text)

    async def press(self, key: str) -> None:
        value = _KEYS[key]
        keys = [{"type": "keyDown", "value": value}, {"type": "keyUp", "value": value}]
        await self._do("POST", "/actions", actions=[{"type": "key", "id": "keyboard", "actions": keys}])

    async def run(self, script: str) -> Any:
        return await self._do("POST", "/execute/sync", script=script, args=[])

    async def text(self, css: str = "main") -> str:
        return str(await self._do("GET", f"/element/{await self.find(css)}/text"))

    async def path(self) -> str:
        return str(await self.run("return location.pathname"))

    async def until(self, script: str, seconds: float = 15) -> None:
        """Until the expression is true in the page."""
        async with asyncio.timeout(seconds):
            while not await self.run(f"return Boolean({script})"):  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    async def resize(self, width: int, height: int) -> None:
        """The page's own size."""
        told = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        await self.devtools("Emulation.setDeviceMetricsOverride", **told)

    async def devtools(self, command: str, **parameters: Any) -> Any:
        return await self._do("POST", "/goog/cdp/execute", cmd=command, params=parameters)

    async def complaints(self) -> list[str]:
        """What the page wrote to the browser's log since the last call: violations of its policy, errors of its script."""
        return [entry["message"] for entry in await self._do("POST", "/se/log", type="browser")]

    async def screenshot(self) -> bytes:
        """PNG."""
        return base64.b64decode(await self._do("GET", "/screenshot"))


@contextlib.asynccontextmanager
async def chromium(directory: Path) -> AsyncIterator[Chromium]:
    driver = await asyncio.create_subprocess_exec(
        "chromedriver", "--port=0", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        port = await asyncio.wait_for(_port(driver), 30)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            arguments = [
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--hide-scrollbars",
                "--lang=en",
                f"--user-data-dir={directory / 'chromium'}",
            ]
            wanted = {
                "browserName": "chrome",
                "goog:chromeOptions": {"args": arguments},
                "goog:loggingPrefs": {"browser": "ALL"},
                "acceptInsecureCerts": True,
            }
            answer = (await client.post("/session", json={"capabilities": {"alwaysMatch": wanted}})).json()["value"]
            assert "sessionId" in answer, answer
            try:
                yield Chromium(client, answer["sessionId"])
            finally:
                await client.delete(f"/session/{answer['sessionId']}")
    finally:
        driver.terminate()
        await driver.wait()


async def _port(driver: asyncio.subprocess.Process) -> int:
    assert driver.stdout is not None
    async for line in driver.stdout:
        if found := re.search(rb"successfully on port (\d+)", line):
            return int(found[1])
    raise AssertionError("chromedriver does not start")
