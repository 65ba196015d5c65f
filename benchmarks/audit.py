"""A table and pictures of audits: right steps and known faults at eps 1 and 3, and the published accounting."""

import dataclasses
import math
import os
import resource
import time
from concurrent.futures import ProcessPoolExecutor

import click
import torch

from benchmarks.mutants import PUBLISHED, Case, cases, wrong
from benchmarks.tables import RUNS, markdown, write_report
from dp_lora.config import ROOT
from dp_lora.privacy.accounting import spent
from dp_lora.privacy.audit import Audit, audit_step
from dp_lora.training.audit import Audited
from dp_lora.training.audit_report import write_picture

EPSILONS = (1.0, 3.0)
CANARIES = 1000
PICTURES = RUNS / "audit"
CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Row:
    """One audited case."""

    eps: float
    case: Case
    audit: Audit
    seconds: float


def all_cases() -> list[tuple[float, str]]:
    """Every case as (eps, name); the slowest, which audit persons, come first."""
    names = [(eps, case.name) for eps in EPSILONS for case in cases(eps)]
    return sorted(names, key=lambda one: "person" not in one[1])


def audited(eps: float, name: str) -> tuple[float, str, Audit, float]:
    """Audit one case with fresh entropy, and leave its picture in PICTURES."""
    torch.set_num_threads(1)
    (case,) = (case for case in cases(eps) if case.name == name)
    began = time.perf_counter()
    with wrong(case):
        audit, scores, coins = audit_step(case.plan, CANARIES, CPU)
    title = f"{name}, eps {eps:g}"
    file = "".join(letter if letter.isalnum() else "-" for letter in title)
    write_picture(PICTURES / f"{file}.png", Audited(case.plan, audit, scores, coins), title)
    return eps, name, audit, time.perf_counter() - began


def table(rows: list[Row]) -> str:
    """One line per case: its bound and its true epsilon at each eps, the direct numbers, the verdict."""
    header = ["case", *(f"eps {eps:g}: bound (true)" for eps in EPSILONS), "direct numbers at eps 3", "verdict"]
    lines = []
    for name in dict.fromkeys(row.case.name for row in rows):
        own = {row.eps: row for row in rows if row.case.name == name}
        last = own[EPSILONS[-1]].audit
        direct = f"noise {last.noise.value:.3f}, lag {last.lag.value:.3f}, q*jump {last.jump.value:.2f}"
        if last.worlds_bound:
            direct += f", two worlds {last.worlds_bound:.2f} of {last.worlds_claimed:.2f}"
        verdicts = [own[eps].audit.verdict.partition(":")[0] for eps in EPSILONS]
        verdict = verdicts[0] if len(set(verdicts)) == 1 else " / ".join(verdicts)
        cells = [f"{own[eps].audit.bound.epsilon:.2f} ({_shown(own[eps].case.true_epsilon)})" for eps in EPSILONS]
        lines.append([name, *cells, direct, verdict])
    return markdown(header, lines)


def _shown(true_epsilon: float) -> str:
    return f"{true_epsilon:.3g}" if math.isfinite(true_epsilon) else "no bound"


def headline(rows: list[Row]) -> str:
    """The published accounting: the claimed epsilon, the bound from its real noise, and the audit's lower bound."""
    header = ["k", "claimed", "bounded by the noise that is there", "measured from below"]
    lines = []
    for eps in EPSILONS:
        for k in PUBLISHED:
            (row,) = (r for r in rows if r.eps == eps and r.case.name == f"published accounting, k={k}")
            bounded = spent(row.case.plan, row.case.plan.steps).epsilon
            lines.append([f"{k}", f"{row.audit.claimed:.3g}", f"{bounded:.3g}", f"{row.audit.bound.epsilon:.2f}"])
    return markdown(header, lines)


@click.command()
@click.option("--jobs", default=2, help="audits at a time")
def main(jobs: int) -> None:
    """Audit every case and print both tables."""
    began = time.monotonic()
    # one thread each: the steps are small, and more threads only wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"
    by_name = {(eps, case.name): case for eps in EPSILONS for case in cases(eps)}
    with ProcessPoolExecutor(jobs) as pool:
        done = list(pool.map(audited, *zip(*all_cases(), strict=True)))
    found = {(eps, name): Row(eps, by_name[eps, name], audit, seconds) for eps, name, audit, seconds in done}
    rows = [found[key] for key in by_name]
    ceiling = rows[0].audit.ceiling
    text = f"{CANARIES} canaries, delta {rows[0].audit.delta:g}, 95%; ceiling of the bound {ceiling:.2f}\n\n"
    text += f"{table(rows)}\n{headline(rows)}\npictures: {PICTURES.relative_to(ROOT)}; "
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    text += (
        f"{(time.monotonic() - began) / 60:.1f} minutes, {(used.ru_utime + used.ru_stime) / 60:.1f} of a processor's"
    )
    write_report("audit", text)


if __name__ == "__main__":
    main()
