"""Checks 5, 8, 10, 11, 12 of private fine-tuning: moved weights, release, resume, budget, and refusals."""

import json
import math
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dp_lora.data.layout import read_dataset
from dp_lora.data.pixels import to_pixels
from dp_lora.errors import InputError
from dp_lora.files import read_json, write_json
from dp_lora.models.autoencoder import encode
from dp_lora.models.folder import load_model
from dp_lora.privacy.accounting import spent
from dp_lora.privacy.ledger import Ledger
from dp_lora.privacy.plan import PrivacyPlan
from dp_lora.release import privacy_statement
from dp_lora.training import finetune as module
from dp_lora.training.finetune import may_step, units_of
from dp_lora.training.run_folder import binding, binding_digest, open_run_folder, other_ledgers
from tests.support.finetuning import CPU, Crash, Heard, house, run, seed_file, weights
from tests.support.tiny import make_base, tiny_config, tiny_dataset

__all__ = ["house"]


def test_a_release_holds_adapter_statement_and_card_and_nothing_else(house):
    release = run(house, "run")
    assert release.name == "release"
    files = sorted(p.relative_to(release).as_posix() for p in release.rglob("*") if p.is_file())
    assert files == [
        "README.md", "class_embedding.safetensors", "model.json", "peft/adapter_config.json",
        "peft/adapter_model.safetensors", "privacy.json", "pytorch_lora_weights.safetensors",
    ]  # fmt: skip
    statement = json.loads((release / "privacy.json").read_text())
    assert 0.9 * 10 < statement["epsilon"] <= 10
    assert statement["steps"] == 5
    assert statement["relation"] == "add-or-remove-one"
    assert f"({statement['epsilon']:.6g}, 0.001)" in (release / "README.md").read_text()


def test_a_release_of_automatic_clipping_says_so_and_states_the_epsilon_of_flat_clipping(house):
    release = run(house, "run", "privacy.clipping=automatic")
    statement, plan = read_json(release / "privacy.json"), read_json(house / "run" / "plan.json")["plan"]
    assert (statement["clipping"], plan["clipping"]) == ("automatic", "automatic")
    assert "(automatic clipping)" in (release / "README.md").read_text()
    assert '"clipping": "automatic"' in (house / "run" / "ledger.jsonl").read_text()
    flat = spent(replace(PrivacyPlan.from_json(plan), clipping="flat"), 5)
    assert statement["epsilon"] == pytest.approx(flat.epsilon)
    with pytest.raises(InputError, match="clipping"):
        run(house, "run", "privacy.clipping=flat")


def test_a_release_and_its_card_name_the_audits_of_its_code_or_say_that_there_was_none(house):
    card, statement = "README.md", "privacy.json"
    release = run(house, "run")
    assert json.loads((release / statement).read_text())["audits"] == []
    assert "not audited with this code" in (release / card).read_text()
    number = {"value": 1.0, "half": 0.01, "right": 1.0}
    found = {
        "date": "2025-01-01", "code": "c" * 64, "target_epsilon": 3.0, "delta": 1e-5, "canaries": 1000,
        "confidence": 0.95, "refuted": False, "bound": {"epsilon": 0.8}, "claimed": 2.998, "ceiling": 4.47,
        "noise": number, "lag": {**number, "value": 0.0}, "jump": number, "divisor": number,
    }  # fmt: skip
    release = run(house, "audited", audits=[found, {**found, "refuted": True}])
    assert json.loads((release / statement).read_text())["audits"] == [found, {**found, "refuted": True}]
    text = (release / card).read_text()
    assert (
        "Audit of 2025-01-01 at epsilon 3, delta 1e-05 (code cccccccccccc, 1000 canaries, 95%): not refuted; " in text
    )
    assert "epsilon at least 0.8 of the claimed 2.998 (perfect guesses would give 4.47); noise 1.000 ± 0.010" in text
    assert "95%): REFUTED; " in text


