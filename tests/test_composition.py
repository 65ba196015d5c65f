"""Several fine-tunings of the same private data: epsilons and deltas add up; costs that cannot be added are refused."""

import json
import math

import pytest

from dp_lora.cli.finetuning import resolve
from dp_lora.errors import InputError
from dp_lora.files import read_json, write_json
from dp_lora.privacy.composition import ReleaseCost, compose, parent_parts, together
from dp_lora.training.dry_run_facts import finetuning_facts
from dp_lora.training.run_folder import binding, of_other_data, other_ledgers
from tests.support.finetuning import Heard, house, run
from tests.support.tiny import make_base, plan_of, tiny_config

__all__ = ["house"]

FIRST, SECOND, BASE = (
    ReleaseCost(2.0, 1e-5, run_id="a"),
    ReleaseCost(3.0, 1e-6, run_id="b"),
    ReleaseCost(1.0, 1e-7, base="d"),
)


def statement_of(*parts, **changes):
    epsilon, delta = compose(parts)
    stated = {"private": True, "epsilon": epsilon, "delta": delta, "unit": "picture", "relation": "add-or-remove-one"}
    return stated | {"parts": [part.as_json() for part in parts]} | changes


def test_epsilons_add_up_and_deltas_add_up():
    assert compose([]) == (0, 0)
    assert compose([FIRST, SECOND]) == (5.0, pytest.approx(1.1e-5))
    with pytest.raises(InputError, match="must be below 1"):
        compose([ReleaseCost(1.0, 0.5, run_id="a"), ReleaseCost(1.0, 0.5, run_id="b")])


def privacy_losses(steps: int, delta: float) -> float:
    from dp_lora.privacy.accounting import pld_epsilon

    return pld_epsilon(0.1, 1.0, steps, delta)


def test_the_sum_is_never_below_what_the_accountant_says_of_both_together():
    """Two runs of one mechanism cost as one run of twice the steps; a mutant that states the larger one states less."""
    delta = 1e-5
    both = privacy_losses(40, 2 * delta)
    one = privacy_losses(20, delta)
    epsilon, total = compose([ReleaseCost(one, delta, run_id="a"), ReleaseCost(one, delta, run_id="b")])
    assert total == 2 * delta
    assert both <= epsilon
    assert both > max(one, one)  # a mutant that states the larger one


def test_randomized_response_twice_reaches_the_sum_exactly():
    """The bound is tight without delta: the likeliest pair of answers has ratio exp(e1 + e2)."""
    answers = [math.exp(e) / (1 + math.exp(e)) for e in (1.0, 0.5)]
    ratio = math.prod(answers) / math.prod(1 - p for p in answers)
    epsilon, _ = compose([ReleaseCost(1.0, 0.0, run_id="a"), ReleaseCost(0.5, 0.0, run_id="b")])
    assert math.log(ratio) == pytest.approx(epsilon)


def test_the_parents_of_a_parent_add_up_and_one_base_counts_once():
    parts = parent_parts(statement_of(BASE, FIRST, SECOND), plan_of(), "privacy.parent=x")
    assert parts == (BASE, FIRST, SECOND)
    assert together([BASE], parts) == parts
    assert together([ReleaseCost(1.0, 1e-7, base="other")], parts) == (*parts, ReleaseCost(1.0, 1e-7, base="other"))
    # no run is left out, even if two look the same
    assert together([], (FIRST, FIRST)) == (FIRST, FIRST)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"private": False}, "is not private"),
        ({"unit": "person"}, "unit=person"),
        ({"relation": "replace-one"}, "relation=replace-one"),
        ({"epsilon": math.inf}, "epsilon inf"),
        ({"epsilon": "1"}, "must be a bound"),
        ({"epsilon": 4.9}, "do not add up"),
        ({"delta": 1e-5}, "do not add up"),
        ({"parts": []}, "do not add up"),
        ({"parts": [{"run_id": "a"}]}, "do not add up"),
        (
            {"parts": [ReleaseCost(6.0, 2e-5, run_id="a").as_json(), ReleaseCost(-1.0, -9e-6, run_id="b").as_json()]},
            "do not add up",
        ),
    ],
)
def test_a_parent_that_cannot_be_added_is_refused_in_one_line(changes, words):
    with pytest.raises(InputError, match=f"^privacy.parent=x: .*{words}") as error:
        parent_parts(statement_of(FIRST, SECOND, **changes), plan_of(), "privacy.parent=x")
    assert "\n" not in str(error.value)


