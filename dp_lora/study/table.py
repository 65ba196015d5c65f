"""What a study shows while it runs: a live table on a terminal, plain lines elsewhere.

Scores read private pictures without noise, so they are for the operator alone: they stand in the table of a terminal,
and in no line that a log would keep.
"""

import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dp_lora.files import read_json
from dp_lora.models.estimate import time_text
from dp_lora.study.place import REQUIRED, RESULTS, Place, Record
from dp_lora.study.result import FAILED, RUNNING, Outcome
from dp_lora.tracking.shared_view import DISTANCES

if TYPE_CHECKING:
    from rich.table import Table

LEFT = re.compile(r"(\w[\w -]*): +\d+%\|[^|]*\|.*?<(\?|[\d:]+)")  # a bar of `progress` in a log
TAIL = 4000  # bytes of a log that are looked at


def seconds_left(place: Place, record: Record, usual: Mapping[str, float]) -> float | None:
    """Seconds left of a member that runs or waits, by its bar and its stages' `usual` seconds; None where unknown."""
    todo = [stage for stage in REQUIRED if not place.has(stage, record)]
    if not todo:
        return 0.0
    of_stages = [usual.get(stage) for stage in todo]
    bar = _left_of_bar(place.log)
    if bar is not None:
        of_stages[0] = bar
    known = [seconds for seconds in of_stages if seconds is not None]
    return sum(known) if len(known) == len(todo) else None


def usual_seconds(records: Sequence[Record]) -> dict[str, float]:
    """Mean seconds of each stage over the members that have finished it."""
    found = {stage: [record.seconds[stage] for record in records if stage in record.seconds] for stage in REQUIRED}
    return {stage: statistics.mean(seconds) for stage, seconds in found.items() if seconds}


def _left_of_bar(log: Path) -> float | None:
    """Seconds that the last bar in a log says are left."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return None
    bars = LEFT.findall(text)
    if not bars or bars[-1][1] == "?":
        return None
    seconds = 0
    for part in bars[-1][1].split(":"):
        seconds = 60 * seconds + int(part)
    return float(seconds)


def figures(outcome: Outcome) -> dict[str, str]:
    """Epsilon and the first scores of a member that has them; the scores are for the operator alone."""
    found: dict[str, str] = {}
    for folder, names in (("finetune", ("epsilon",)), (RESULTS["fid"], ("accuracy", "class_agreement", *DISTANCES))):
        path = outcome.folder / folder / "metrics.json"
        values = read_json(path) if path.exists() else {}
        found |= {name: f"{values[name]:.4g}" for name in names if isinstance(values.get(name), int | float)}
    return found


class Shown:
    """The members of a study on the caller's terminal, or as lines."""

    def __init__(self, places: Sequence[Place], say: Callable[[str], None]) -> None:
        self._places = {place.number: place for place in places}
        self._say = say
        self._running: dict[int, float] = {}  # when each began
        self._reasons: dict[int, str] = {}
        self._table: Callable[[], None] | None = None

    @contextmanager
    def live(self) -> Iterator[None]:
        """On a terminal the table is drawn until the block ends."""
        if not sys.stdout.isatty():
            yield
            return
        from rich.live import Live

        with Live(self._draw(), auto_refresh=False) as live:
            self._table = lambda: live.update(self._draw(), refresh=True)
            try:
                yield
            finally:
                self._table()
                self._table = None

    def started(self, number: int) -> None:
        """A member was started."""
        self._running[number] = time.monotonic()
        self._line(number, "begins")

    def ended(self, number: int, reason: str) -> None:
        """A member has ended; `reason` is the line of a failure, empty for none."""
        took = time_text(time.monotonic() - self._running.pop(number, time.monotonic()))
        if reason:
            self._reasons[number] = reason
        self._line(number, f"FAILED after {took}: {reason}" if reason else f"done in {took}")

    def look(self) -> None:
        """Redraw the table, if there is one."""
        if self._table is not None:
            self._table()

    def _line(self, number: int, text: str) -> None:
        if self._table is None:
            self._say(f"[{number}/{len(self._places)}] {self._places[number].member.name}: {text}")

    def _draw(self) -> "Table":
        from rich.table import Table

        records = {number: place.read() for number, place in self._places.items()}
        usual = usual_seconds(list(records.values()))
        table = Table(box=None, pad_edge=False)
        for heading in ("", "member", "state", "time left", "figures: yours alone"):
            table.add_column(heading)
        for number, place in self._places.items():
            outcome = place.outcome(running=number in self._running, reason=self._reasons.get(number, ""))
            left = seconds_left(place, records[number], usual) if outcome.state == RUNNING else None
            shown = "" if left is None else time_text(left)
            said = ", ".join(f"{name} {value}" for name, value in figures(outcome).items())
            text = self._reasons.get(number, outcome.reason) if outcome.state == FAILED else said
            table.add_row(str(number), place.member.name, outcome.state, shown, text)
        return table