def test_only_the_named_parameters_change(house):
    from dp_lora.training.finetune import make_adapter

    config = tiny_config("lora.train=B privacy.eps=inf")
    trained_model = []
    release = run(house, "run", "lora.train=B privacy.eps=inf", keep=trained_model)
    start = make_adapter(config, load_model(house / "base"), CPU)
    after = trained_model[0].denoiser.state_dict()
    for name, value in start.denoiser.state_dict().items():
        assert torch.equal(value, after[name]) is ("lora_B" not in name), name
    trained = weights(release)
    for name, value in start.denoiser.state_dict().items():
        key = f"base_model.model.{name.replace('.default', '')}"
        if "lora_A" in name:
            assert torch.equal(trained[key], value), name
        if "lora_B" in name:
            assert not torch.equal(trained[key], value), name
    assert not torch.equal(trained["embedding"], start.embedding)


def test_without_noise_every_b_has_a_gradient_at_once_and_every_a_soon_after(house):
    """On public data and without noise every trained weight moves, so under privacy no weight is noise alone."""
    adapter = run(house, "run", "privacy.eps=inf lora.train=AB privacy.epochs=1")
    assert adapter.name == "not-private"
    from dp_lora.training.finetune import make_adapter

    start = make_adapter(tiny_config(), load_model(house / "base"), CPU).denoiser.state_dict()
    for name, value in weights(adapter).items():
        if "lora" in name:
            key = name.removeprefix("base_model.model.").replace(".weight", ".default.weight")
            assert not torch.equal(value, start[key]), name


@pytest.mark.parametrize("broken", ["denoiser", "class_embedding"])
def test_a_base_with_a_nan_or_an_infinity_is_refused_before_a_step_is_spent(broken, house, monkeypatch):
    load = load_model

    def loaded(*of):
        model = load(*of)
        (model.embedded() if broken == "class_embedding" else model.denoiser.conv_in.weight)[0] = -math.inf
        return model

    monkeypatch.setattr("tests.support.finetuning.load_model", loaded)
    with pytest.raises(InputError, match=rf"its weights hold NaN or infinity \({'class_e|conv_in'}"):
        run(house, "run", "train.grid_every=0")
    assert not (house / "run" / "ledger.jsonl").exists()


def test_eps_inf_makes_no_release_and_no_epsilon(house):
    heard = Heard()
    adapter = run(house, "run", "privacy.eps=inf", heard)
    statement = json.loads((adapter / "privacy.json").read_text())
    assert statement["private"] is False
    assert "epsilon" not in statement
    assert "epsilon" not in heard.metrics
    assert not (house / "run" / "release").exists()
    assert "keep this adapter" in (adapter / "README.md").read_text()


def test_neighbours_release_equal_files_apart_from_weights_and_run_id(house):
    """One more picture changes no divisor, no configuration, and no byte of the release except the weights."""
    tiny_dataset(house / "more", n=42)
    one, other = run(house, "one"), run(house, "other", data="more")
    assert (
        len(read_dataset(house / "more", ["x", "y"], "train"))
        == len(read_dataset(house / "data", ["x", "y"], "train")) + 1
    )
    for path in sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file()):
        if path.suffix == ".safetensors":
            a, b = load_file(one / path), load_file(other / path)
            assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
        elif path.name == "privacy.json":
            a, b = (json.loads((folder / path).read_text()) for folder in (one, other))
            assert a.pop("run_id") != b.pop("run_id")
            assert a["parts"][0].pop("run_id") != b["parts"][0].pop("run_id")
            assert a.pop("ledger_head") != b.pop("ledger_head")  # it depends on a random id: see test_privacy_ledger.py
            assert a == b
        else:
            assert (one / path).read_bytes() == (other / path).read_bytes(), path
    plans = [json.loads((house / name / "plan.json").read_text())["plan"] for name in ("one", "other")]
    assert plans[0] == plans[1]


def test_the_update_is_the_noisy_sum_over_a_public_divisor(house, monkeypatch):
    taken = []
    real = module.Averaged.step
    monkeypatch.setattr(module.Averaged, "step", lambda self, g, f: (taken.append(dict(g)), real(self, g, f)))
    sums = []
    noisy = module.noisy_sum
    monkeypatch.setattr(module, "noisy_sum", lambda *a: (sums.append(noisy(*a)), sums[-1])[1])
    run(house, "run")
    for gradient, (total, _) in zip(taken, sums, strict=True):
        for name in total:
            assert torch.equal(gradient[name], total[name] / 8.0)


