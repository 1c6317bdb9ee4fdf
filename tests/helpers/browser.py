"""Headless Chromium, driven by selenium; tests skip where the machine has none."""

from __future__ import annotations

import base64
import os
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from selenium.common.exceptions import TimeoutException
from selenium.webdriver import Chrome
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.wait import WebDriverWait

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PATIENCE_SECONDS = 120.0
"""For a page that takes a second, on a machine that others have loaded."""
DESK = (1280, 900)
PHONE = (390, 844)


@contextmanager
def browser(size: tuple[int, int]) -> Iterator[Chrome]:
    """A browser of this size in CSS pixels, whose console is kept."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium or no chromedriver on PATH (Debian: chromium, chromium-driver)")
    options = Options()
    options.binary_location = chromium
    options.add_argument("--headless=new")
    options.add_argument("--disable-dev-shm-usage")
    options.add_argument("--hide-scrollbars")
    # Nothing may be fetched, not even where there is a network.
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND")
    if os.getuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium refuses to start for root with one
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = Chrome(options=options, service=Service(driver))
    try:
        resized(opened, size)
        yield opened
    finally:
        opened.quit()


def resized(page: Chrome, size: tuple[int, int]) -> None:
    """Give the page this size in CSS pixels."""
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def open_report(page: Chrome, path: Path) -> dict[str, Any]:
    """Load a report and wait until all is drawn; `milliseconds` from the start of the navigation to
    there and script `errors`, by the page's own account, and what the `console` said."""
    page.get(path.resolve().as_uri())
    drawn = "return document.documentElement.dataset.drawn === 'true'"
    try:
        WebDriverWait(page, PATIENCE_SECONDS, poll_frequency=0.05).until(
            lambda opened: opened.execute_script(drawn)
        )
    except TimeoutException:
        pytest.fail(f"never drawn; the console said {console(page)}")
    told: dict[str, Any] = page.execute_script(
        "return {milliseconds: zaya.milliseconds, errors: zaya.errors,"
        " charts: zaya.charts.map(chart => chart.id)}"
    )
    return {**told, "console": console(page)}


def console(page: Chrome) -> list[dict[str, Any]]:
    """What the console said since the last time it was asked."""
    said: list[dict[str, Any]] = page.get_log("browser")  # type: ignore[no-untyped-call]
    return said


def screenshot(page: Chrome, path: Path) -> None:
    """The whole page, also what lies below the window."""
    size = page.execute_script(
        "const e = document.documentElement; return [e.scrollWidth, e.scrollHeight]"
    )
    clip = {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1}
    taken = page.execute_cdp_cmd(
        "Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip}
    )
    path.write_bytes(base64.b64decode(taken["data"]))
