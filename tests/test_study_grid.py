"""A study's YAML gives each member once and the cost of publishing all; a dry run by the real command line."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from dp_lora.config import ROOT, load
from dp_lora.errors import InputError
from dp_lora.files import write_json
from dp_lora.privacy.accounting import spent_by_all as spent_by_plans
from dp_lora.privacy.composition import ReleaseCost
from dp_lora.privacy.releases import all_releases
from dp_lora.study import grid
from dp_lora.study.audits import as_published, auditors, records_of
from dp_lora.study.grid import config_of, read_study, study_names
from dp_lora.study.member import member_command, stage_commands
from dp_lora.study.place import Record, places
from dp_lora.study.result import DONE, FAILED, RUNNING, WAITING
from tests.support.studies import audit_lines, configured
from tests.support.tiny import plan_of

HEAD = "config: mnist5k\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a study's file, and read its members."""
    monkeypatch.setattr(grid, "OWN", tmp_path)

    def written(text: str, overrides: str = "") -> grid.Grid:
        (tmp_path / "own.yaml").write_text(text, encoding="utf-8")
        return read_study("own", overrides)

    return written


def names(found: grid.Grid) -> list[str]:
    return [member.name for member in found.members]


def test_a_grid_is_the_product_of_its_values_and_of_its_seeds_in_the_order_of_the_file(write):
    group = "{name: rank, grid: {eps: [1, inf], lora.rank: [2, 8]}, seeds: [3]}"
    found = write(f"{HEAD}seeds: [0, 1]\ngroups: [{group}]\n")
    assert names(found) == [f"eps={eps} lora.rank={rank} seed=3" for eps in ("1", "inf") for rank in (2, 8)]
    last = found.members[-1]
    assert (last.settings, last.seed, last.group) == ({"privacy.eps": "inf", "lora.rank": "8"}, 3, "rank")
    config = config_of(last)
    assert (config.privacy.eps, config.lora.rank, config.experiment.seed) == (math.inf, 8, 3)
    assert len(write(HEAD + "seeds: [0, 1]\ngroups: [{name: epsilon, grid: {eps: [1, 5]}}]\n").members) == 4


def test_one_experiment_in_two_groups_is_one_member_of_the_first(write):
    text = HEAD + "groups:\n  - {name: epsilon, grid: {eps: [1, 10]}}\n  - {name: k, grid: {eps: [10.0], k: [1, 4]}}\n"
    found = write(text)
    assert names(found) == ["eps=1 seed=0", "eps=10 seed=0", "eps=10.0 k=4 seed=0"]
    assert [member.group for member in found.members] == ["epsilon", "epsilon", "k"]


def test_settings_of_the_study_and_overrides_hold_for_all_members_and_are_in_no_name(write):
    text = HEAD + "settings: {rank: 2, data.classes: ['0', '1']}\ngroups: [{name: epsilon, grid: {eps: [1]}}]\n"
    (member,) = write(text, "lora.rank=3 sampling.n=200").members
    assert member.name == "eps=1 seed=0"
    config = config_of(member)
    assert (config.lora.rank, config.sampling.n, config.data.classes) == (3, 200, ["0", "1"])


GROUP = "groups: [{name: epsilon, grid: {eps: [1]}}]\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (HEAD + "group: []\n", "group: unknown key; did you mean groups?"),
        (HEAD + "groups: [{name: a, grit: {eps: [1]}}]\n", "groups[1]: grit: unknown key; did you mean grid?"),
        (HEAD + "groups: [{name: a, grid: {epss: [1]}}]\n", "groups[1]: grid: epss: unknown key; did you mean eps"),
        (HEAD + "groups: [{name: a, grid: {lora.rnk: [1]}}]\n", "lora.rnk: unknown key; did you mean lora.rank"),
        (HEAD + "groups: [{name: a, grid: {eps: 1}}]\n", "groups[1]: grid: eps: must be a list of values"),
        (HEAD + "groups: [{name: a, grid: {seed: [1]}}]\n", "groups[1]: grid: seed: is set by seeds"),
        (HEAD + "groups: [{grid: {eps: [1]}}]\n", "groups[1]: name: must name the comparison"),
        (HEAD + "groups: [{name: a, grid: {eps: [-1]}}]\n", "groups[1]: eps=-1 seed=0: privacy.eps=-1.0: must be in"),
        (HEAD + "groups: [{name: a, grid: {ldm.epochs: [1]}}]\n", "ldm.epochs: all members share one base model"),
        (HEAD + "groups: [{name: a, grid: {data.size: [16]}}]\n", "data.size: all members share one base model"),
        ("groups: [{name: a, config: mnist6k}]\n", "config=mnist6k: no such experiment; did you mean mnist5k"),
        ("groups: [{name: a}]\n", "groups[1]: config: must name an experiment"),
        (HEAD + "seeds: 3\n" + GROUP, "seeds: must be a list of whole numbers"),
        (HEAD + "seeds: [a]\n" + GROUP, "seeds: must be a list of whole numbers"),
        (HEAD + "audit: [inf]\n" + GROUP, "audit: must be epsilons above 0 and below inf"),
        (HEAD + "groups: []\n", "groups: must be a list of groups"),
        ("- a\n", "must be keys with values"),
        ("a: [\n", "cannot be read"),
    ],
)
def test_what_a_file_says_wrong_is_one_line_that_names_the_place(write, text, line):
    with pytest.raises(InputError) as caught:
        write(text)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("configs/studies/own.yaml")


