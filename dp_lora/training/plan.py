"""The plan of a private fine-tuning, as its config asks for it."""

from dp_lora.config.schema import Config
from dp_lora.privacy.accounting import calibrate
from dp_lora.privacy.plan import PUBLISHED, PrivacyPlan
from dp_lora.privacy.published import published_plan


def make_plan(config: Config) -> PrivacyPlan:
    """The plan of `config`, from public numbers alone."""
    privacy = config.privacy
    # the released code knows flat clipping alone, as config.rules says
    own = {"clipping": privacy.clipping} if privacy.accounting != PUBLISHED else {}
    make = published_plan if privacy.accounting == PUBLISHED else calibrate
    return make(
        eps=privacy.eps,
        delta=privacy.delta,
        n_public=config.data.n_public,
        batch_size=privacy.batch_size,
        epochs=privacy.epochs,
        max_grad_norm=privacy.max_grad_norm,
        k=privacy.k,
        unit=privacy.unit,
        **own,
    )
