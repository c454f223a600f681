"""A headless Chromium for tests."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import AsyncIterator
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")

# Without a sandbox, because CI runs as root; the rest keeps Chromium from calling home.
BROWSER_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def missing(reason: str) -> None:
    if os.environ.get("CI_REQUIRE_BROWSER") == "1":
        pytest.fail(f"CI_REQUIRE_BROWSER is set and {reason}")
    pytest.skip(reason)


@contextlib.asynccontextmanager
async def chromium() -> AsyncIterator[Any]:
    """Yield a headless Chromium, or skip the test if there is none."""
    path = os.environ.get("STARCAST_CHROMIUM") or next(
        filter(None, map(shutil.which, BROWSERS)), None
    )
    if path is None:
        missing(f"none of {', '.join(BROWSERS)} is on the path")
    try:
        from playwright.async_api import async_playwright
    except ImportError:
        missing("playwright is not installed")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=BROWSER_ARGS)
        yield browser
        await browser.close()
