"""Chromium without a window, which fails a test for any request, error or warning of a page."""

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

DRAWN = "[...document.querySelectorAll('figure')].every(one => one.querySelector('svg, canvas'))"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@dataclass
class Tab:
    """An open page, and what it complained about or asked for beside itself."""

    page: Any  # of Playwright
    path: Path
    complaints: list[str] = field(default_factory=list)

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))

    def wait_for(self, condition: str, seconds: float = 30) -> None:
        """Until JavaScript says so; Playwright's own way has the page evaluate text, which it forbids."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(condition):
            assert time.monotonic() < end, f"after {seconds:g} s still not: {condition}"
            self.page.wait_for_timeout(50)

    def scroll_through(self) -> None:
        """So that every figure is drawn."""
        position = 0
        while position < self.page.evaluate("document.body.scrollHeight"):
            self.page.evaluate(f"scrollTo(0, {position})")
            self.page.wait_for_timeout(60)
            position += 700
        self.wait_for(DRAWN)
        self.page.evaluate("scrollTo(0, 0)")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """The browser. Where none is installed tests are skipped, and say so; on CI that is a failure."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        missing = "no Chromium on PATH, so no page was opened (Debian: apt install chromium)"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        # as root, as in a container, Chromium starts without its sandbox only
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = driver.chromium.launch(executable_path=found, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module", autouse=True)
def one_library() -> Iterator[None]:
    """The drawing library is the same in every page, and takes seconds to make."""
    pytest.importorskip("vl_convert")
    from bncli.report import DrawingLibrary

    script = DrawingLibrary().script()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DrawingLibrary, "__init__", lambda self: None)
        patch.setattr(DrawingLibrary, "script", lambda self: script)
        yield


class Opener:
    """Opens pages, each in a window of its own."""

    def __init__(self, browser: Any) -> None:
        self._browser = browser
        self.tabs: list[Tab] = []
        self._contexts: list[Any] = []

    def __call__(self, path: Path, *, width: int = 1280, scheme: str = "light") -> Tab:
        context = self._browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
        )
        self._contexts.append(context)
        tab = Tab(context.new_page(), path)
        self.tabs.append(tab)
        own = path.resolve().as_uri()
        page = tab.page
        page.on("console", lambda message: tab.complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: tab.complaints.append(f"error: {error}"))
        page.on(
            "request", lambda request: request.url == own or tab.complaints.append(f"asked for {request.url}")
        )
        page.on("dialog", lambda dialog: (tab.complaints.append(dialog.message), dialog.dismiss()))
        page.goto(own)
        tab.wait_for("document.documentElement.dataset.ready === 'true'")
        return tab

    def close(self) -> None:
        """Fail for any request, error or warning of the pages that were opened."""
        complaints = [line for tab in self.tabs for line in tab.complaints]
        for context in self._contexts:
            context.close()
        assert complaints == []


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Opener]:
    opener = Opener(chromium)
    yield opener
    opener.close()
