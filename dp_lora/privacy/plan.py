"""One object couples sampler, clipping, noise and accountant, so that they cannot disagree."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from dp_lora.errors import PRIVATE_PICTURE, InputError

RELATION = "add-or-remove-one"
PER_UNIT = "per_unit"
PUBLISHED = "published"
FLAT = "flat"
AUTOMATIC = "automatic"
ROUNDING = 1e-3  # share of max_grad_norm that the sum of all others may round by when one unit joins (step.py, 5)
LARGEST_BATCH = 2**18  # expected units of a step: the proof of ROUNDING counts their additions


@dataclass(frozen=True)
class PrivacyPlan:
    """Everything that the mechanism and its accountant need; every field is public.

    Made by `accounting.calibrate`, or read back from the plan.json that it was written to.
    """

    sample_rate: float  # q: each unit of privacy takes part in a step with this probability
    noise_multiplier: float  # noise std over max_grad_norm; 0 without privacy
    max_grad_norm: float  # C: bound on the L2 norm of one unit's gradient; inf without privacy
    steps: int  # the largest number of steps that may be taken
    expected_batch: float  # public divisor q * n_public; the true batch size is private
    delta: float
    target_epsilon: float  # inf without privacy
    k: int  # noise draws per picture, averaged before the one clip
    unit: str  # unit of privacy: picture, or person
    relation: str = RELATION
    accounting: str = PER_UNIT  # PUBLISHED: each draw is clipped apart, sigma is set as if it were not
    clipping: str = FLAT  # how a gradient is scaled to norm max_grad_norm at most: clipping.py

    def __post_init__(self) -> None:
        if not 0 < self.sample_rate <= 1:
            raise InputError(f"sample_rate={self.sample_rate}: must be in (0, 1]; lower privacy.batch_size")
        if self.steps < 1 or self.k < 1 or self.expected_batch <= 0:
            raise InputError(f"steps={self.steps}, k={self.k}, expected_batch={self.expected_batch}: must be above 0")
        if self.expected_batch * (self.k / self.draws_per_clip) > LARGEST_BATCH:
            raise InputError(
                f"expected_batch={self.expected_batch:g}: must be at most {LARGEST_BATCH:,}, or the rounding of "
                "the sum is not covered; lower privacy.batch_size"
            )
        if not 0 < self.delta < 1:
            raise InputError(f"delta={self.delta}: must be in (0, 1)")
        if self.relation != RELATION:
            raise InputError(f"relation={self.relation}: only {RELATION} is proved here")
        if self.accounting not in (PER_UNIT, PUBLISHED):
            raise InputError(f"privacy.accounting={self.accounting}: must be {PER_UNIT} or {PUBLISHED}")
        if self.accounting == PUBLISHED and not (self.private and self.unit == "picture"):
            raise InputError(
                f"privacy.accounting={PUBLISHED}: needs privacy.unit=picture and a finite eps; set both, or "
                f"privacy.accounting={PER_UNIT}"
            )
        if self.clipping not in (FLAT, AUTOMATIC) or (self.clipping == AUTOMATIC and self.accounting == PUBLISHED):
            raise InputError(
                f"privacy.clipping={self.clipping}: must be {FLAT}, or {AUTOMATIC} with privacy.accounting={PER_UNIT}: "
                "the released code clips flat"
            )
        if self.private and not (
            0 < self.noise_multiplier < math.inf and 0 < self.max_grad_norm < math.inf and self.target_epsilon > 0
        ):
            raise InputError(
                f"noise_multiplier={self.noise_multiplier}, max_grad_norm={self.max_grad_norm}, "
                f"eps={self.target_epsilon}: must be above 0 and finite under privacy"
            )
        if not self.private and not (self.noise_multiplier == 0 and self.max_grad_norm == math.inf):
            raise InputError("eps=inf: noise_multiplier must be 0 and max_grad_norm inf: nothing is clipped or hidden")

    @property
    def private(self) -> bool:
        """False with eps=inf: the same code, clipping and noise off."""
        return self.target_epsilon != math.inf

    @property
    def guaranteed(self) -> bool:
        """True where target_epsilon holds: the result may be released."""
        return self.private and self.accounting == PER_UNIT

    @property
    def draws_per_clip(self) -> int:
        """Noise draws of a picture that are folded into one gradient before the clip: k, or 1 as published.

        Guarantee: the step clips so, and `sensitivity` counts it so.
        """
        return 1 if self.accounting == PUBLISHED else self.k

    @property
    def sensitivity(self) -> float:
        """Upper bound on how far one unit moves the clipped sum, rounding included, in units of max_grad_norm.

        Guarantee: argued in step.py, for both kinds of accounting.
        """
        return self.k // self.draws_per_clip * (1 + ROUNDING)

    def as_json(self) -> dict[str, Any]:
        """Fields with infinities spelled 'inf', as JSON has none."""
        return {name: "inf" if value == math.inf else value for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "PrivacyPlan":
        """Inverse of `as_json`; raises InputError for missing, unknown or mistyped fields.

        Plans from before `accounting` and `clipping` were fields are per unit and flat.
        """
        types: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(cls)}
        value = {"accounting": PER_UNIT, "clipping": FLAT, **value}
        if set(value) != set(types):
            raise InputError(f"plan.json: fields {sorted(set(value) ^ set(types))} are missing or unknown")
        fields: dict[str, Any] = {}
        for name, kind in types.items():
            item = float("inf") if value[name] == "inf" and kind is float else value[name]
            if not isinstance(item, int | float if kind is float else kind) or isinstance(item, bool):
                raise InputError(f"plan.json: {name}={value[name]!r}: must be of type {kind.__name__}")
            fields[name] = kind(item)
        return cls(**fields)


def require_stated_number(plan: PrivacyPlan, n: int) -> None:
    """InputError where `n`, the true number of units, is more than twice the plan's public number of units.

    Guarantee: drawn batches stay near the expected one, on which the proof of ROUNDING relies (step.py, 5). Whether a
    run fails here depends on private data: the fact that a run failed carries no guarantee.
    """
    stated = plan.expected_batch / plan.sample_rate
    if plan.private and n > 2 * stated:
        raise InputError(
            f"data.n_public={stated:.0f}: there are more than twice as many units; state a number near the true one",
            PRIVATE_PICTURE,
        )
