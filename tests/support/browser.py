"""A walk through the MLflow UI in a real headless browser, and the pictures it takes."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dp_lora.tracking.links import comparison_page

WAIT = 180_000  # milliseconds that a page has on a busy machine
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-sync",
    "--disable-quic",
]


@contextmanager
def browser_page() -> Iterator[tuple[Any, list[str]]]:
    """A page of the installed Chromium (Playwright's own where there is none), and the console's errors so far."""
    from playwright.sync_api import sync_playwright

    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        page = browser.new_page(viewport={"width": 1300, "height": 900})
        page.set_default_timeout(WAIT)
        errors: list[str] = []
        page.on("console", lambda message: errors.append(_told(message)) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        yield page, errors
        browser.close()


def _told(message: Any) -> str:
    return f"{message.text} {message.location.get('url', '')}"


def open_page(page: Any, address: str, text: str) -> str:
    """Open a page, wait until `text` is on it, and return all text of it."""
    page.goto("about:blank")  # addresses that differ behind the # alone are one page to a browser
    # the page counts as loaded only long after it can be read
    page.goto(address, wait_until="commit")
    page.get_by_text(text).first.wait_for()
    for button in page.query_selector_all('button[aria-label="Close"], button[aria-label*="lose assistant"]'):
        if button.is_visible():
            button.click()
    return page.inner_text("body")


# the comparison's tables are grids of absolutely placed cells: the names in one, a run's values in the next
CELLS = """name => {
  const links = [...document.querySelectorAll('a')].filter(a => a.innerText.trim() === name);
  const label = links.at(-1).closest('div[style*="top"]'), top = label.style.top;
  let grid = label;
  do { grid = grid.parentElement; } while ([...grid.querySelectorAll('div[style*="left"]')]
    .filter(e => e.style.top === top && e !== label).length === 0);
  return [...grid.querySelectorAll('div[style*="left"]')].filter(e => e.style.top === top && e !== label)
    .sort((a, b) => parseFloat(a.style.left) - parseFloat(b.style.left)).map(e => e.innerText.trim());
}"""


def compared_values(page: Any, server: str, experiment: str, runs: Sequence[str], names: Sequence[str]) -> dict:
    """The values of metrics on the comparison page, by name, one per run in the order of `runs`."""
    open_page(page, comparison_page(server, experiment, runs), "accuracy_train_on_real")
    return {name: [float(text) for text in page.evaluate(CELLS, name)] for name in names}


def scatter(page: Any, x: str, y: str, picture: Path) -> list[tuple[float, float]]:
    """On the comparison page, draw `y` against `x`; the points (x, y) that the chart has."""
    page.get_by_text("Scatter Plot", exact=True).first.click()
    for axis, name in (("X-axis:", x), ("Y-axis:", y)):
        box = page.get_by_text(axis).locator("xpath=following::*[@role='combobox'][1]").first
        box.click()
        box.fill(name) if box.evaluate("e => e.tagName") == "INPUT" else page.keyboard.type(name)
        page.get_by_role("option", name=name, exact=True).or_(page.get_by_title(name, exact=True)).last.click()
    drawn = "() => (document.querySelector('.js-plotly-plot')?.data ?? []).map(d => [[...d.x], [...d.y]])[0]"
    page.wait_for_function(f"({drawn})()?.[0].length > 0")
    page.screenshot(path=picture)
    return [(float(a), float(b)) for a, b in zip(*page.evaluate(drawn), strict=True)]
