"""Train the autoencoder on public pictures."""

from dp_lora.cli.common import Call, entry_point, relative
from dp_lora.cli.pipeline import make_missing, would_make
from dp_lora.cli.pipelines import WORKING, public_data, require


@entry_point("pretrain_ae")
def main(call: Call) -> None:
    """Train the autoencoder on the public pictures."""
    pictures = public_data(call.config)
    if call.dry_run:
        call.print_dry_run({}, [*would_make(call.config, pictures), relative(WORKING), call.shown_out("autoencoder")])
        return
    from dp_lora.data.layout import read_dataset
    from dp_lora.training.autoencoder import train_autoencoder

    require(call.config, [pictures])
    with call.tracked(system_metrics=True) as (run, folder):
        make_missing(call.config, call.typed, run.environment(), pictures)
        public = call.config.public
        data = read_dataset(pictures, list(public.classes), "train")
        data.require_shape(public.size, public.channels, "public")
        run.dataset(public.source, pictures, data.digest())
        out = folder if call.child else folder / "autoencoder"
        run.output(out)
        run.made_from("pictures", output=relative(pictures))
        train_autoencoder(call.config, pictures, WORKING, out, run)