def test_a_study_that_is_not_there_and_bad_overrides_are_named(write):
    with pytest.raises(InputError, match="study=mnist6k: no such study; did you mean mnist5k"):
        read_study("mnist6k")
    with pytest.raises(InputError, match="must be the name of a study"):
        read_study("../x")
    with pytest.raises(InputError, match="the study's own file says which seeds"):
        write(HEAD + GROUP, "experiment.seed=1")


def test_the_studies_that_are_shipped_have_the_members_that_they_are_described_with():
    assert study_names() == ["celebahq", "emoji", "mnist", "mnist5k", "smoke", "standin", "text2image"]
    study = {member.config for member in read_study("celebahq").members}
    of_the_study = {p.stem for p in (ROOT / "configs").glob("celebahq-*.yaml")} - {"celebahq-eps10-effective-targets"}
    assert study == of_the_study
    assert len(read_study("celebahq").members) == 18
    assert {m.config for m in read_study("mnist").members} == {f"mnist32-class-dp-eps{eps}" for eps in (1, 5, 10)}
    mnist5k = read_study("mnist5k")
    of_epsilon = [(config_of(m).privacy.eps, m.seed) for m in mnist5k.members if m.group == "epsilon"]
    assert of_epsilon == [(eps, seed) for eps in (1, 3, 5, 10, math.inf) for seed in (0, 1, 2)]
    assert all(m.seed == 0 for m in mnist5k.members if m.group != "epsilon")
    of_emoji = [(config_of(m).privacy.eps, config_of(m).train.lr, m.seed) for m in read_study("emoji").members]
    assert of_emoji == [(eps, 0.02, seed) for eps in (10, math.inf) for seed in (0, 1, 2)] + [(10, 0.008, 0)]
    with pytest.raises(InputError, match=r"data\.n_public and model\.base missing"):
        read_study("text2image")
    given = "model.base=base data.path=pictures data.n_public=2000 sampling.prompts=sun"
    assert len(read_study("text2image", given).members) == 4


def test_members_that_draw_otherwise_are_one_release_and_others_are_not(write):
    text = HEAD + "groups:\n  - {name: a, grid: {sampling.eta: [0, 1]}}\n  - {name: b, grid: {k: [4]}}\n"
    first, second, other = places(write(text))
    assert first.release == second.release
    assert first.folder != second.folder
    assert other.release != first.release
    assert len({place.release for place in places(write(HEAD + "seeds: [0, 1]\n" + GROUP))}) == 2


def test_each_private_step_is_audited_once_at_each_epsilon_and_several_draws_also_as_the_released_code_clips(write):
    text = HEAD + (
        "groups:\n  - {name: epsilon, grid: {eps: [inf, 10, 5]}}\n"
        "  - {name: rank, grid: {rank: [2], k: [4]}}\n  - {name: k, grid: {k: [4]}}\n"
    )
    once = {"audit-eps1": {"privacy.eps": "1"}, "audit-eps3": {"privacy.eps": "3"}}
    apart = {f"{stage}-published": own | {"privacy.accounting": "published"} for stage, own in once.items()}
    found = write(f"{text}audit: [1, 3]\n")
    assert auditors(found, places(found)) == {2: once, 4: once | apart}
    unasked = write(text)
    assert auditors(unasked, places(unasked)) == {}


