"""The released code's accounting: its claim, the epsilon that really holds, and no wording as a guarantee."""

import json
import math

import pytest
import torch
from click.testing import CliRunner

from dp_lora.config import load
from dp_lora.errors import InputError
from dp_lora.privacy.accounting import pld_epsilon, spent
from dp_lora.privacy.gradients import micro_batches
from dp_lora.privacy.ledger import Ledger
from dp_lora.privacy.plan import ROUNDING, PrivacyPlan
from dp_lora.privacy.published import claimed_epsilon, published_plan
from dp_lora.privacy.randomness import ItemStreams, Randomness
from dp_lora.privacy.step import noisy_sum
from dp_lora.privacy.sums import sum_over_units
from dp_lora.release import privacy_statement
from dp_lora.statement import privacy_tag
from dp_lora.training.plan import make_plan
from dp_lora.training.private_loss import diffusion_loss
from tests.support.tiny import difference, plan_of, tiny_adapter, tiny_config, tiny_latents, tiny_model, total_norm

CPU = torch.device("cpu")
CELEBAHQ = {
    "delta": 1e-5, "n_public": 28000, "batch_size": 2048, "epochs": 10, "max_grad_norm": 5e-4, "k": 2,
    "unit": "picture",
}  # fmt: skip
MNIST = {
    "delta": 1e-5, "n_public": 60000, "batch_size": 2000, "epochs": 200, "max_grad_norm": 1e-3, "k": 12,
    "unit": "picture",
}  # fmt: skip


@pytest.mark.slow
def test_rate_steps_and_divisor_are_those_that_opacus_makes_of_the_study_s_loaders():
    plan = published_plan(eps=10.0, **CELEBAHQ)
    assert (plan.sample_rate, plan.steps, plan.expected_batch) == (1 / 14, 140, 2000.0)
    from opacus.data_loader import DPDataLoader

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(28000)), batch_size=2048)
    assert DPDataLoader.from_data_loader(loader).sample_rate == plan.sample_rate


@pytest.mark.parametrize(
    ("settings", "eps", "true"),
    [
        (CELEBAHQ, 1.0, 2.41),
        pytest.param(CELEBAHQ, 5.0, 22.8, marks=pytest.mark.slow),
        pytest.param(CELEBAHQ, 10.0, 53.3, marks=pytest.mark.slow),
        pytest.param(MNIST, 1.0, 30.4, marks=pytest.mark.slow),
        pytest.param(MNIST, 5.0, 2235, marks=pytest.mark.slow),
        pytest.param(MNIST, 10.0, 7695, marks=pytest.mark.slow),
    ],
)
def test_the_published_epsilons_bound_far_more_than_they_claim(settings, eps, true):
    plan = published_plan(eps=eps, **settings)
    assert eps - 0.011 < claimed_epsilon(plan, plan.steps) <= eps
    found = spent(plan, plan.steps)
    # the study's numbers do not include rounding
    assert true * 0.998 < found.epsilon < true * (1 + 4 * ROUNDING)
    assert found.epsilon == pld_epsilon(plan.sample_rate, plan.noise_multiplier / plan.sensitivity, plan.steps, 1e-5)


@pytest.mark.slow
def test_with_one_draw_claim_and_bound_are_one():
    plan = published_plan(eps=5.0, **{**CELEBAHQ, "k": 1})
    assert spent(plan, plan.steps).epsilon == pytest.approx(claimed_epsilon(plan, plan.steps), abs=0.02)


def parallel_step(tmp_path, plan: PrivacyPlan, n: int) -> dict[str, torch.Tensor]:
    """A step over n units; all draws have the same gradient, with a norm far above the clip."""
    directions = torch.tensor([[3.0, 4.0]] * n)

    def factory(_draws):
        return lambda copies, rows: (copies["w"][rows.slot] * directions[rows.picture]).sum(1)

    folder = tmp_path / f"{plan.accounting}-{n}"
    folder.mkdir()
    randomness = Randomness("run", b"0123456789abcdef")
    parameters = {"w": torch.zeros(2)}
    ledger = Ledger(folder / "ledger.jsonl")
    return noisy_sum(plan, 0, [[i] for i in range(n)], factory, parameters, randomness, ledger, 5)[0]


