"""`make bench` knows a miss, and a miss sets its exit status; the timings themselves are no tests."""

import json

import pytest
from click.testing import CliRunner

from benchmarks import private_step
from benchmarks.ratios import Ratio, against, interleaved, peak_memory
from benchmarks.size import sizes


@pytest.mark.parametrize(
    ("rounds", "faster", "missed"),
    [
        ([1.0] * 6 + [1.3] * 3, False, False),
        ([1.0] * 3 + [1.3] * 6, False, False),  # the median is above the bar, the lower quartile is not
        ([1.0] + [1.3] * 8, False, True),
        ([2.0] * 6 + [1.0] * 3, True, False),
        ([2.0] * 3 + [1.0] * 6, True, False),
        ([2.0] + [1.0] * 8, True, True),
        ([1.05], False, False),  # peak memory is one number
        ([1.2], False, True),
    ],
)
def test_a_bar_is_missed_where_the_better_quartile_is_on_its_wrong_side(rounds, faster, missed):
    assert Ratio("r", rounds, 1.5 if faster else 1.1, faster=faster).missed is missed


def test_rounds_are_interleaved_and_the_first_one_is_not_counted():
    calls = []
    seconds = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, lambda: None)
    assert calls == ["a", "b"] * 4
    assert [len(times) for times in seconds.values()] == [3, 3]
    assert against({"a": [2.0, 3.0], "b": [1.0, 2.0]}, "a", "b") == [2.0, 1.5]


def test_peak_memory_is_that_of_what_is_alive_at_once():
    import torch

    def one_after_the_other():
        for _ in range(4):
            torch.ones(2**18)

    def together():
        return [torch.ones(2**18) for _ in range(4)]

    assert peak_memory(together) == pytest.approx(4 * 2**20, rel=0.01)
    assert peak_memory(one_after_the_other) == pytest.approx(2**20, rel=0.01)


@pytest.mark.parametrize(("ratio", "status", "shown"), [(1.0, 0, "held"), (1.3, 1, "missed")])
def test_the_command_shows_every_round_beside_the_bar_and_ends_with_1_on_a_miss(
    tmp_path, monkeypatch, ratio, status, shown
):
    monkeypatch.setattr(private_step, "measure", lambda rounds: iter([Ratio("private / stock", [ratio] * rounds, 1.1)]))
    monkeypatch.setattr(private_step, "RUNS", tmp_path)
    monkeypatch.setattr("benchmarks.tables.RUNS", tmp_path)
    result = CliRunner().invoke(private_step.main, [])
    assert result.exit_code == status
    assert shown in result.output
    assert ", ".join([f"{ratio:.2f}"] * 9) in result.output
    (written,) = json.loads((tmp_path / "bench.json").read_text())["ratios"]
    assert (written["rounds"], written["bar"], written["missed"]) == ([ratio] * 9, 1.1, bool(status))
    assert CliRunner().invoke(private_step.main, ["--rounds", "8"]).exit_code == 2


def test_sizes_are_per_room_and_add_up():
    lines = {"dp_lora/files.py": 5, "dp_lora/data/a.py": 10, "dp_lora/data/b/c.py": 1, "entrypoints/d.py": 7}
    assert sizes({**lines, "tests/gpu/e.py": 100}) == [
        ("dp_lora/*.py", 1, 5),
        ("dp_lora/data", 2, 11),
        ("entrypoints", 1, 7),
        ("tests", 1, 100),
        ("all of dp_lora", 3, 16),
        ("dp_lora and entrypoints", 4, 23),
        ("all", 5, 123),
    ]


def test_the_table_of_audits_has_a_row_per_case_and_the_headline_one_per_k_and_eps():
    from benchmarks.audit import EPSILONS, Row, headline, table
    from benchmarks.mutants import PUBLISHED, cases
    from dp_lora.privacy.audit import Audit
    from dp_lora.privacy.audit_bound import Bound
    from dp_lora.privacy.audit_scores import Measured

    right = Measured(1.0, 0.01, 1.0)
    rows = []
    for eps in EPSILONS:
        for case in cases(eps):
            bound = Bound(4.0 if case.convicted_by == "bound" else 0.5)
            lag = Measured(0.0, 0.01, 0.0)
            audit = Audit(1000, 1e-5, eps, bound, 4.47, right, lag, right, right, 0.0, 1.0)
            rows.append(Row(eps, case, audit, 1.0))
    lines = table(rows).strip().splitlines()
    assert len(lines) == 2 + len(rows) / len(EPSILONS)
    right_row = "| right, k=1 | 0.50 (0.998) | 0.50 (2.99) | noise 1.000, lag 0.000, q*jump 1.00 | not refuted |"
    assert lines[2] == right_row
    assert any("| published accounting, k=12 | 4.00 (" in line and line.endswith("| refuted |") for line in lines)
    claims = headline(rows).strip().splitlines()[2:]
    assert [line.split(" | ")[0] for line in claims] == [f"| {k}" for _ in EPSILONS for k in PUBLISHED]


def test_the_arithmetic_of_many_gpus_is_that_of_its_parts():
    """The numbers agree with shares drawn at random, and with closed forms where they are known."""
    import numpy as np

    from benchmarks.scaling import Assumed, Counted, Step, largest_share, most_of_normals, stops

    assert most_of_normals(1) == pytest.approx(0, abs=1e-3)
    assert most_of_normals(2) == pytest.approx(1 / np.pi**0.5, abs=1e-3)
    drawn = np.random.default_rng(0).binomial(3500, 2048 / 28000, (4000, 8)).max(1).mean()
    assert largest_share(28_000, 2048 / 28000, 8) == pytest.approx(drawn, rel=0.01)

    assumed, base = Assumed(), Counted(flops=10**13, trained=10**6, fits=10**6)
    alone, many = Step(base, 1, assumed), Step(base, 8, assumed)
    assert alone.exchange == alone.received == 0
    assert alone.straggling == pytest.approx(0, abs=1e-9)
    assert alone.compute == pytest.approx(alone.rows * base.row(assumed))
    assert alone.rows >= assumed.batch
    assert many.received == 7 * 8 * 10**6
    assert alone.seconds / 8 < many.seconds < alone.seconds
    # at this number of GPUs, receiving the sums takes as long as computing the rows
    gpus = stops(base, assumed)
    rows = assumed.batch / gpus * base.row(assumed)
    assert 8 * base.trained * gpus / assumed.link == pytest.approx(rows, rel=0.1)
