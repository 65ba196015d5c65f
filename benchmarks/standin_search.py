"""Hyper-parameters of private fine-tuning, chosen on rendered digits that are treated as if private.

Choosing on the stand-in costs no privacy. It ranks settings; it does not predict scores on real digits.
"""

import click

from benchmarks.trials import Trial, markdown, scores, write_report

# the letter that a classifier of the letters sees in most rendered digits of a class (7: Z is taken)
LOOK_ALIKE = "train.embedding_start=O,I,Z,J,A,S,B,T,B,G"
# what differs from the default; the first line is the default itself, and those that only sample share its adapter
CANDIDATES = [
    "",
    "sampling.eta=0",
    "sampling.eta=0.5",
    "sampling.guidance_scale=2",
    "sampling.guidance_scale=4",
    "sampling.guidance_scale=6",
    "sampling.steps=30",
    "sampling.steps=30 sampling.guidance_scale=2",
    "sampling.steps=30 sampling.guidance_scale=4",
    "sampling.n=2000",
    "privacy.epochs=10",
    "privacy.epochs=20",
    "privacy.epochs=30",
    "privacy.batch_size=200 privacy.epochs=10",
    "privacy.batch_size=600",
    "privacy.batch_size=600 privacy.epochs=22.5",
    "privacy.batch_size=800 privacy.epochs=30",
    "privacy.max_grad_norm=0.1",
    "lora.rank=2",
    "lora.rank=8",
    "lora.train=AB",
    LOOK_ALIKE,
    f"{LOOK_ALIKE} sampling.eta=0",
    "train.lr=0.025",
    "train.lr_noise_exponent=0",
    "train.ema_decay=0.95",
    "train.ema_decay=0.97",
    "train.timestep_min=500",
]
SCORES = ("accuracy", "class_agreement")


@click.command()
@click.option("--eps", "epsilons", default="1,10")
@click.option("--seeds", default=1)
@click.option("--jobs", default=2, help="trials at a time")
def main(epsilons: str, seeds: int, jobs: int) -> None:
    """Score every candidate at every eps on the stand-in: a table of accuracy and the samples' class agreement."""
    columns = epsilons.split(",")
    trials = [
        Trial("standin", eps, seed, candidate) for candidate in CANDIDATES for eps in columns for seed in range(seeds)
    ]
    scored = scores(trials, jobs)
    rows = []
    for candidate in CANDIDATES:
        row = [f"`{candidate}`" if candidate else "the default"]
        for eps in columns:
            tried = [scored[Trial("standin", eps, seed, candidate)] for seed in range(seeds)]
            row += [f"{100 * sum(metrics[name] for metrics in tried) / seeds:.1f}" for name in SCORES]
        rows.append(row)
    header = ["setting", *(f"eps {eps} {name}" for eps in columns for name in SCORES)]
    write_report("standin", markdown(header, rows))


if __name__ == "__main__":
    main()
