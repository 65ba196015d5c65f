"""One base file, small overrides, one line for bad input, nothing executed."""

import sys
from dataclasses import replace

import pytest

from dp_lora.config import PARAMETERS, ROOT, config_names, flatten, load, read_resolved, write_resolved
from dp_lora.config.classes import class_names
from dp_lora.config.words import NO_KEY, OTHER_NAMES
from dp_lora.errors import InputError
from dp_lora.tracking.provenance import override_text


def error_of(*arguments, **options) -> str:
    with pytest.raises(InputError) as error:
        load(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("eps", "abc"), ("eps", "-1"), ("eps", "0"), ("eps", "nan"), ("rank", "0"), ("rank", "2.5"), ("k", "0"),
        ("delta", "0.00025"), ("delta", "1"), ("delta", "0"), ("delta", "1e-11"), ("batch_size", "0"),
        ("batch_size", "4001"),
        ("epochs", "0"), ("lr", "-1"), ("max_grad_norm", "0"), ("max_grad_norm", "inf"), ("seed", "-1"),
        ("k", "${oc.env:HOME}"),
    ],
)  # fmt: skip
def test_a_senseless_parameter_is_one_line_that_names_it_its_value_and_the_rule(parameter, value):
    message = error_of("mnist5k", {parameter: value})
    assert message.startswith(f"{parameter}={value}")
    assert "must be" in message or "not allowed" in message


@pytest.mark.parametrize(
    "name", ["nope", "../configs/mnist5k", "/etc/passwd", "a.yaml", "x; touch PWN", "", "base", ".."]
)
def test_a_config_that_is_no_experiment_s_name_is_refused(name):
    assert "config=" in error_of(name)


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ("train.foo=1", "unknown key"),
        ("foo.bar=1", "unknown key"),
        ("train.lr", "must be section.key=value"),
        ("train=1", "must be section.key=value"),
        ("train.lr=${oc.env:HOME}", "resolvers are not allowed"),
        ("experiment.description=${oc.env:HOME}", "resolvers are not allowed"),
        ("train.lr=word", "could not be converted"),
        ("train.betas=[0.9]", "two numbers"),
        ("train.betas=[0.9", "cannot be read"),
        ("train.tail_average=0", "null, or in (0, 1]"),
        ("privacy.clipping=none", "one of flat, automatic"),
        ("privacy.accounting=published privacy.clipping=automatic", "released code clips flat"),
        ("train.noise_debias=0", "null, or in [0.001, 1000]"),
        ("data.classes=[a,a]", "each once"),
        ("data.classes=[]", "at least one class"),
        ("privacy.eps=1e400", "inf is written inf"),
        ("lora.rank=1000000000", "from 1 to 1024"),
        ("lora.rank_schedule=linear", "lora.rank_last=null"),
        ("lora.targets=", "Incompatible value"),
        ("ldm.prediction_type=sample", "one of epsilon"),
        ("privacy.seed_file=x", "reproducible"),
        ("privacy.reproducible=true", "seed_file"),
        ("train.timestep_min=900 train.timestep_max=800", "below train.timestep_max"),
        ("ldm.attention=[true]", "one entry per"),
        ("evaluation.inception_sha256=abc", "64 hex digits"),
        ("data.duplicates=keep", "one of warn, refuse"),
        ("train.resume=sometimes", "auto, never, or an MLflow run id"),
        ("data.captions=true", "must be false: data.source=mnist5k has no captions"),
        ("data.caption_column=prompt", "with data.captions=true"),
    ],
)
def test_a_bad_override_is_one_line(overrides, part):
    assert part in error_of("mnist5k", {}, overrides)


@pytest.mark.parametrize(
    ("overrides", "meant"),
    [("train.lrr=1", "train.lr"), ("privcy.eps=1", "privacy.eps"), ("data.clases=[a]", "data.classes")],
)
def test_an_unknown_key_is_told_what_it_is_like(overrides, meant):
    assert f"unknown key; did you mean {meant}" in error_of("mnist5k", {}, overrides)


@pytest.mark.parametrize("name", [*OTHER_NAMES, *NO_KEY])
def test_a_name_of_diffusers_scripts_is_answered_by_its_key_or_why_none_is_needed(name):
    says = f"did you mean {OTHER_NAMES[name]}?" if name in OTHER_NAMES else f"no key is needed: {NO_KEY[name]}"
    assert f"; {says}" in error_of("mnist5k", {}, f"{name}=1")
    assert f"; {says}" in error_of("mnist5k", {}, f"ldm.{name}=1")


def test_the_names_of_diffusers_scripts_lead_to_keys_that_exist():
    assert set(OTHER_NAMES.values()) <= flatten(load("mnist5k")).keys()


