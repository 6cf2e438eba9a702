"""A headless browser for tests of pages; skips where there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.bench import browser


def start_browser(profile: Path) -> Any:
    """A browser that logs its console and every request; nothing is downloaded for it."""
    driver = browser.start_browser(profile)
    if driver is None:
        pytest.skip(f"needs {browser.NEEDED}")
    return driver


class Page:
    """What the tests look at and do."""

    def __init__(self, driver: Any, path: Path) -> None:
        self.driver = driver
        self.driver.get_log("browser"), self.driver.get_log("performance")
        self.device()
        self.url = path.as_uri()
        self.driver.get(self.url)

    def device(self, width: int = 1280, dark: bool = False) -> None:
        size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 700}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        # Without reduced motion the page would still be scrolling when it is clicked.
        media = {"color-scheme": "dark" if dark else "light", "reduced-motion": "reduce"}
        features = [{"name": f"prefers-{name}", "value": value} for name, value in media.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def js(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        found = "return [...document.querySelectorAll(arguments[0])]"
        return self.js(f"{found}.map(e => e.textContent)", selector)

    def set(self, name: str, value: str) -> None:
        """Set a field of the filters as a user does: its events follow."""
        self.js(
            "const field = document.getElementById(arguments[0]); field.value = arguments[1];"
            "for (const kind of ['input', 'change'])"
            "  field.dispatchEvent(new Event(kind, {bubbles: true}));",
            name,
            value,
        )

    def press(self, keys: str, selector: str = "body") -> None:
        self.one(selector).send_keys(keys)

    @property
    def prompt(self) -> str:
        return self.js("return document.getElementById('prompt').textContent")

    @property
    def count(self) -> str:
        return self.one("#count").text

    def console(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> set[str]:
        """The URLs that this page asked for, without what the browser's own new tab loads."""
        events = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        sent = (e["params"] for e in events if e["method"] == "Network.requestWillBeSent")
        return {params["request"]["url"] for params in sent if params["documentURL"] == self.url}