@pytest.mark.parametrize("setting", ["privacy.k=1", "privacy.eps=inf", "privacy.unit=person", "privacy.parent=before"])
def test_a_step_that_the_released_code_does_not_know_is_audited_as_it_is_alone(setting):
    assert as_published(load("mnist5k", {}, f"privacy.k=4 {setting}")) is None
    expected = load("mnist5k", {}, "privacy.k=4 privacy.accounting=published")
    assert as_published(load("mnist5k", {}, "privacy.k=4")) == expected


def test_records_of_audits_of_a_step_are_found_also_as_the_released_code_clips(tmp_path):
    settings = {"privacy.epochs": "1", "privacy.k": "4", "privacy.eps": "1"}
    path = tmp_path / "audits.jsonl"
    audit_lines(path, settings, {1.0: 0.1})
    audit_lines(path, settings | {"privacy.accounting": "published"}, {1.0: 0.7})
    audit_lines(path, settings | {"privacy.k": "2"}, {1.0: 0.2})
    config = configured("mnist5k", settings)
    start = SimpleNamespace(config=config, audits=path)
    assert [record["bound"]["epsilon"] for record in records_of([start, start], "c" * 64)] == [0.1, 0.7]


def test_the_physical_batch_decides_a_replay_alone(write):
    text = HEAD + "{}groups: [{{name: a, grid: {{compute.physical_batch_size: [4, 8]}}}}]\n"
    first, second = places(write(text.format("")))
    assert first.release == second.release
    first, second = places(write(text.format("settings: {privacy.reproducible: true, privacy.seed_file: x}\n")))
    assert first.release != second.release


def test_one_command_makes_a_whole_member_and_its_stages_hand_on_by_folders(tmp_path):
    found = read_study("smoke", "compute.device=cpu")
    words = ["study", "--study", "smoke", "--overrides", "compute.device=cpu", "--member", "3"]
    assert member_command(found, 3) == [sys.executable, "-m", "dp_lora", *words]
    commands = stage_commands(found.members[0], tmp_path, {})
    assert list(commands) == ["finetune", "sample", "fid"]
    audited = stage_commands(found.members[0], tmp_path, {"audit-eps1": {"privacy.eps": "1"}})
    assert list(audited) == ["audit-eps1", "finetune", "sample", "fid"]
    own = ["compute.device=cpu privacy.eps=1 experiment.seed=0", "--out", str(tmp_path / "audit-eps1")]
    assert (audited["audit-eps1"][3], audited["audit-eps1"][-3:]) == ("audit", own)
    assert audited["finetune"] == commands["finetune"]
    given = {stage: dict(zip(words[4::2], words[5::2], strict=True)) for stage, words in commands.items()}
    assert given["sample"]["--adapter"] == given["finetune"]["--out"] == str(tmp_path / "finetune")
    assert given["fid"]["--samples"] == given["sample"]["--out"] == str(tmp_path / "samples")
    assert {words["--overrides"] for words in given.values()} == {"compute.device=cpu privacy.eps=10 experiment.seed=0"}


def test_a_member_is_done_when_all_stages_are_recorded_and_lie_there(write, tmp_path):
    (place,) = places(write(HEAD + GROUP))
    place = replace(place, folder=tmp_path / "member")
    assert place.outcome().state == WAITING
    place.folder.mkdir()
    record = Record(inputs={"base": "b"})
    for stage, folder in (("finetune", "finetune"), ("sample", "samples"), ("fid", "evaluation")):
        assert not place.is_done(record)
        record = record.with_stage(stage, 2.0, "r" * 32, 1.5)
        assert not place.has(stage, record)  # recorded, but its folder is missing
        (place.folder / folder).mkdir()
    place.write(record)
    outcome = place.outcome()
    assert (outcome.state, outcome.peak_memory, sum(outcome.seconds.values())) == (DONE, 1.5, 6.0)
    assert place.outcome(running=True).state == RUNNING
    (place.folder / "evaluation").rmdir()
    write_json(place.folder / "member.json", vars(record) | {"reason": "fid: no"})
    assert (place.outcome().state, place.outcome().reason) == (FAILED, "fid: no")


def pld(*kinds: tuple[float, float, int], delta: float) -> float:
    """Epsilon of all steps together by Google's accountant, on a fine grid."""
    from dp_accounting.pld import privacy_loss_distribution

    total = None
    for rate, noise, steps in kinds:
        one = privacy_loss_distribution.from_gaussian_mechanism(
            noise, sampling_prob=rate, value_discretization_interval=1e-3
        ).self_compose(steps)
        total = one if total is None else total.compose(one)
    return total.get_epsilon_for_delta(delta)


