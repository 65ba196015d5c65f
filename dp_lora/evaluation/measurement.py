"""One number of an evaluation, with its meaning, and whether it may be published."""

from dataclasses import dataclass

from dp_lora.evaluation.utility import Score


@dataclass(frozen=True)
class Measurement:
    """One measured number; `low` and `high` are its 95% interval where it has one."""

    metric: str
    value: float
    meaning: str
    private: bool  # computed from private pictures without noise: for the operator alone
    low: float | None = None
    high: float | None = None

    @classmethod
    def accuracy(cls, metric: str, score: Score, meaning: str) -> "Measurement":
        low, high = score.interval
        return cls(metric, score.accuracy, meaning, True, low, high)
