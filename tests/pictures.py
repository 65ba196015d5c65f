"""README's pictures, by the walk of the browser test: run `make compare`, then `make pictures`."""

import shutil

from dp_lora.config import ROOT
from dp_lora.errors import InputError
from dp_lora.files import whole_file
from dp_lora.tracking import ui_links
from entrypoints.common import one_line_errors
from entrypoints.ui import server
from tests.browser import browser_page, open_page
from tests.tracking_server import free_port

RESULTS = ROOT / "benchmarks" / "results"
GRID = ROOT / "outputs" / "mnist5k" / "samples" / "grid.png"


def main() -> None:
    """Take the comparison of the latest run per epsilon from the UI over the local store, and the newest grid."""
    with server(free_port()) as (address, _), browser_page() as (page, _):
        comparison = ui_links(address).get("latest run per epsilon")
        if comparison is None or not GRID.exists():
            raise InputError("pictures: the store has no runs to compare; run `make compare` first")
        open_page(page, comparison, "trainable_parameters")
        for folded in ("Visualizations", "Parameters"):
            page.get_by_text(folded, exact=True).first.click()
        page.wait_for_timeout(1000)  # the folding is drawn
        with whole_file(RESULTS / "compare.png") as temporary:
            temporary.write_bytes(page.screenshot())
    with whole_file(RESULTS / "samples.png") as temporary:
        shutil.copyfile(GRID, temporary)
    print(f"{RESULTS.relative_to(ROOT)}/: compare.png, samples.png")


if __name__ == "__main__":
    with one_line_errors():
        main()