def test_an_unknown_config_and_a_key_without_its_section_are_told_what_they_are_like():
    assert error_of("mnist5").startswith("config=mnist5: no such experiment; did you mean mnist5k")
    assert "there are autoencoder_kl" in error_of("nothing-like-it")
    assert error_of("mnist5k", {}, "n_publc=4").endswith("such as train.lr=0.02; did you mean .n_public?")


def test_blanks_inside_of_brackets_and_quotes_end_no_override():
    own = """data.classes=[cat, golden retriever]  data.path="my pictures" train.lr=0.5 train.betas=[0.8, 0.9]"""
    config = load("folder", {}, f"{own} data.n_public=2000 privacy.batch_size=200")
    assert (config.data.classes, config.data.path) == (["cat", "golden retriever"], "my pictures")
    assert (config.train.lr, config.train.betas) == (0.5, [0.8, 0.9])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.path", "my pictures"), ("data.path", 'a "b" c'), ("data.path", "it's"), ("data.path", "[a]"),
        ("data.classes", ["cat", "golden retriever"]), ("train.lr", 0.02),
    ],
)  # fmt: skip
def test_the_override_that_repeats_a_run_is_read_back_as_it_was(key, value):
    plain = "data.path=x data.classes=[a] data.n_public=2000 privacy.batch_size=200"
    others = " ".join(item for item in plain.split() if not item.startswith(key))
    config = load(
        "folder", {}, f'{key}={override_text(value)} {others} experiment.description="isn\'t" experiment.seed=7'
    )
    assert (flatten(config)[key], config.experiment.seed) == (value, 7)


def test_a_folder_of_one_s_own_needs_both_public_statements_and_shows_no_count():
    message = error_of("folder", {}, "data.path=somewhere")
    assert "data.classes" in message
    assert "data.n_public=NOMINAL" in message
    assert "data.path" in error_of("folder", {}, "data.classes=[a,b] data.n_public=1000 privacy.batch_size=100")


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ("data.classes=[]", "none only with data.captions or data.prompt"),
        ("data.classes=[] data.prompt=' '", "data.prompt= : must be null, or a text"),
        ("data.classes=[a,a] data.prompt=toy", "each class once"),
        ("data.classes=[] data.prompt=toy data.captions=true", "must stand alone"),
        ("data.classes=[a] data.prompt=toy data.prompts=[toy]", "must stand alone"),
        ("data.classes=[a,b] data.prompts=[toy]", "one prompt for each of data.classes"),
        ("data.classes=[a,b] data.prompts=[toy,'']", "one prompt for each of data.classes"),
    ],
)
def test_public_prompts_that_do_not_fit_the_classes_are_refused_in_one_line(overrides, part):
    assert part in error_of("folder", {}, f"data.path=somewhere data.n_public=1000 privacy.batch_size=100 {overrides}")


def test_pictures_of_one_public_prompt_need_no_classes():
    own = "data.path=somewhere data.n_public=1000 privacy.batch_size=100 data.prompt='a red toy'"
    config = load("text2image", {}, f"{own} data.captions=false model.base=mine")
    assert (config.data.classes, config.data.captions, config.data.prompt) == ([], False, "a red toy")
    assert load("folder", {}, f"{own} data.classes=[a]").data.prompt == "a red toy"


def test_pictures_with_captions_need_no_classes():
    own = "data.path=somewhere data.n_public=1000 privacy.batch_size=100 data.captions=true"
    config = load("folder", {}, f"{own} data.classes=[] data.caption_column=prompt")
    assert (config.data.classes, config.data.captions, config.data.caption_column) == ([], True, "prompt")
    assert load("folder", {}, f"{own} data.classes=[a]").data.caption_column is None
    assert "each class once" in error_of("folder", {}, f"{own} data.classes=[a,a]")
    assert "data.caption_column" in error_of("folder", {}, f"{own} data.classes=[] data.caption_column=''")


def test_a_dot_is_a_path_and_no_number():
    own = "data.path=. data.classes=[a,b] data.n_public=1000 privacy.batch_size=100"
    assert load("folder", {}, own).data.path == "."
    assert "must be a number" in error_of("mnist5k", {"eps": "."}, "")


def test_empty_parameters_mean_as_the_config_says():
    assert flatten(load("mnist5k", dict.fromkeys(PARAMETERS, ""))) == flatten(load("mnist5k"))


def test_parameters_and_overrides_set_their_keys():
    config = load("mnist5k", {"eps": "5", "rank": "8", "lr": "1e-2"}, "privacy.k=3")
    assert (config.privacy.eps, config.lora.rank, config.train.lr, config.privacy.k) == (5.0, 8, 0.01, 3)
    assert load("mnist5k", {"eps": "inf"}).privacy.eps == float("inf")


