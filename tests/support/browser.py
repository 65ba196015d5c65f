"""A walk through the MLflow UI in a real headless browser, which takes pictures."""

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
def browser_page(width: int = 1300) -> Iterator[tuple[Any, list[str]]]:
    """A page of `width` pixels and the console's errors so far; uses Playwright's own Chromium if none is installed."""
    from playwright.sync_api import sync_playwright

    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.set_default_timeout(WAIT)
        errors: list[str] = []
        page.on("console", lambda message: errors.append(_told(message)) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        yield page, errors
        browser.close()


def _told(message: Any) -> str:
    return f"{message.text} {message.location.get('url', '')}"


def open_page(page: Any, address: str, text: str) -> str:
    """Open a page, wait until `text` is on it, and return all its text."""
    page.goto("about:blank")  # a browser does not reload a page whose address differs behind the # alone
    # do not wait for the load: the page can be read long before that
    page.goto(address, wait_until="commit")
    page.get_by_text(text).first.wait_for()
    for button in page.query_selector_all('button[aria-label="Close"], button[aria-label*="lose assistant"]'):
        if button.is_visible():
            button.click()
    return page.inner_text("body")


# the comparison's tables are grids of absolutely placed cells: one grid has the names, the next one the runs' values
CELLS = """name => {
  const links = [...document.querySelectorAll('a')].filter(a => a.innerText.trim() === name);
  const label = links.at(-1).closest('div[style*="top"]'), top = label.style.top;
  let grid = label;
  do { grid = grid.parentElement; } while ([...grid.querySelectorAll('div[style*="left"]')]
    .filter(e => e.style.top === top && e !== label).length === 0);
  return [...grid.querySelectorAll('div[style*="left"]')].filter(e => e.style.top === top && e !== label)
    .sort((a, b) => parseFloat(a.style.left) - parseFloat(b.style.left)).map(e => e.innerText.trim());
}"""


# the comparison's tables draw no row that is out of sight, and the names follow the values one scroll late
INTO_SIGHT = """async name => {
  const tables = [...document.querySelectorAll('.ReactVirtualized__Grid')]
    .filter(grid => getComputedStyle(grid).overflowY !== 'hidden');
  const drawn = () => {
    const label = [...document.querySelectorAll('a')].filter(a => a.innerText.trim() === name).at(-1)
      ?.closest('div[style*="top"]');
    return Boolean(label) && tables.some(table => [...table.querySelectorAll('div[style*="left"]')]
      .some(cell => cell.style.top === label.style.top));
  };
  for (let top = 0; top < 10000 && !drawn(); top += 100) {
    for (const place of [top, top + 1]) {
      tables.forEach(table => { table.scrollTop = place; });
      await new Promise(done => setTimeout(done, 100));
    }
  }
  return drawn();
}"""


def compared_values(page: Any, server: str, experiment: str, runs: Sequence[str], names: Sequence[str]) -> dict:
    """The values of metrics on the comparison page, by name, one per run in the order of `runs`."""
    open_page(page, comparison_page(server, experiment, runs), "accuracy_train_on_real")
    values = {}
    for name in names:
        assert page.evaluate(INTO_SIGHT, name), f"{name}: no row of the comparison"
        values[name] = [float(text) for text in page.evaluate(CELLS, name)]
    return values


def scatter(page: Any, x: str, y: str, picture: Path) -> list[tuple[float, float]]:
    """Draw `y` against `x` on the comparison page; gives the chart's points (x, y)."""
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


# the cards of the chart page; the page draws a card's chart when it comes into sight
CARD = "[data-testid=experiment-view-compare-runs-card]"
DRAWN = "card => [...(card.querySelector('.js-plotly-plot')?.data ?? [])].map(d => [[...d.x], [...d.y]])"


def _card(page: Any, title: str) -> Any:
    # leave out the texts of the drawing, <text>: axes and runs may have the same words as a title
    heading = page.locator(f"xpath=.//*[not(name()='text')][normalize-space(text())='{title}']")
    card = page.locator(CARD).filter(has=heading).first
    area = page.locator("[data-testid=experiment-view-compare-runs-chart-area]")
    area.wait_for()
    for _ in range(60):  # the page draws no card that is out of sight
        if card.count():
            break
        area.evaluate("area => area.scrollBy(0, 200)")
        page.wait_for_timeout(500)
    card.scroll_into_view_if_needed()
    return card


def chart_lines(page: Any, title: str, count: int, picture: Path) -> list[list[tuple[float, float]]]:
    """The points (x, y) of each line of the chart page's chart `title`, once there are `count`; a cloud is one line."""
    card = _card(page, title)
    points = f"card => ({DRAWN})(card).reduce((sum, line) => sum + line[0].length, 0)"
    page.wait_for_function(f"([card, count]) => ({points})(card) >= count", arg=[card.element_handle(), count])
    page.screenshot(path=picture)
    return [[(float(a), float(b)) for a, b in zip(*line, strict=True)] for line in card.evaluate(DRAWN)]


def chart_picture_width(page: Any, title: str) -> int:
    """The width in pixels of the first picture of the chart page's card `title`, once it is loaded."""
    picture = _card(page, title).locator("img").first
    picture.wait_for()
    handle = picture.element_handle()
    page.wait_for_function("image => image.complete", arg=handle)
    return int(handle.evaluate("image => image.naturalWidth"))


COLUMNS = """() => [...document.querySelectorAll('.ag-header-cell[col-id^="metrics."]')]
  .sort((a, b) => parseFloat(a.style.left) - parseFloat(b.style.left)).map(e => e.innerText.trim())"""
ASIDE = "left => { document.querySelector('.ag-center-cols-viewport').scrollLeft = left; }"


def metric_columns(page: Any, last: str) -> list[str]:
    """The metrics that the table of runs has as columns, in its order, up to `last`; one out of sight is not there."""
    page.wait_for_function(f"({COLUMNS})().length > 0")
    seen: list[str] = []
    for left in range(0, 10_000, 50):
        page.evaluate(ASIDE, left)
        page.wait_for_timeout(100)
        seen += [name for name in page.evaluate(COLUMNS) if name not in seen]
        if last in seen:
            break
    return seen
