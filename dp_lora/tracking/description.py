"""The text that the UI shows above a run: its privacy, its stage, the command that repeats it, the runs before it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dp_lora.config import STAGES
from dp_lora.tracking.metrics import number_text
from dp_lora.tracking.shared_view import PAGES

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
    """The facts known about a run so far."""

    stage: str
    about: str  # the experiment's description in its config
    command: str  # repeats the run
    commit: str | None = None
    dirty: bool = False
    privacy: Mapping[str, Any] | None = None  # content of privacy.json
    upstream: list[Upstream] = field(default_factory=list)
    model: tuple[str, str] | None = None  # name and version of the registered model

    def markdown(self) -> str:
        """The text, in Markdown."""
        # privacy first: the UI folds a long text, and this line must always be seen
        parts = [] if self.privacy is None else [_privacy_line(self.privacy)]
        parts.append(" ".join(filter(None, (STAGES[self.stage].about, self.about))))
        code = "" if self.commit is None else f"\n\nCode: commit `{self.commit[:12]}`"
        if self.commit is not None and self.dirty:
            code += ", with changes that were not committed"
        parts.append(f"**Again:**\n\n```sh\n{self.command}\n```{code}")
        if self.model is not None:
            name, version = self.model
            parts.append(
                f"**Registered model:** [{name}, version {version}](#/models/{name}/versions/{version}?{PAGES})"
            )
        if self.upstream:
            links = [
                f"- {one.what}: [{one.name}](#/experiments/{one.experiment_id}/runs/{one.run_id}?{PAGES})"
                for one in self.upstream
            ]
            parts.append("**Made from:**\n\n" + "\n".join(links))
        return "\n\n".join(part for part in parts if part) + "\n"


def _privacy_line(statement: Mapping[str, Any]) -> str:
    if not statement["private"]:
        return f"**Privacy:** {statement['statement']}."
    parts = len(statement.get("parts", ()))
    scope = f"Sum over {parts} releases; others" if parts > 1 else "One run; several"
    return (
        f"**Privacy:** epsilon {statement['epsilon']:.6g}, delta {number_text(statement['delta'])}. "
        f"Unit of privacy: one {statement['unit']}. Neighbouring relation: {statement['relation']}. "
        f"{scope} on the same data add up."
    )
