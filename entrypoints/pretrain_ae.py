"""Train the autoencoder on public pictures."""

from entrypoints.common import Call, entry_point, relative
from entrypoints.pipeline import PUBLIC_DATA, WORKING, make_missing


@entry_point("pretrain_ae")
def main(call: Call) -> None:
    """Train the autoencoder on the public pictures."""
    if call.dry_run:
        call.print_dry_run({}, [relative(call.out) if call.out else "runs/RUN_ID/autoencoder"])
        return
    from dp_lora.data.layout import read_dataset
    from dp_lora.training.autoencoder import train_autoencoder

    with call.tracked(system_metrics=True) as (run, folder):
        make_missing(call.config, call.typed, run.environment(), PUBLIC_DATA)
        data = read_dataset(PUBLIC_DATA, list(call.config.public.classes), "train")
        run.dataset("letters", PUBLIC_DATA, data.digest())
        out = folder if call.child else folder / "autoencoder"
        run.output(out)
        train_autoencoder(call.config, PUBLIC_DATA, WORKING, out, run)


if __name__ == "__main__":
    main()