@pytest.mark.parametrize(("accounting", "bound"), [("per_unit", 0.1), ("published", 0.4)])
def test_one_unit_moves_the_published_step_by_k_times_the_clip_and_ours_by_the_clip(tmp_path, accounting, bound):
    """Both steps run the same code; with parallel draws a unit reaches the bound that `spent` counts, and no more."""
    plan = plan_of(sample_rate=1.0, k=4, accounting=accounting)
    assert plan.sensitivity * plan.max_grad_norm == pytest.approx(bound * (1 + ROUNDING))
    moved = difference(parallel_step(tmp_path, plan, 3), parallel_step(tmp_path, plan, 2))
    assert total_norm(moved) == pytest.approx(bound, rel=1e-5)


def test_each_draw_is_clipped_apart_and_its_noise_is_its_own(tmp_path):
    """The published sum clips each of the k rows separately; our own step averages the same draws before its clip."""
    config, model = tiny_config(), tiny_model(tmp_path)
    parameters = tiny_adapter(model).parameters("AB")
    latents, labels = tiny_latents(1)
    bound, k = 1e-3, 3

    def sum_of(units, k):
        loss = diffusion_loss(config, model, latents, labels, CPU)(ItemStreams(5))
        return sum_over_units(loss, parameters, micro_batches(units, k, k * len(units), CPU), bound)

    apart, norms, _ = sum_of([[0]] * k, 1)
    folded, _, _ = sum_of([[0]], k)
    assert len({float(norm) for norm in norms}) == k
    assert total_norm(folded) <= bound * (1 + 1e-6)
    assert bound * (1 + 1e-6) < total_norm(apart) <= k * bound * (1 + 1e-6)


def test_a_plan_of_the_released_code_is_private_in_its_step_and_guaranteed_nowhere():
    plan = make_plan(tiny_config("privacy.accounting=published privacy.k=2 privacy.batch_size=9"))
    assert plan.private
    assert not plan.guaranteed
    assert (plan.sample_rate, plan.expected_batch) == (1 / 5, 8.0)
    assert PrivacyPlan.from_json(plan.as_json()) == plan
    assert plan_of().guaranteed


def test_its_statement_has_two_numbers_and_none_is_called_epsilon():
    config = tiny_config("privacy.accounting=published privacy.k=2")
    plan = make_plan(config)
    statement = privacy_statement(plan, plan.steps, "id", "head", config)
    assert statement["private"] is False
    assert "epsilon" not in statement
    assert statement["bounded_epsilon"] > 1.5 * statement["claimed_epsilon"]
    assert statement["claimed_epsilon"] <= 10
    assert "no guarantee" in statement["statement"]
    assert statement["accounting"] == "published"
    assert privacy_tag(statement) == "published-no-guarantee"
    ours = privacy_statement(make_plan(tiny_config()), 3, "id", "head", config)
    assert (ours["accounting"], privacy_tag(ours)) == ("per_unit", "private-dp")


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ("privacy.accounting=published privacy.unit=person", "knows no persons"),
        ("privacy.accounting=published privacy.eps=inf", "eps=inf has none"),
        ("privacy.accounting=rdp", "one of per_unit, published"),
    ],
)
def test_persons_and_no_privacy_are_refused_with_it(overrides, part):
    with pytest.raises(InputError, match=part):
        load("mnist5k", {}, overrides)


@pytest.mark.parametrize("change", [{"unit": "person"}, {"accounting": "other"}])
def test_a_plan_file_cannot_ask_for_it_either(change):
    stored = {**plan_of(accounting="published").as_json(), **change}
    with pytest.raises(InputError, match=r"privacy\.accounting"):
        PrivacyPlan.from_json(stored)
    with pytest.raises(InputError, match=r"privacy\.accounting"):
        published_plan(eps=math.inf, **CELEBAHQ)


@pytest.mark.parametrize("change", [{"delta": 0.5}, {"batch_size": 28001}, {"eps": -1.0}, {"eps": math.nan}])
def test_senseless_targets_are_refused_as_in_our_own_plan(change):
    with pytest.raises(InputError):
        published_plan(**{"eps": 1.0, **CELEBAHQ, **change})


def invoke(*arguments: str):
    from dp_lora.commands.finetune import main

    return CliRunner().invoke(main, list(arguments))


