"""The private step on a model from elsewhere, as docs/python.md shows it."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from dp_lora.privacy.accounting import spent
from dp_lora.privacy.gradients import micro_batches
from dp_lora.privacy.per_row import each_row
from dp_lora.privacy.randomness import ItemStreams
from dp_lora.privacy.sums import sum_over_units

PAGE = Path(__file__).parent.parent / "docs" / "python.md"
CPU = torch.device("cpu")


def example() -> str:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)[0]


def test_the_example_of_the_docs_trains_and_spends_at_most_its_target(tmp_path, monkeypatch, capsys):
    code = example()
    assert len(code.splitlines()) <= 30
    monkeypatch.chdir(tmp_path)
    told: dict = {}
    exec(compile(code, str(PAGE), "exec"), told)
    plan = told["plan"]
    assert told["ledger"].counted_steps(plan) == plan.steps
    assert 0.99 * 3 < spent(plan, plan.steps).epsilon <= 3
    assert "Spent(epsilon=2.99" in capsys.readouterr().out
    # a second process with the same loop finds the budget spent
    before = (tmp_path / "ledger.jsonl").read_bytes()
    exec(compile(code, str(PAGE), "exec"), {})
    assert (tmp_path / "ledger.jsonl").read_bytes() == before


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv1d(2, 3, 3, padding=1)
        self.recurrent = nn.Linear(12, 4)

    def forward(self, x):
        return self.recurrent(torch.tanh(self.convolution(x)).flatten())


@pytest.mark.parametrize(("k", "rows"), [(1, 4), (3, 4), (3, 2), (2, 100)])
def test_each_unit_s_gradient_is_that_of_a_loop_over_its_rows_with_its_own_draws(k, rows):
    torch.manual_seed(0)
    model, x = Own(), torch.randn(7, 2, 4)
    units = [[0], [3, 1, 5], [2, 6]]

    def row_loss(weights, position, noise):
        return functional_call(model, weights, (x[position] + noise,)).square().sum()

    def draw(generator):
        return torch.from_numpy(generator.standard_normal((2, 4), dtype=np.float32))

    parameters = dict(model.named_parameters())
    batches = micro_batches(units, k, rows, CPU)
    total, norms, _ = sum_over_units(each_row(row_loss, draw)(ItemStreams(5)), parameters, batches, 0.5)

    streams, wanted = ItemStreams(5), {name: torch.zeros_like(p) for name, p in parameters.items()}
    for unit, norm in zip(units, norms, strict=True):
        losses = [row_loss(parameters, picture, draw(streams[picture])) for picture in unit for _ in range(k)]
        gradients = torch.autograd.grad(torch.stack(losses).mean(), list(parameters.values()))
        size = torch.sqrt(sum(gradient.square().sum() for gradient in gradients))
        assert norm.item() == pytest.approx(size.item(), rel=1e-4)
        for name, gradient in zip(wanted, gradients, strict=True):
            wanted[name] += gradient * min(1.0, 0.5 / size.item())
    for name, value in total.items():
        torch.testing.assert_close(value.float(), wanted[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(4)])
def test_a_model_that_ties_rows_together_or_draws_of_its_own_is_refused(layer):
    model = nn.Sequential(nn.Linear(4, 4), layer)

    def row_loss(weights, position):
        return functional_call(model, weights, (torch.ones(1, 4) * position,)).sum()

    parameters = dict(model.named_parameters())
    with pytest.raises((RuntimeError, ValueError)):
        sum_over_units(each_row(row_loss)(ItemStreams(0)), parameters, micro_batches([[0], [1]], 1, 2, CPU), 1.0)