def test_a_parameter_and_an_override_of_the_same_key_are_refused():
    assert "eps=5 sets the same key" in error_of("mnist5k", {"eps": "5"}, "privacy.eps=3")


@pytest.mark.parametrize("value", ["1_0", "\uff11", "\u0661"])
def test_a_number_in_other_than_plain_digits_is_refused(value):
    assert f"eps={value} (privacy.eps): must be written with plain digits" in error_of("mnist5k", {"eps": value}, "")


def test_the_same_words_mean_a_stage_s_own_settings_in_pretraining():
    config = load("mnist5k", {"lr": "0.5", "epochs": "2"}, stage="pretrain_ae")
    assert (config.autoencoder.lr, config.autoencoder.epochs) == (0.5, 2.0)
    assert config.train.lr == load("mnist5k").train.lr


@pytest.mark.parametrize("name", [name for name in config_names() if name not in ("folder", "text2image")])
def test_every_experiment_resolves_and_survives_its_file(name, tmp_path):
    config = load(name)
    write_resolved(config, tmp_path / "resolved.yaml")
    assert read_resolved(tmp_path / "resolved.yaml") == config
    # a run of a version without sampling.attempts can be made again: it took the first image
    text = (tmp_path / "resolved.yaml").read_text()
    (tmp_path / "older.yaml").write_text(text.replace(f"  attempts: {config.sampling.attempts}\n", ""))
    assert (tmp_path / "older.yaml").read_text() != text
    first = replace(config, sampling=replace(config.sampling, attempts=1))
    assert read_resolved(tmp_path / "older.yaml") == first
    assert config.experiment.name == name


def test_a_config_can_leave_to_the_user_what_the_config_that_it_extends_has_set():
    assert error_of("text2image", {}, "data.path=p data.n_public=4000").startswith("model.base: missing in the config")
    assert load("text2image", {}, "data.path=p data.n_public=4000 model.base=here").model.base == "here"


def test_a_resolved_file_with_a_resolver_or_unknown_key_is_refused(tmp_path):
    path = tmp_path / "resolved.yaml"
    for line in ("train: {lr: '${oc.env:HOME}'}", "train: {foo: 1}", "nothing"):
        path.write_text(line)
        with pytest.raises(InputError):
            read_resolved(path)


def test_every_leaf_has_a_section_so_no_parameter_is_logged_twice():
    assert all("." in key for key in flatten(load("mnist5k")))


HOSTILE = {
    "unknown key": ("train: {foo: 1}", "train.foo: unknown key"),
    "unknown section": ("other: {foo: 1}", "unknown key"),
    "resolver": ("train: {lr: '${oc.env:HOME}'}", "resolvers are not allowed"),
    "resolver in extends": ("extends: '${oc.env:HOME}'", "resolvers are not allowed"),
    "path in extends": ("extends: ../../etc/passwd", "must be the name of an experiment"),
    "list in extends": ("extends: [mnist5k]", "must be the name of an experiment"),
    "itself in extends": ("extends: hostile", "extends itself"),
    "python object": ("train: !!python/object/apply:os.system ['touch PWNED']", "cannot be read"),
    "python name": ("train: {lr: !!python/name:os.system }", "cannot be read"),
    "twice the same key": ("train: {lr: 1.0}\ntrain: {lr: 2.0}", "cannot be read"),
    "no mapping": ("[1, 2]", "must be a mapping"),
    "not YAML": ("train: {lr: ", "cannot be read"),
    "not text": (b"\xff\xfe\x00", "cannot be read"),
    "section that is a number": ("train: 1", "train: must be a section of keys"),
    "type": ("train: {lr: fast}", "could not be converted"),
}


@pytest.mark.parametrize(("text", "part"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_config_file_ends_in_one_line_through_the_command_line(text, part, tmp_path, monkeypatch):
    """Loading a config file executes nothing and follows nothing in it."""
    from click.testing import CliRunner

    from dp_lora.commands.finetune import main

    for name in ("base", "mnist5k"):
        (tmp_path / f"{name}.yaml").write_bytes((ROOT / "configs" / f"{name}.yaml").read_bytes())
    (tmp_path / "hostile.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.setattr(sys.modules["dp_lora.config.load"], "CONFIGS", tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["--config", "hostile"])
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: config")
    assert part in line
    assert {path.name for path in tmp_path.iterdir()} == {"base.yaml", "mnist5k.yaml", "hostile.yaml"}


def test_classes_may_be_a_range_of_numbers():
    assert class_names(["0..3", "x"]) == ["0", "1", "2", "3", "x"]
    assert len(class_names(load("cin256").public.classes)) == 1000
    for wrong in ("3..1", "0..999999999"):
        with pytest.raises(InputError, match=r"public\.classes="):
            class_names([wrong])