def test_several_fine_tunings_compose_as_another_accountant_says():
    plans = [plan_of(sample_rate=0.1, noise_multiplier=noise, steps=150, delta=1e-5) for noise in (4.0, 1.5, 1.5, 0.9)]
    ours = all_releases(plans)
    kinds = [(plan.sample_rate, plan.noise_multiplier / plan.sensitivity, plan.steps) for plan in plans]
    theirs = pld(*kinds, delta=1e-5)
    assert ours.delta == 1e-5
    assert ours.epsilon == pytest.approx(theirs, rel=2e-3)
    alone = [spent_by_plans([plan], 1e-5).epsilon for plan in plans]
    assert max(alone) < ours.epsilon < sum(alone)


def test_one_fine_tuning_in_two_halves_costs_what_it_costs_whole():
    whole = plan_of(sample_rate=0.1, steps=100, delta=1e-5)
    halves = [replace(whole, steps=50), replace(whole, steps=50)]
    assert all_releases(halves) == all_releases([whole])


def test_what_was_spent_before_is_added_once_and_without_plans_it_is_all():
    plans = [plan_of(delta=1e-4), plan_of(delta=1e-5)]
    before = ReleaseCost(1.0, 1e-5, base="b")
    own, total = all_releases(plans), all_releases(plans, [before, before])
    assert own.delta == 1e-4
    assert total.epsilon == pytest.approx(own.epsilon + 1)
    assert total.delta == pytest.approx(1.1e-4)
    assert (all_releases([]).epsilon, all_releases([]).delta) == (0.0, 0.0)


def test_plans_without_a_guarantee_and_of_different_units_have_no_epsilon_together():
    endless = plan_of(noise_multiplier=0.0, max_grad_norm=math.inf, target_epsilon=math.inf)
    for plans, words in (([plan_of(), endless], "without a guarantee"), ([plan_of(), plan_of(unit="person")], "units")):
        with pytest.raises(InputError, match=words):
            all_releases(plans)


def dry_run(*arguments: str, store: Path) -> subprocess.CompletedProcess[str]:
    import os

    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{store}/mlflow.db"}
    environment.pop("MLFLOW_RUN_ID", None)
    command = [sys.executable, "-m", "entrypoints.study", *arguments, "--dry-run"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_a_dry_run_lists_members_time_memory_and_epsilon_and_touches_nothing(tmp_path):
    before = set(ROOT.rglob("*")) if not (ROOT / "runs").exists() else None
    done = dry_run("--study", "smoke", store=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("study: smoke: ")
    assert [line.split()[1] for line in lines[1:4]] == ["eps=10", "eps=inf", "eps=5"]
    assert lines[1].endswith("epsilon; makes audit-eps1")
    assert lines[3].endswith("k; makes audit-eps1, audit-eps1-published")
    assert lines[2].endswith("epsilon; without a guarantee: never to be published")
    (both,) = [line for line in lines if line.startswith("publishing all 2 private members: epsilon ")]
    assert 10 < float(both.split()[6]) < 20
    assert "at delta 0.001" in both
    assert "member 2: without a guarantee: never to be published" in lines
    assert any(line.startswith("estimated total, one member at a time: ") for line in lines)
    assert any(line.startswith("estimated total, on one NVIDIA H100") for line in lines)
    assert any(line.startswith("GPU memory, of member 1: ") for line in lines)
    assert lines[-1].startswith("would write: ")
    assert "runs/studies/smoke" in lines[-1]
    assert not list(tmp_path.iterdir())
    if before is not None:
        assert {path for path in set(ROOT.rglob("*")) - before if "__pycache__" not in path.parts} == set()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--study", "mnist6k"], "error: study=mnist6k: no such study; did you mean mnist5k"),
        (["--jobs", "0"], "error: jobs=0: must be a whole number of at least 1"),
        (["--study", "smoke", "--overrides", "lora.rnk=3"], "did you mean lora.rank"),
        (["--study", "smoke", "--overrides", "data.size=64"], "the base is for pictures of 16 pixels"),
    ],
)
def test_bad_input_of_the_real_command_is_one_line(arguments, line, tmp_path):
    done = dry_run(*arguments, store=tmp_path)
    assert done.returncode == 1
    (said,) = done.stderr.strip().splitlines()
    assert line in said
