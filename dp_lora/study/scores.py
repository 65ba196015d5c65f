"""The scores that a report knows: name, form and drawing of each. All other scores stand in members.csv alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from dp_lora.study.statistics import Limits


@dataclass(frozen=True)
class Score:
    """One metric of metrics.json. `references`: other metrics, each drawn as a line, and the words on that line."""

    metric: str
    name: str  # with its unit
    short: str  # the head of a table's column
    percent: bool = False  # a share: shown times 100
    less_is_better: bool = False
    least: float = -math.inf  # the lowest possible value of a score that is no share
    references: Mapping[str, str] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        return 100.0 if self.percent else 1.0

    @property
    def limits(self) -> Limits:
        """The lowest and highest possible value, in the unit of metrics.json."""
        return (0.0, 1.0) if self.percent else (self.least, math.inf)

    @property
    def axis(self) -> str:
        """The title of its axis."""
        return f"{self.name} (less is better)" if self.less_is_better else self.name

    @property
    def unit(self) -> str:
        """The unit of a difference."""
        return "points" if self.percent else ""

    def shown(self, value: float) -> str:
        """A value of metrics.json as the report shows it."""
        return f"{self.scale * value:z.1f}" if self.percent or abs(value) >= 10 else f"{value:.3g}"


ACCURACY = Score(
    "accuracy",
    "accuracy on real test pictures, %",
    "accuracy, %",
    percent=True,
    references={
        "accuracy_train_on_real": "trained on real pictures",
        "accuracy_public_only": "trained on public pictures",
        "accuracy_untrained_embedding": "before fine-tuning",
        "accuracy_base": "base before fine-tuning",
    },
)


def _of_captions(metric: str, name: str, short: str) -> Score:
    """A score of samples that were drawn from captions; the base's samples and real pictures have it too."""
    references = {f"{metric}_real": "real private pictures", f"{metric}_base": "base before fine-tuning"}
    return Score(metric, name, short, percent=True, references=references)


def _distance(metric: str, name: str, short: str, least: float = 0.0) -> Score:
    floor = {f"reconstruction_{metric}": "the autoencoder's reconstructions"}
    return Score(metric, name, short, less_is_better=True, least=least, references=floor)


PRECISION = Score("precision", "samples that look real, %", "precision, %", percent=True)
RECALL = Score("recall", "real pictures that are covered, %", "recall, %", percent=True)
# in the order of the report; a study's findings speak of the first score that it has
SCORES = (
    ACCURACY,
    Score("class_agreement", "samples taken for their class, %", "class agreement, %", percent=True),
    _of_captions("private_style", "samples in the private style, %", "private style, %"),
    _of_captions("right_caption", "samples of their own caption, %", "right caption, %"),
    Score("clip_score", "CLIP score (100 times the cosine)", "CLIP score"),
    _distance("fid", "FID", "FID"),
    _distance("kid", "KID", "KID", least=-math.inf),
    _distance("letter_frechet_distance", "Frechet distance", "Frechet distance"),
    PRECISION,
    RECALL,
)
