"""The report of a study."""

from dataclasses import asdict
from pathlib import Path

from dp_lora.files import whole_file
from dp_lora.study.result import Study


def write_report(study: Study, folder: Path) -> None:
    """Write the study's page and tables into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "report.html", private=True) as temporary:
        temporary.write_text(f"<pre>{asdict(study)}</pre>\n", encoding="utf-8")