def test_a_run_states_the_sum_lists_its_parts_and_is_bound_to_its_parent(house, monkeypatch):
    first = read_json(run(house, "runs/one") / "privacy.json")
    own = ReleaseCost(first["accountants"]["epsilon"], 1e-3, run_id=first["run_id"])
    assert first["parts"] == [own.as_json()]
    assert first["epsilon"] == own.epsilon

    heard = Heard()
    release = run(house, "runs/two", events=heard, parent=(own,))
    second = read_json(release / "privacy.json")
    assert second["epsilon"] == own.epsilon + second["accountants"]["epsilon"]
    assert (second["delta"], second["target_delta"]) == (2e-3, 1e-3)
    assert [part["run_id"] for part in second["parts"]] == [own.run_id, second["run_id"]]
    assert second["statement"].startswith(f"({second['epsilon']:.6g}, 0.002)-differentially private")
    assert heard.metrics["epsilon"][-1] == second["epsilon"]
    card = (release / "README.md").read_text()
    assert second["statement"] in card
    assert f"run {own.run_id}: epsilon {own.epsilon:.6g}, delta 0.001" in card
    assert second["run_id"] not in card  # a run made again must have the same card
    assert "this run alone" not in card

    # the third run counts both earlier ones, though it names the second alone
    monkeypatch.setattr("dp_lora.tracking.lookup.ROOT", house)
    base = f"model.base={house / 'base'}"
    config = tiny_config(f"privacy.parent=runs/two {base}")
    parts = resolve(config).parent
    assert [part.run_id for part in parts] == [own.run_id, second["run_id"]]
    by_path = resolve(tiny_config(f"privacy.parent={release} {base}"))
    assert by_path.parent == parts
    facts = finetuning_facts(by_path)
    total = float(facts["expected epsilon, with what was spent before"].split(" at delta ")[0])
    assert total == pytest.approx(facts["expected epsilon"] + second["epsilon"], rel=1e-5)

    # refused if a later run has written to the parent's output folder: the later run's epsilon would count
    for made, taken in ((second["run_id"], True), (own.run_id, False)):
        tags = {"output": "runs/two/release", "run_id_of_adapter": made}
        monkeypatch.setattr("dp_lora.tracking.lookup.find_run", lambda *_, tags=tags: {"tags": tags})
        monkeypatch.setattr("dp_lora.tracking.find_run", lambda *_, tags=tags: {"tags": tags})
        monkeypatch.setattr("dp_lora.cli.adapters.ROOT", house)
        by_id = tiny_config(f"privacy.parent={'a' * 32} {base}")
        if taken:
            assert resolve(by_id).parent == parts
        else:
            with pytest.raises(InputError, match=r"^privacy.parent=a+: .*holds another run's adapter by now"):
                resolve(by_id)

    # resuming with another parent, or without one, is refused; a parent's path and its run id give one binding
    for others in ((), (ReleaseCost(0.1, 1e-3, run_id=own.run_id),)):
        with pytest.raises(InputError, match="with other parent; a ledger"):
            run(house, "runs/two", parent=others)
    assert binding(config, "d", "b", "cpu", parts) == binding(tiny_config(), "d", "b", "cpu", parts)

    # a parent on other data is named; one on the same data, or on unknown data, is not
    data = read_json(house / "runs/two/plan.json")["bound"]["data"]
    assert of_other_data(house / "runs", parts, data) == []
    assert of_other_data(house / "nowhere", parts, "other") == []
    assert of_other_data(house / "runs", parts, "other") == [str(house / "runs" / name) for name in ("one", "two")]
    # no warning about ledgers whose epsilon is already counted
    assert len(other_ledgers(house / "runs", house / "runs/three", data)) == 2
    assert other_ledgers(house / "runs", house / "runs/three", data, parts) == []


def test_a_private_base_counts_once_beside_a_parent_that_started_from_it(house):
    make_base(house / "base2", tiny_config(), "private-dp")
    path = house / "base2" / "model.json"
    before = {"epsilon": 2.0, "delta": 1e-4, "unit": "picture", "relation": "add-or-remove-one"}
    write_json(path, {**json.loads(path.read_text()), "privacy": before})
    first = read_json(run(house, "one", base="base2") / "privacy.json")
    parts = parent_parts(first, plan_of(), "privacy.parent=one")
    assert [part.base is None for part in parts] == [False, True]
    second = read_json(run(house, "two", base="base2", parent=parts) / "privacy.json")
    assert ["base" in part for part in second["parts"]] == [True, False, False]
    assert second["epsilon"] == pytest.approx(first["epsilon"] + second["accountants"]["epsilon"])
    assert second["delta"] == pytest.approx(2e-3 + 1e-4)


def test_deltas_that_reach_1_are_refused_before_anything_is_spent(house):
    with pytest.raises(InputError, match="must be below 1"):
        run(house, "run", parent=(ReleaseCost(1.0, 0.9995, run_id="a"),))
    assert not (house / "run" / "ledger.jsonl").exists()


def test_a_parent_that_is_no_adapter_or_without_an_epsilon_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"privacy.parent=/nowhere: no such path"):
        resolve(tiny_config("privacy.parent=/nowhere"))
    with pytest.raises(InputError, match=r"privacy.parent=.*: holds no adapter"):
        resolve(tiny_config(f"privacy.parent={tmp_path}"))
    for without in ("privacy.eps=inf", "privacy.accounting=published privacy.k=2"):
        with pytest.raises(InputError, match=r"privacy.parent=x: must be null"):
            tiny_config(f"privacy.parent=x {without}")


def test_a_run_on_the_adapter_shows_the_sum_and_keeps_the_adapter_s_own_targets():
    from dp_lora.cli.common import Call
    from dp_lora.tracking.description import Description

    stated = statement_of(FIRST, SECOND, target_epsilon=3.0, target_delta=1e-6, statement="")
    text = Description("sample", "", "x", privacy=stated).markdown()
    assert "Sum over 2 releases; others on the same data add up" in text
    assert text.startswith("**Privacy:** epsilon 5, delta 1.1e-05. ")
    config = Call("sample", tiny_config(), None, False).of_adapter(stated, 2).config
    assert (config.privacy.eps, config.privacy.delta) == (3.0, 1e-6)