def test_fresh_runs_differ_and_reproducible_ones_are_equal_bit_for_bit(house):
    a, b = weights(run(house, "a")), weights(run(house, "b"))
    assert any(not torch.equal(a[name], b[name]) for name in a)
    seeded = seed_file(house)
    c, d = weights(run(house, "c", seeded)), weights(run(house, "d", seeded))
    assert all(torch.equal(c[name], d[name]) for name in c)


@pytest.mark.parametrize("levers", ["", "train.noise_debias=0.5 train.tail_average=0.6 privacy.clipping=automatic"])
def test_a_reproducible_run_that_crashed_and_resumed_equals_an_unbroken_one_bit_for_bit(house, monkeypatch, levers):
    seeded = seed_file(house) + f" train.checkpoint_every=2 {levers}"
    unbroken = weights(run(house, "unbroken", seeded))
    with pytest.raises(Crash):
        run(house, "broken", seeded, stop_before=3, monkeypatch=monkeypatch)
    resumed = run(house, "broken", seeded)
    assert all(torch.equal(unbroken[name], value) for name, value in weights(resumed).items())
    assert json.loads((resumed / "privacy.json").read_text())["steps"] == 5


def test_a_fresh_run_that_lost_steps_counts_them_and_never_passes_its_budget(house, monkeypatch):
    config = "train.checkpoint_every=2"
    with pytest.raises(Crash):
        run(house, "run", config, stop_before=3, monkeypatch=monkeypatch)
    heard = Heard()
    release = run(house, "run", config, heard)
    statement = json.loads((release / "privacy.json").read_text())
    # step 2 was taken, lost and taken again, so the ledger has five lines and the weights four steps
    assert statement["steps"] == 5
    assert statement["epsilon"] <= 10
    assert any("stopped at step 4 of 5" in line for line in heard.lines)
    assert len((house / "run" / "ledger.jsonl").read_text().splitlines()) == 5


def test_a_resume_draws_anew_where_randomness_is_fresh_and_its_release_tells_the_branch(house, monkeypatch):
    """Two resumed runs of one checkpoint differ: it stores no random state. Another machine knows nothing of either."""
    with pytest.raises(Crash):
        run(house, "one", stop_before=2, monkeypatch=monkeypatch)
    shutil.copytree(house / "one", house / "elsewhere" / "one")
    heard, moved = Heard(), Heard()
    one, two = run(house, "one", events=heard), run(house, "elsewhere/one", events=moved)
    a, b = weights(one), weights(two)
    assert any(not torch.equal(a[name], b[name]) for name in a)
    a, b = read_json(one / "privacy.json"), read_json(two / "privacy.json")
    assert a.pop("ledger_head") != b.pop("ledger_head")
    assert a == b  # without heads both have one run id, and nothing shows that 8 steps were taken, not 5
    assert "this place has not seen this ledger before" in moved.lines[1]
    assert not any("has not seen" in line for line in heard.lines)


def test_a_folder_that_was_copied_finished_restored_and_finished_again_is_refused_at_the_restore(house, monkeypatch):
    with pytest.raises(Crash):
        run(house, "run", stop_before=2, monkeypatch=monkeypatch)
    shutil.copytree(house / "run", house / "backup")
    run(house, "run")
    shutil.copytree(house / "run", house / "finished")
    shutil.rmtree(house / "run")
    (house / "backup").rename(house / "run")
    with pytest.raises(InputError, match=r"ledger\.jsonl: holds 2 lines, but 5 were written here: it is an older copy"):
        run(house, "run")
    # another name does not make it another run
    (house / "run").rename(house / "other")
    with pytest.raises(InputError, match="holds 2 lines, but 5"):
        run(house, "other")
    assert run(house, "finished").name == "release"  # the newest copy counts, wherever it lies


