"""What the UI shows above a run: what it is, the command that repeats it, its privacy, what it was made from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dp_lora.config import STAGES
from dp_lora.tracking.metrics import number_text

NOTE = "mlflow.note.content"  # the tag that the UI shows as a run's description, in Markdown


@dataclass(frozen=True)
class Upstream:
    """A run that this one was made from."""

    what: str
    run_id: str
    experiment_id: str
    name: str


@dataclass
class Description:
    """What is known of a run so far."""

    stage: str
    about: str  # what the experiment is, in its config's words
    command: str  # what repeats the run
    commit: str | None = None
    dirty: bool = False
    privacy: Mapping[str, Any] | None = None  # content of privacy.json
    upstream: list[Upstream] = field(default_factory=list)

    def markdown(self) -> str:
        """The text, in Markdown."""
        parts = [" ".join(filter(None, (STAGES[self.stage].about, self.about)))]
        if self.privacy is not None:
            parts.append(_privacy_lines(self.privacy))
        code = "" if self.commit is None else f"\n\nCode: commit `{self.commit[:12]}`"
        if self.commit is not None and self.dirty:
            code += ", with changes that were not committed"
        parts.append(f"**Again:**\n\n```sh\n{self.command}\n```{code}")
        if self.upstream:
            links = [
                f"- {one.what}: [{one.name}](#/experiments/{one.experiment_id}/runs/{one.run_id})"
                for one in self.upstream
            ]
            parts.append("**Made from:**\n\n" + "\n".join(links))
        return "\n\n".join(part for part in parts if part) + "\n"


def _privacy_lines(statement: Mapping[str, Any]) -> str:
    if not statement["private"]:
        return f"**Privacy:** {statement['statement']}."
    cells = {
        "epsilon": f"{statement['epsilon']:.6g}",
        "delta": number_text(statement["delta"]),
        "unit of privacy": f"one {statement['unit']}",
        "neighbouring relation": str(statement["relation"]),
    }
    rows = (cells, ["---"] * len(cells), cells.values())
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    parts = len(statement.get("parts", ()))
    scope = f"sum over {parts} releases; others" if parts > 1 else "one run; several"
    return f"**Privacy** ({scope} on the same data add up):\n\n{table}"