def test_a_dry_run_names_both_epsilons_and_a_folder_that_is_not_private(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    result = invoke("--k", "2", "--overrides", "privacy.accounting=published", "--dry-run")
    assert result.exit_code == 0, result.output
    facts = dict(line.split(": ", 1) for line in result.stdout.splitlines() if ": " in line)
    assert float(facts["epsilon bounded by the noise"]) > 2 * float(facts["epsilon claimed by the released code"])
    assert "expected epsilon" not in facts
    assert facts["would write"].split(", ")[-2] == "runs/RUN_ID/not-private"


def test_the_command_line_refuses_it_for_persons_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    result = invoke("--overrides", "privacy.accounting=published privacy.unit=person")
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: privacy.accounting=published: ")
    assert not list(tmp_path.iterdir())


def test_a_run_s_name_says_so():
    from dp_lora.tracking.provenance import run_name

    assert run_name("finetune", tiny_config("privacy.accounting=published")).endswith("accounting=published")
    assert "accounting" not in run_name("finetune", tiny_config())


def test_what_it_makes_goes_to_not_private_and_spends_what_the_ledger_says(tmp_path):
    from dp_lora.training.finetune import PrivateData, finetune
    from dp_lora.training.run_folder import binding, open_run_folder

    config = tiny_config("privacy.accounting=published privacy.k=2 privacy.epochs=0.4")
    model = tiny_model(tmp_path, config)
    latents, labels = tiny_latents(40)
    from dp_lora.events import Events

    with open_run_folder(tmp_path / "run", config, binding(config, "d", "b", "cpu")) as opened:
        data = PrivateData(latents, labels, [[i] for i in range(40)])
        names = {"path": "base", "digest": "b"}
        result = finetune(config, model, names, data, opened, CPU, Events(), lambda *_: None)
    assert result.name == "not-private"
    assert not (tmp_path / "run" / "release").exists()
    statement = json.loads((result / "privacy.json").read_text())
    assert statement["steps"] == opened.ledger.counted_steps(opened.plan) == 2
    assert statement["sensitivity"] == pytest.approx(2 * (1 + ROUNDING) * statement["max_grad_norm"])
    card = (result / "README.md").read_text()
    assert "no guarantee" in card
    assert "keep this adapter to yourself" in card


class FakeRun:
    def __init__(self):
        self.metrics, self.tagged = {}, {}

    def metric(self, name, value, step=None):
        self.metrics[name] = value

    def tags(self, values):
        self.tagged |= values

    def artifact(self, path):
        pass

    def output(self, folder):
        pass

    def privacy(self, statement):
        self.statement = statement


def test_mlflow_is_told_the_clip_of_an_adapter_that_was_clipped_and_none_without_privacy():
    from dp_lora.cli.common import track_privacy

    for eps, told in (("10", {"max_grad_norm": 0.05}), ("inf", {})):
        config = tiny_config(f"privacy.eps={eps} privacy.max_grad_norm=0.05")
        plan, run = make_plan(config), FakeRun()
        track_privacy(run, privacy_statement(plan, plan.steps, "id", "head", config), config)
        assert {name: value for name, value in run.metrics.items() if name == "max_grad_norm"} == told
        assert run.metrics["k"] == config.privacy.k


def test_mlflow_is_told_both_numbers_a_tag_of_its_own_and_never_an_epsilon(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from dp_lora.cli.common import track_privacy
    from dp_lora.commands.finetune import _report
    from dp_lora.files import write_json

    config = tiny_config("privacy.accounting=published privacy.k=2")
    plan = make_plan(config)
    statement = privacy_statement(plan, plan.steps, "id", "head", config)
    write_json(tmp_path / "privacy.json", statement)
    run, samples = FakeRun(), FakeRun()
    _report(SimpleNamespace(config=config), run, tmp_path, tmp_path / "base")
    track_privacy(samples, statement, config)
    for told in (run, samples):
        assert told.tagged["privacy"] == "published-no-guarantee"
        assert told.metrics["bounded_epsilon"] == statement["bounded_epsilon"]
        assert told.metrics["claimed_epsilon"] == statement["claimed_epsilon"]
        assert "epsilon" not in told.metrics
    # without a guarantee, nothing that it records may leave the operator's machine (see test_records.py)
    assert not config.privacy.guaranteed
    assert "no guarantee" in run.tagged["statement"]