@pytest.mark.parametrize("replay", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_folder_that_lost_ledger_checkpoints_and_release_but_not_its_plan_is_refused(house, replay):
    settings = seed_file(house) if replay else ""
    run(house, "run", settings)
    for name in ("checkpoints", "release"):
        shutil.rmtree(house / "run" / name)
    (house / "run" / "ledger.jsonl").unlink()
    with pytest.raises(InputError, match="holds 0 lines, but 5 were written here"):
        run(house, "run", settings)
    assert not (house / "run" / "ledger.jsonl").exists()


def test_a_lost_folder_begins_another_run_but_for_a_replay_whose_noise_would_be_the_same(house):
    first = read_json(run(house, "run") / "privacy.json")
    shutil.rmtree(house / "run")
    second = read_json(run(house, "run") / "privacy.json")
    assert first["run_id"] != second["run_id"]
    run(house, "replay", seed_file(house))
    shutil.rmtree(house / "replay")
    with pytest.raises(InputError, match="steps of this replay were taken here, and their ledger is gone"):
        run(house, "replay", seed_file(house))
    assert not (house / "replay" / "plan.json").exists()


def test_a_replay_is_taken_over_again_in_its_folder_with_the_same_release(house):
    """As in `make reproduce`: plan and ledger stay, every step runs again, and the release is the same."""
    settings = seed_file(house)
    release = run(house, "run", settings)
    before = {path.relative_to(release): path.read_bytes() for path in release.rglob("*") if path.is_file()}
    for name in ("checkpoints", "release"):
        shutil.rmtree(house / "run" / name)
    run(house, "run", settings)
    assert {path.relative_to(release): path.read_bytes() for path in release.rglob("*") if path.is_file()} == before
    assert (house / "run" / "ledger.jsonl").read_bytes().count(b"\n") == 10


def test_a_line_that_is_lost_before_the_first_checkpoint_is_seen(house, monkeypatch):
    settings = "train.checkpoint_every=5"
    with pytest.raises(Crash):
        run(house, "run", settings, stop_before=3, monkeypatch=monkeypatch)
    assert not (house / "run" / "checkpoints").exists()
    ledger = house / "run" / "ledger.jsonl"
    ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(InputError, match="holds 2 lines, but 3 were written here"):
        run(house, "run", settings)


def test_a_finished_run_trains_and_spends_nothing_when_called_again(house):
    release = run(house, "run")
    before, lines = weights(release), (house / "run" / "ledger.jsonl").read_bytes()
    heard = Heard()
    run(house, "run", events=heard)
    assert all(torch.equal(before[name], value) for name, value in weights(release).items())
    assert (house / "run" / "ledger.jsonl").read_bytes() == lines
    # no record may say that the data are the same as before
    assert any(line.startswith("terminal alone: ") and "finished" in line for line in heard.lines)


def content_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("stop", [1, pytest.param(None, marks=pytest.mark.slow)])
def test_resume_never_refuses_a_folder_that_holds_steps_and_overwrites_nothing(house, monkeypatch, stop):
    never = "train.resume=never"
    if stop is None:
        run(house, "run", never)  # an empty folder is no obstacle
    else:
        with pytest.raises(Crash):
            run(house, "run", never, stop_before=stop, monkeypatch=monkeypatch)
    before = content_of(house / "run")
    with pytest.raises(InputError, match=rf"^train\.resume=never: .*/run holds {stop or 5} steps"):
        run(house, "run", never)
    assert content_of(house / "run") == before
    assert run(house, "run").name == "release"  # auto resumes


@pytest.mark.parametrize(
    "change",
    [
        "privacy.eps=5",
        pytest.param("privacy.max_grad_norm=0.1", marks=pytest.mark.slow),
        pytest.param("privacy.batch_size=4", marks=pytest.mark.slow),
        pytest.param("privacy.k=2", marks=pytest.mark.slow),
        pytest.param("train.lr=0.1", marks=pytest.mark.slow),
    ],
)
def test_a_changed_plan_is_refused_and_never_overwritten(house, monkeypatch, change):
    with pytest.raises(Crash):
        run(house, "run", stop_before=2, monkeypatch=monkeypatch)
    before = (house / "run" / "plan.json").read_bytes()
    with pytest.raises(InputError, match=change.split("=")[0].split(".")[1]):
        run(house, "run", change)
    assert (house / "run" / "plan.json").read_bytes() == before


def test_guidance_on_a_base_without_a_null_row_is_refused_before_any_work(house):
    from dp_lora.cli.finetuning import resolve

    path, base = house / "base" / "model.json", f"model.base={house / 'base'}"
    for null_row in (True, False):
        write_json(path, {**read_json(path), "null_row": null_row})
        resolve(tiny_config(f"sampling.guidance_scale=1 {base}"))
        if null_row:
            resolve(tiny_config(f"sampling.guidance_scale=2 {base}"))
    with pytest.raises(InputError, match=r"sampling\.guidance_scale=2: the base has no null row"):
        resolve(tiny_config(f"sampling.guidance_scale=2 {base}"))


def test_a_base_of_other_settings_is_as_one_that_is_not_there_for_a_command_that_makes_it_anew(house, monkeypatch):
    from dp_lora.cli import finetuning
    from dp_lora.cli.finetuning import resolve

    path, config = house / "base" / "model.json", tiny_config(f"model.base={house / 'base'}")
    there = resolve(config, remade=True)
    assert there.base == house / "base"
    write_json(path, {**read_json(path), "size": 64, "config": {"ldm": {**asdict(config.ldm), "epochs": 7.0}}})
    with pytest.raises(InputError, match=r"^data\.size=16, data\.channels=1: the base is for pictures of 64 pixels"):
        resolve(config)
    with pytest.raises(InputError, match=r"the base is for pictures of 64 pixels"):
        resolve(config, remade=True)  # no stage makes a folder from elsewhere
    monkeypatch.setattr(finetuning, "is_made_here", lambda _: True)
    made = resolve(config, remade=True)
    assert not made.base.exists()
    assert (made.base_name, made.shapes.denoiser) == (there.base_name, there.shapes.denoiser)
    write_json(path, {**read_json(path), "config": json.loads(json.dumps({"ldm": asdict(config.ldm)}))})
    with pytest.raises(InputError, match=r"the base is for pictures of 64 pixels"):
        resolve(config, remade=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 20),
        pytest.param("unit", "person", marks=pytest.mark.slow),
        pytest.param("sample_rate", 0.5, marks=pytest.mark.slow),
        pytest.param("expected_batch", 1.0, marks=pytest.mark.slow),
        pytest.param("noise_multiplier", 0.9, marks=pytest.mark.slow),
    ],
)
def test_a_kept_plan_that_is_not_its_configuration_s_is_refused_before_a_step(house, monkeypatch, field, value):
    """A changed plan.json would state a false guarantee: for example a person's epsilon with a picture's clip."""
    with pytest.raises(Crash):
        run(house, "run", stop_before=0, monkeypatch=monkeypatch)
    path = house / "run" / "plan.json"
    content = read_json(path)
    assert content["plan"][field] != value
    write_json(path, {**content, "plan": {**content["plan"], field: value}})
    with pytest.raises(InputError, match=rf"plan\.json: its plan has another {field} than"):
        run(house, "run")
    assert not (house / "run" / "ledger.jsonl").exists()
    sigma = content["plan"]["noise_multiplier"] * 1.009  # another version of the accountants might find this
    write_json(path, {**content, "plan": {**content["plan"], "noise_multiplier": sigma}})
    assert read_json(run(house, "run") / "privacy.json")["noise_multiplier"] == sigma


