"""The plan of a private fine-tuning, as its config asks for it."""

from dp_lora.config.schema import Config
from dp_lora.privacy.accounting import calibrate
from dp_lora.privacy.plan import PUBLISHED, PrivacyPlan
from dp_lora.privacy.published import published_plan


def make_plan(config: Config) -> PrivacyPlan:
    """The plan of `config`, from public numbers alone."""
    make = published_plan if config.privacy.accounting == PUBLISHED else calibrate
    return make(
        eps=config.privacy.eps,
        delta=config.privacy.delta,
        n_public=config.data.n_public,
        batch_size=config.privacy.batch_size,
        epochs=config.privacy.epochs,
        max_grad_norm=config.privacy.max_grad_norm,
        k=config.privacy.k,
        unit=config.privacy.unit,
    )
