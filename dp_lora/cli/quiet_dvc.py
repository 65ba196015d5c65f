"""DVC's command line as our commands start it: without advice that does not fit, and one line where a stage fails.

`dvc repro` ends in the advice to `dvc push`, which uploads what was made from private pictures: whether that leaves the
house is the operator's decision. Where a stage of ours fails, its own line has said why; DVC would add which command.
"""

import logging
import re
import sys
from typing import Any

from dvc.cli import main
from dvc.ui import ui

PUSH = "Use `dvc push` to send your updates to remote storage."
SAID = re.compile(r"failed to run: entrypoints/run .*, exited with (1|2|130)$")  # after a line of its own


def is_said(record: logging.LogRecord) -> bool:
    """Whether a record tells of a stage that has told itself."""
    error = record.exc_info[1] if record.exc_info else None
    while error is not None:
        if SAID.match(str(error)):
            return True
        error = error.__cause__
    return False


def without_push() -> None:
    """Let DVC write all that it writes but PUSH."""
    write = ui.write

    def kept(*objects: Any, **options: Any) -> None:
        if objects != (PUSH,):
            write(*objects, **options)

    ui.write = kept


if __name__ == "__main__":
    without_push()
    logging.getLogger("dvc.cli").addFilter(lambda record: not is_said(record))
    sys.exit(main(sys.argv[1:]))
