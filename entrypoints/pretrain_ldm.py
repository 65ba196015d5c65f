"""Train the class-conditional latent diffusion model on public pictures."""

from entrypoints.common import Call, entry_point, relative
from entrypoints.pipeline import AUTOENCODER, PUBLIC_DATA, WORKING, make_missing


@entry_point("pretrain_ldm")
def main(call: Call) -> None:
    """Train the latent diffusion model on the latents of the public pictures."""
    if call.dry_run:
        call.print_dry_run({}, [relative(call.out) if call.out else "runs/RUN_ID/ldm"])
        return
    from dp_lora.data.layout import read_dataset
    from dp_lora.training.ldm import train_ldm

    with call.tracked(system_metrics=True) as (run, folder):
        make_missing(call.config, call.typed, run.environment(), PUBLIC_DATA, AUTOENCODER)
        data = read_dataset(PUBLIC_DATA, list(call.config.public.classes), "train")
        run.dataset("letters", PUBLIC_DATA, data.digest())
        out = folder if call.child else folder / "ldm"
        run.output(out)
        train_ldm(call.config, PUBLIC_DATA, AUTOENCODER, WORKING, out, run)


if __name__ == "__main__":
    main()