def test_a_plan_that_passes_its_target_is_refused_at_the_start_and_at_the_release(house, monkeypatch):
    """Another version of the accountants might find this noise, but it is too small."""
    with pytest.raises(Crash):
        run(house, "run", stop_before=0, monkeypatch=monkeypatch)
    path = house / "run" / "plan.json"
    content = read_json(path)
    sigma = content["plan"]["noise_multiplier"] * 0.991
    write_json(path, {**content, "plan": {**content["plan"], "noise_multiplier": sigma}})
    with pytest.raises(InputError, match=r"plan\.json: noise_multiplier=.* gives epsilon 10\.\d+ after 5 steps, above"):
        run(house, "run")
    assert not (house / "run" / "ledger.jsonl").exists()
    # refused after fewer steps too: such a plan must never start
    plan, config = PrivacyPlan.from_json(read_json(path)["plan"]), tiny_config()
    assert spent(plan, 3).epsilon < 10
    for steps in (3, 5):
        with pytest.raises(InputError, match="above the target 10: nothing is trained or released so"):
            privacy_statement(plan, steps, "id", "head", config)
    whole = replace(plan, noise_multiplier=content["plan"]["noise_multiplier"])
    assert privacy_statement(whole, 5, "id", "head", config)["epsilon"] <= 10


