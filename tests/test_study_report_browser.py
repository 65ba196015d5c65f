"""`make test-ui`: the report of a study in a real browser, from a file: wide, on a phone, in dark mode, in print."""

import pytest

from dp_lora.study.report import write_report
from tests.support.browser import browser_page
from tests.support.studies import digits_study

pytestmark = [pytest.mark.ui, pytest.mark.timeout(1800)]
CROSSES = """() => [...document.querySelectorAll('figure, p, h1, h2, nav, ul')]
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
# the colour of a figure's letters, and of their background
INKS = """() => [getComputedStyle(document.querySelector('svg text')).fill,
  getComputedStyle(document.body).backgroundColor]"""
SMALLEST = (
    """() => Math.min(...[...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height))"""
)
LOADED = "() => performance.getEntriesByType('resource').map(e => e.name).filter(name => !name.startsWith('data:'))"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(digits_study(folder / "study", seeds=2), folder / "report")
    return (folder / "report" / "report.html").as_uri()


def brightness(colour):
    return sum(map(float, colour.removeprefix("rgb(").removesuffix(")").split(", "))) / 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1500, 390])
def test_the_page_fits_and_is_legible_and_loads_nothing(address, tmp_path, width, scheme):
    with browser_page(width) as (page, errors):
        page.emulate_media(color_scheme=scheme)
        page.goto(address)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(CROSSES) == []
        ink, paper = map(brightness, page.evaluate(INKS))
        assert (ink > 200 and paper < 60) if scheme == "dark" else (ink < 60 and paper > 200)
        assert page.evaluate(SMALLEST) >= 8
        assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 100)")
        assert page.evaluate(LOADED) == []
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        assert errors == []
    assert (tmp_path / "page.png").stat().st_size > 50_000


def test_in_print_it_is_dark_on_white_whatever_the_screen_is(address):
    with browser_page() as (page, errors):
        page.emulate_media(media="print", color_scheme="dark")
        page.goto(address)
        ink, paper = map(brightness, page.evaluate(INKS))
        assert ink < 60
        assert paper > 250
        page.set_viewport_size({"width": 718, "height": 1000})  # A4 without two margins of 10 mm
        assert page.evaluate("document.documentElement.scrollWidth") <= 718
        written = page.pdf(format="A4", print_background=True)
        assert written.startswith(b"%PDF")
        assert 3 < written.count(b"/Type /Page\n") < 25
        assert errors == []
