"""Pages in a real browser: from disk, with the network blocked."""

import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

FAR = 20_000  # milliseconds: machines that run tests may be busy


def find_chromium(names=("chromium", "chromium-browser", "google-chrome")):
    """Where the browser is. In CI its absence fails the tests; elsewhere it skips them."""
    for name in names:
        if path := shutil.which(name):
            return path
    text = "expected Debian's chromium for the tests of report.html, found none on PATH"
    if os.environ.get("CI"):
        pytest.fail(f"{text}; install it: apt-get install chromium")
    pytest.skip(text)


@dataclass
class Seen:
    """A page and what happened while it was open."""

    page: object
    requests: list = field(default_factory=list)
    faults: list = field(default_factory=list)

    def text(self, selector):
        return self.page.locator(selector).inner_text()

    def at(self, layer, head, measure=0):
        """The middle of a cell, on the screen."""
        map_ = self.page.locator(f"#map-{measure}")
        map_.scroll_into_view_if_needed()
        box = map_.locator(".nsewdrag").bounding_box()
        n_layers, n_heads = self.page.evaluate("[headReport.data.layers, headReport.data.heads]")
        return (
            box["x"] + (head + 0.5) * box["width"] / n_heads,
            box["y"] + (layer + 0.5) * box["height"] / n_layers,
        )

    def head_is(self, layer, head):
        self.page.wait_for_function(
            "(name) => document.getElementById('head-name').textContent === name",
            arg=f"Layer {layer}, head {head}",
            timeout=FAR,
        )

    def column(self, number):
        """The texts of a column of the rows that are drawn."""
        return self.page.locator(
            f"#table tbody tr:not(.space) td:nth-child({number})"
        ).all_inner_texts()


@contextmanager
def opened(browser, path, *, wait="window.headReport", **context):
    """Open a file with the network blocked twice over; afterwards nothing may have gone wrong.

    `wait` is a condition in JavaScript for the page to be ready; without one nothing is checked.
    """
    made = browser.new_context(offline=True, viewport={"width": 1400, "height": 900}, **context)
    made.set_default_timeout(FAR)
    made.route(
        "**/*",
        lambda route: route.continue_() if route.request.url.startswith("file:") else route.abort(),
    )
    page = made.new_page()
    seen = Seen(page)
    page.on("request", lambda request: seen.requests.append(request.url))
    page.on("pageerror", lambda error: seen.faults.append(str(error)))
    page.on("dialog", lambda dialog: (seen.faults.append(dialog.message), dialog.dismiss()))
    page.on("console", lambda said: seen.faults.append(said.text)
            if said.type in ("error", "warning") else None)  # fmt: skip
    try:
        page.goto(Path(path).resolve().as_uri())
        if wait:
            page.wait_for_function(wait)
        yield seen
    finally:
        made.close()
    if wait:
        assert seen.faults == []
        assert [u for u in seen.requests if not u.startswith(("file:", "data:,"))] == []
        assert seen.requests
