"""Hyper-parameters of private fine-tuning, chosen on rendered digits that are treated as if private.

Choosing on the stand-in costs no privacy. It ranks settings; it does not predict scores on real digits.
"""

import click

from benchmarks.trials import markdown, trial, write_report

# what differs from the default, one thing at a time; the first line is the default itself
CANDIDATES = [
    "",
    "privacy.max_grad_norm=0.025",
    "privacy.max_grad_norm=0.1",
    "train.lr=0.025",
    "train.lr=0.1",
    "lora.train=AB",
    "lora.rank=8",
    "privacy.batch_size=800 privacy.epochs=12",
    "train.timestep_min=0",
    "sampling.guidance_scale=2",
]


@click.command()
@click.option("--eps", "epsilons", default="1,10")
@click.option("--seeds", default=1)
def main(epsilons: str, seeds: int) -> None:
    """Score every candidate at every eps on the stand-in and print a table."""
    rows = []
    for candidate in CANDIDATES:
        row = [f"`{candidate}`" if candidate else "the default"]
        for eps in epsilons.split(","):
            values = [trial("standin", eps, seed, candidate)["accuracy"] for seed in range(seeds)]
            row.append(f"{100 * sum(values) / len(values):.1f}")
        rows.append(row)
    write_report("standin", markdown(["setting", *(f"eps {eps}" for eps in epsilons.split(","))], rows))


if __name__ == "__main__":
    main()
