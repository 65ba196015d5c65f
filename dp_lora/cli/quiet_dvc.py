"""DVC's command line without its advice to push or commit, and with one line where a stage fails.

`dvc repro` advises to `dvc push`, which would upload files made from private pictures, and to `git add` dvc.lock, which
holds their hashes: the operator alone decides that, and `cli.changes` says what has changed.
A stage that failed has printed its own line; DVC would add a second one. Locks of a killed command are removed by DVC
itself; it would say so for each file, with this machine's folders.
"""

import logging
import re
import sys
from typing import Any

from dvc.cli import main
from dvc.ui import ui

PUSH = "Use `dvc push` to send your updates to remote storage."
FREED = "had been killed. Auto removed it from the lock file."
SAID = re.compile(r"failed to run: entrypoints/run .*, exited with (1|2|130)$")  # the stage has printed its own line


def is_said(record: logging.LogRecord) -> bool:
    """Whether a log record reports a stage that has printed its own error."""
    error = record.exc_info[1] if record.exc_info else None
    while error is not None:
        if SAID.match(str(error)):
            return True
        error = error.__cause__
    return False


def without_push() -> None:
    """Let DVC print everything except PUSH."""
    write = ui.write

    def kept(*objects: Any, **options: Any) -> None:
        if objects != (PUSH,):
            write(*objects, **options)

    ui.write = kept


if __name__ == "__main__":
    without_push()
    logging.getLogger("dvc.repo.scm_context").setLevel(logging.WARNING)
    logging.getLogger("dvc.cli").addFilter(lambda record: not is_said(record))
    logging.getLogger("dvc.rwlock").addFilter(lambda record: not record.getMessage().endswith(FREED))
    sys.exit(main(sys.argv[1:]))