def test_other_data_in_the_same_folder_are_refused(house, monkeypatch):
    tiny_dataset(house / "more", n=42)
    with pytest.raises(Crash):
        run(house, "run", stop_before=2, monkeypatch=monkeypatch)
    with pytest.raises(InputError, match="other data"):
        run(house, "run", data="more")


def test_a_ledger_without_its_plan_is_refused(house):
    run(house, "run")
    (house / "run" / "plan.json").unlink()
    with pytest.raises(InputError, match="no plan"):
        run(house, "run")


def test_two_writers_on_one_run_are_refused(house):
    config = tiny_config()
    bound = {"config": {}, "data": "d", "base": "b"}
    second = open_run_folder(house / "run", config, bound)
    with open_run_folder(house / "run", config, bound), pytest.raises(InputError, match="is writing there"), second:
        pass
    with open_run_folder(house / "run", config, bound):
        shutil.copytree(house / "run", house / "copy")
        with (
            pytest.raises(InputError, match="copy: another process is writing to a copy of it"),
            open_run_folder(house / "copy", config, bound),
        ):
            pass
    with open_run_folder(house / "copy", config, bound):
        pass


def test_other_ledgers_on_the_same_data_are_named(house):
    run(house, "runs/one")
    digest = read_dataset(house / "data", ["x", "y"], "train").digest()
    (line,) = other_ledgers(house / "runs", house / "runs" / "two", digest)
    assert "runs/one" in line
    assert "epsilon" in line
    assert other_ledgers(house / "runs", house / "runs" / "one", digest) == []
    assert other_ledgers(house / "runs", house / "runs" / "two", "other data") == []
    ledger = house / "runs/one/ledger.jsonl"
    ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:2]))
    (line,) = other_ledgers(house / "runs", house / "runs" / "two", digest)
    assert "nobody knows how much" in line  # a mutant that reads the ledger alone states 2 steps


@pytest.mark.parametrize("status", ["unknown", "non-private", "private-dp"])
def test_a_base_without_a_bound_is_refused_before_anything_is_spent(house, status):
    make_base(house / "base2", tiny_config(), status)
    with pytest.raises(InputError, match=f"privacy_status {status}"):
        run(house, "run", base="base2")
    assert not (house / "run" / "ledger.jsonl").exists()
    assert run(house, "free", "privacy.eps=inf", base="base2").name == "not-private"


def test_what_the_base_spent_before_is_added(house):
    make_base(house / "base2", tiny_config(), "private-dp")
    path = house / "base2" / "model.json"
    before = {"epsilon": 2.0, "delta": 1e-4, "unit": "picture", "relation": "add-or-remove-one"}
    wrongs = [{"epsilon": -4.0}, {"epsilon": math.nan}, {"delta": -1}, {"unit": "person"}, {"relation": "replace-one"}]
    for number, wrong in enumerate(wrongs):
        path.write_text(json.dumps({**json.loads(path.read_text()), "privacy": {**before, **wrong}}))
        with pytest.raises(InputError, match="its model"):
            run(house, f"run{number}", base="base2")
    path.write_text(json.dumps({**json.loads(path.read_text()), "privacy": before}))
    statement = json.loads((run(house, "run", base="base2") / "privacy.json").read_text())
    assert statement["epsilon"] == pytest.approx(statement["accountants"]["epsilon"] + 2.0)
    assert statement["delta"] == pytest.approx(1e-3 + 1e-4)


def test_binding_digest_changes_with_plan_and_data_and_not_with_the_micro_batch():
    def digest(overrides="", data="d"):
        return binding_digest(binding(tiny_config(overrides), data, "b", "cpu"))

    assert digest() == digest("compute.physical_batch_size=3") == digest("train.resume=never")
    assert (
        len({digest(), digest("privacy.eps=3"), digest(data="e"), digest("train.lr=1"), digest("privacy.eps=inf")}) == 5
    )


