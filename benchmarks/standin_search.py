"""Hyper-parameters of private fine-tuning, chosen on rendered digits that are treated as if private.

Choosing on the stand-in costs no privacy. It ranks settings; it does not predict scores on real digits.
"""

import click

from benchmarks.trials import Trial, markdown, scores, write_report

# what differs from the default, one thing at a time; the first line is the default itself
CANDIDATES = [
    "",
    "train.embedding_start=mean",
    "train.lr_noise_exponent=0",
    "privacy.max_grad_norm=0.1",
    "sampling.guidance_scale=2",
]


@click.command()
@click.option("--eps", "epsilons", default="1,10")
@click.option("--seeds", default=1)
@click.option("--jobs", default=2, help="trials at a time")
def main(epsilons: str, seeds: int, jobs: int) -> None:
    """Score every candidate at every eps on the stand-in and print a table."""
    columns = epsilons.split(",")
    trials = [
        Trial("standin", eps, seed, candidate) for candidate in CANDIDATES for eps in columns for seed in range(seeds)
    ]
    scored = scores(trials, jobs)
    rows = []
    for candidate in CANDIDATES:
        row = [f"`{candidate}`" if candidate else "the default"]
        for eps in columns:
            values = [scored[Trial("standin", eps, seed, candidate)]["accuracy"] for seed in range(seeds)]
            row.append(f"{100 * sum(values) / len(values):.1f}")
        rows.append(row)
    write_report("standin", markdown(["setting", *(f"eps {eps}" for eps in columns)], rows))


if __name__ == "__main__":
    main()
