"""Accuracy over epsilon on the default experiment: mean and range over seeds, one config, only eps differs."""

import statistics

import click

from benchmarks.trials import Trial, markdown, scores, write_report


@click.command()
@click.option("--config", default="mnist5k")
@click.option("--seeds", default=3, help="seeds of LoRA's start and of the samples; DP noise is fresh each time")
@click.option("--eps", "epsilons", default="1,5,10,inf")
@click.option("--jobs", default=2, help="trials at a time")
def main(config: str, seeds: int, epsilons: str, jobs: int) -> None:
    """Run every eps with every seed and print a table."""
    scored = scores([Trial(config, eps, seed) for eps in epsilons.split(",") for seed in range(seeds)], jobs)
    rows = []
    for eps in epsilons.split(","):
        of_seeds = [scored[Trial(config, eps, seed)] for seed in range(seeds)]
        accuracy = [score["accuracy"] for score in of_seeds]
        rows.append(
            [
                eps,
                f"{100 * statistics.mean(accuracy):.1f}",
                ", ".join(f"{100 * value:.1f}" for value in accuracy),
                f"{statistics.mean(s['letter_frechet_distance'] for s in of_seeds):.2f}",
                f"{100 * statistics.mean(s['class_agreement'] for s in of_seeds):.1f}",
            ]
        )
    header = ["eps", "accuracy (mean, %)", "seeds", "letter Frechet distance", "class agreement (%)"]
    text = markdown(header, rows)
    last = of_seeds[-1]
    for name in ("accuracy_train_on_real", "accuracy_public_only", "accuracy_untrained_embedding"):
        if name in last:
            text += f"\n{name}: {100 * last[name]:.1f}"
    write_report(f"utility-{config}", text)


if __name__ == "__main__":
    main()