def test_persons_are_units_with_all_their_pictures():
    assert units_of(4, ["b", "a", "b", "c"], "person") == [[1], [0, 2], [3]]
    assert units_of(2, None, "picture") == [[0], [1]]
    with pytest.raises(InputError, match="person"):
        units_of(2, None, "person")
    for persons in (["Ann", "Bo", "ann"], ["1", "Bo", "01"], ["Ann", "nan", "nan"]):
        with pytest.raises(InputError, match="person") as caught:
            units_of(3, persons, "person")
        assert caught.value.public != str(caught.value)


def test_the_step_that_would_pass_the_target_is_refused(house):
    from tests.support.tiny import no_privacy, plan_of

    assert may_step(plan_of(steps=3), 2, replay=False)
    assert not may_step(plan_of(steps=3), 3, replay=False)
    assert may_step(plan_of(steps=3), 3, replay=True)
    assert may_step(no_privacy(steps=3), 99, replay=False)


def test_a_person_with_k_draws_spans_micro_batches_and_trains(house, monkeypatch):
    """A unit may have more rows than the physical batch: they are added up, then clipped once."""
    norms = []
    real = module.noisy_sum

    def spy(*arguments):
        total, facts = real(*arguments)
        if facts.units:  # an empty draw has no mean
            norms.append(facts.mean_norm)
        return total, facts

    monkeypatch.setattr(module, "noisy_sum", spy)
    release = run(house, "run", "privacy.k=5 compute.physical_batch_size=3")
    assert all(math.isfinite(norm) for norm in norms)
    assert json.loads((release / "privacy.json").read_text())["k"] == 5


def test_epsilon_grows_over_steps_and_ends_at_the_statement(house):
    heard = Heard()
    release = run(house, "run", events=heard)
    curve = heard.metrics["epsilon"]
    assert curve == sorted(curve)
    assert curve[-1] == pytest.approx(json.loads((release / "privacy.json").read_text())["epsilon"])
    assert all(name.startswith("private/") or name == "epsilon" for name in heard.metrics)


def test_both_curves_lie_beside_the_release_and_without_a_guarantee_have_headers_alone(house):
    from dp_lora.training.result import curves

    release = run(house, "run")
    statement = json.loads((release / "privacy.json").read_text())
    over_steps, over_delta = ([line.split(",") for line in text.splitlines()] for text in curves(release).values())
    assert (over_steps[0], over_delta[0]) == (["step", "epsilon"], ["delta", "epsilon"])
    assert float(over_steps[-1][1]) == pytest.approx(statement["epsilon"], rel=1e-5)
    points = {float(delta): float(epsilon) for delta, epsilon in over_delta[1:]}
    assert 0.98 * statement["epsilon"] < points[1e-3] <= statement["epsilon"]
    free = curves(run(house, "free", "privacy.eps=inf"))
    assert free == {"epsilon.csv": "step,epsilon\n", "epsilon_of_delta.csv": "delta,epsilon\n"}


def test_latents_of_others_do_not_enter_a_picture_s_own(house):
    """Latents use no statistic of the private data: a picture's latent does not depend on the pictures beside it."""
    model = load_model(house / "base")
    images = read_dataset(house / "data", ["x", "y"], "train").images(slice(None))
    with torch.no_grad():
        alone = encode(model.vae, to_pixels(images[:1]))
        beside = encode(model.vae, to_pixels(np.concatenate([images[:1], 255 - images[1:]])))
    torch.testing.assert_close(beside[:1], alone, rtol=1e-5, atol=1e-5)


def test_ledger_and_plan_are_read_back_from_the_folder_alone(house):
    run(house, "run")
    plan = PrivacyPlan.from_json(json.loads((house / "run" / "plan.json").read_text())["plan"])
    assert Ledger(house / "run" / "ledger.jsonl").counted_steps(plan) == plan.steps == 5


