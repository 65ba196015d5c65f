"""Train the class-conditional latent diffusion model on public pictures."""

from dp_lora.cli.common import Call, entry_point, relative
from dp_lora.cli.pipeline import make_missing, would_make
from dp_lora.cli.pipelines import WORKING, autoencoder_folder, public_data, require
from dp_lora.files import digest_folder


@entry_point("pretrain_ldm")
def main(call: Call) -> None:
    """Train the latent diffusion model on the latents of the public pictures."""
    pictures, autoencoder = public_data(call.config), autoencoder_folder(call.config)
    if call.dry_run:
        upstream = would_make(call.config, pictures, autoencoder)
        call.print_dry_run({}, [*upstream, relative(WORKING), call.shown_out("ldm")])
        return
    from dp_lora.data.layout import read_dataset
    from dp_lora.training.ldm import train_ldm

    require(call.config, [pictures, autoencoder])
    with call.tracked(system_metrics=True) as (run, folder):
        make_missing(call.config, call.typed, run.environment(), pictures, autoencoder)
        public = call.config.public
        data = read_dataset(pictures, list(public.classes), "train")
        data.require_shape(public.size, public.channels, "public")
        run.dataset(public.source, pictures, data.digest())
        run.dataset("autoencoder", autoencoder, digest_folder(autoencoder), context="autoencoder")
        out = folder if call.child else folder / "ldm"
        run.output(out)
        run.made_from("pictures", output=relative(pictures))
        run.made_from("autoencoder", output=relative(autoencoder))
        train_ldm(call.config, pictures, autoencoder, WORKING, out, run)