def test_a_lost_or_shortened_ledger_is_refused_also_where_nothing_was_seen_of_it(house, monkeypatch):
    """A folder from another machine has no heads, but its checkpoint knows the number of lines."""
    with pytest.raises(Crash):
        run(house, "run", stop_before=3, monkeypatch=monkeypatch)
    ledger = house / "run" / "ledger.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join(lines[:2]))
    shutil.rmtree(house / ".heads")
    with pytest.raises(InputError, match="lost or was shortened"):
        run(house, "run")
    ledger.unlink()
    with pytest.raises(InputError, match="no ledger"):
        run(house, "run")


def test_lines_lost_at_the_end_are_seen_though_as_many_steps_are_left_as_were_taken(house, monkeypatch):
    """Steps that a crash lost count too: the checkpoint stores the ledger's count beside its own steps."""
    twice = "train.checkpoint_every=2 privacy.epochs=2"
    with pytest.raises(Crash):
        run(house, "run", twice, stop_before=3, monkeypatch=monkeypatch)
    with pytest.raises(Crash):
        run(house, "run", twice, stop_before=4, monkeypatch=monkeypatch)
    ledger = house / "run" / "ledger.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    assert len(lines) == 5  # step 2 was taken twice
    ledger.write_text("".join(lines[:4]))
    shutil.rmtree(house / ".heads")  # as in a folder that comes from another machine
    with pytest.raises(InputError, match="holds 4 steps, but 5 were taken"):
        run(house, "run", twice)


def test_a_run_of_other_code_is_not_gone_on_with(house, monkeypatch):
    """A corrected step must not vouch for the results of an older one."""
    from dp_lora.training import run_folder

    run(house, "run")
    monkeypatch.setattr(run_folder, "code_digest", lambda: "of a mended step")
    with pytest.raises(InputError, match="other code"):
        run(house, "run")


def test_a_working_folder_s_name_does_not_tell_who_is_in_the_data(tmp_path):
    from dp_lora.training.run_folder import keyed_folder

    bound = binding(tiny_config(), "d", "b", "cpu")
    here = keyed_folder(tmp_path / "here", bound)
    assert here == keyed_folder(tmp_path / "here", bound)
    assert here.name != keyed_folder(tmp_path / "there", bound).name
    assert here.name not in binding_digest(bound)
    assert (tmp_path / "here" / ".key").stat().st_mode & 0o077 == 0


def test_a_new_working_folder_and_the_key_of_its_name_are_on_the_disk_before_its_ledger(tmp_path, monkeypatch):
    from dp_lora import operator_key
    from dp_lora.training import run_folder

    synced = []
    real = run_folder.fsync
    for knows in (operator_key, run_folder):
        monkeypatch.setattr(knows, "fsync", lambda path: (synced.append(path), real(path)))
    bound = binding(tiny_config(), "d", "b", "cpu")
    runs = tmp_path / "runs"
    folder = run_folder.keyed_folder(runs, bound)
    assert synced[0].name.startswith(".key.")
    assert synced[1:] == [runs]
    with open_run_folder(folder, tiny_config(), bound):
        assert synced[2:] == [runs, folder]


def test_a_replay_is_bound_to_the_machine_that_makes_it_exact(house):
    seeded = seed_file(house)
    digests = {binding_digest(binding(tiny_config(seeded), "d", "b", device)) for device in ("cpu", "cuda")}
    assert len(digests) == 2


def test_a_replay_is_bound_to_the_model_and_the_instructions_of_its_cpu(house, monkeypatch):
    """A mutant with platform.processor() cannot tell CPUs apart: on most Linux systems that string is empty."""
    from dp_lora.training import run_folder

    seeded, digests = seed_file(house), []
    text = "processor\t: {}\nmodel name\t: {}\ncpu MHz\t\t: {}\nflags\t\t: {}\n\n"
    monkeypatch.setattr(run_folder, "CPUINFO", house / "cpuinfo")
    for parts in [
        (0, "one", 1000, "sse avx"),
        (1, "one", 999, "sse avx"),
        (0, "one", 1000, "sse"),
        (0, "two", 1, "sse"),
    ]:
        (house / "cpuinfo").write_text(text.format(*parts))
        digests.append(binding_digest(binding(tiny_config(seeded), "d", "b", "cpu")))
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
