"""A run's record lists private things in its tag `private`, and holds nothing that tells who is in the data."""

import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import save_file

from dp_lora import tracking
from dp_lora.cli.adapters import track_adapter
from dp_lora.cli.closed_folders import close_folders
from dp_lora.cli.common import one_line_errors
from dp_lora.cli.pipelines import PIPELINES
from dp_lora.cli.record import is_public, operator_folder, public_lock, record, stage_folders
from dp_lora.config import ROOT, load
from dp_lora.data.captions import read_text
from dp_lora.data.contact_sheet import write_contact_sheet
from dp_lora.data.fingerprint import fingerprint
from dp_lora.data.folder import folder_pictures, list_pictures
from dp_lora.data.layout import read_dataset
from dp_lora.data.metadata_table import Stated
from dp_lora.data.open_picture import look_at, read_picture
from dp_lora.data.prepare import prepare_private
from dp_lora.errors import PRIVATE_PICTURE, InputError, private_names
from dp_lora.evaluation.cache import Cache
from dp_lora.evaluation.classifier import Classifier
from dp_lora.events import Events
from dp_lora.files import digest_file, read_json, whole_file, whole_folder, write_json
from dp_lora.privacy.plan import PUBLISHED
from dp_lora.tracking import opening, tracked_run
from dp_lora.tracking.provenance import dvc_hash
from tests.support.kept import hashes, leaves, runs_of, told, unnamed
from tests.support.project_root import use_root
from tests.support.tiny import no_privacy, plan_of
from tests.support.tracking_store import artifacts, use_store

STAGES = ("main", "prepare", "finetune", "sample", "fid", "count_params", "export")
CLASSES = "data.classes=[cat,dog] data.size=16 data.n_public=4000"


def folder_of_pictures(folder: Path, n: int) -> Path:
    for index in range(n):
        path = folder / ("cat", "dog")[index % 2] / f"anna-larsson-{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (16, 16), dtype=np.uint8)).save(path)
        path.with_suffix(".txt").write_text(f"anna-larsson, picture {index}")
    return folder


def made_by_all_stages(root: Path, n: int, private: bool = True):
    """Write outputs like those of the stages of `config=folder`: the private data are real, the rest is made up."""
    folder_of_pictures(root / "pictures", n)
    config = load("folder", {} if private else {"eps": "inf"}, f"data.path={root}/pictures {CLASSES}")
    own = root / "outputs/folder"
    prepare_private(config, own / "data", Events())
    statement = {"private": private, "statement": "as it is", "run_id": "0" * 32}
    adapter = own / "finetune" / ("release" if private else "not-private")
    write_json(adapter / "privacy.json", statement)
    (adapter / "adapter.safetensors").write_bytes(random.randbytes(100))
    write_json(own / "samples/samples.json", {"privacy": statement})
    write_json(own / "evaluation/metrics.json", {"n": n})
    write_json(own / "count_params/count_params.json", {"trainable": 1})
    for folder in ("data", "autoencoder", "ldm"):
        write_json(root / "outputs/letters" / folder / "model.json", {"public": True})
    write_json(root / "outputs/resolved.yaml", {})
    (root / "params.yaml").write_text("config: folder\n")
    (root / "data.dvc").write_text(f"outs:\n- path: data\n  md5: {dvc_hash(own / 'data')}\n  nfiles: {n}\n")
    (root / "dvc.lock").write_text(yaml.safe_dump(lock_of(own)))
    return config


def lock_of(own: Path) -> dict:
    """Write a dvc.lock as DVC does."""

    def entry(path: str, folder: Path) -> dict:
        return {"path": path, "hash": "md5", "md5": dvc_hash(folder), "size": 9, "nfiles": len(list(folder.rglob("*")))}

    data = entry("outputs/folder/data", own / "data")
    code = {"path": "dp_lora/data/png.py", "hash": "md5", "md5": "0" * 32, "size": 9}
    fid = [data, code, entry("outputs/letters/data", own.parent / "letters/data")]
    stages = {
        "prepare": {"cmd": "c", "deps": [code], "params": {"outputs/resolved.yaml": {"data": 1}}, "outs": [data]},
        "fid": {"cmd": "c", "deps": fid, "outs": [entry("outputs/folder/evaluation", own / "evaluation")]},
    }
    stages["prepare"]["params"]["outputs/folder/seen.yaml"] = {"pictures": 9}
    return {"schema": "2.0", "stages": stages}


def recorded(root: Path, n: int, patch: pytest.MonkeyPatch, private: bool = True) -> None:
    """Record a run of every stage with `record`, in a project of its own."""
    root.mkdir()
    use_root(root, patch)
    config = made_by_all_stages(root, n, private)
    for stage in STAGES:
        with tracking.run(stage, config) as run:
            run.output(stage_folders(config).get(stage, root / "outputs/folder"))
            run.dataset("folder", root / "outputs/folder/data", private=True)
            record(run, stage, config)


@pytest.fixture(scope="module")
def neighbours(tmp_path_factory):
    """Two projects with a run of every stage in each; the second has one private picture more."""
    folder = tmp_path_factory.mktemp("neighbours")
    places = (folder / "one", folder / "two")
    with pytest.MonkeyPatch.context() as patch:
        for place, n in zip(places, (12, 13), strict=True):
            recorded(place, n, patch)
    return places


def store(project: Path) -> str:
    return f"sqlite:///{project}/mlflow.db"


def secrets_of(project: Path) -> set[bytes]:
    data = project / "outputs/folder/data"
    found = {b"anna-larsson", dvc_hash(data).encode()}
    for path in (*(project / "pictures").rglob("*"), *data.rglob("*")):
        if path.is_file() and path.name != "dataset.json":
            found |= hashes(path.read_bytes())
    digests = (read_dataset(data, ["cat", "dog"], split).digest() for split in ("train", "test"))
    return found | {digest[:36].encode() for digest in digests}


def test_what_every_stage_keeps_of_neighbours_differs_in_keyed_digests_alone(neighbours):
    first, second = (runs_of(store(project)) for project in neighbours)
    assert {name.split()[0] for name in first} == set(STAGES)
    assert unnamed(first, second, neighbours) == []
    for project in neighbours:
        assert told(project, secrets_of(project)) == []


def test_a_mutant_that_keeps_names_or_hashes_is_caught(neighbours, tmp_path, monkeypatch):
    """The search of the test above can fail: it finds what earlier code kept."""
    from dp_lora.reproduction import manifest

    monkeypatch.setattr("dp_lora.cli.record._digests", lambda folder, config, sign: manifest(folder))
    monkeypatch.setattr("dp_lora.cli.record.public_lock", lambda lock: lock)
    recorded(tmp_path / "two", 13, monkeypatch)
    found = told(tmp_path / "two", secrets_of(tmp_path / "two"))
    assert any("anna-larsson" in line for line in found)
    assert any(dvc_hash(tmp_path / "two/outputs/folder/data") in line for line in found)
    first, second = runs_of(store(neighbours[0])), runs_of(store(tmp_path / "two"))
    left = unnamed(first, second, (neighbours[0], tmp_path / "two"))
    assert any(line.startswith("sample") and "dvc.lock" in line for line in left)
    assert any(line.startswith("sample") and "files.json" in line for line in left)


def test_a_keyed_digest_is_another_one_in_each_run_and_makes_reproduction_compare(neighbours):
    runs = runs_of(store(neighbours[0]))
    kept = [read_json(Path(run.info.artifact_uri.removeprefix("file://")) / "files.json") for run in runs.values()]
    digests = [files["prepare"]["./"] for files in kept if "prepare" in files]
    assert len(digests) > 2
    assert len(set(digests)) == len(digests)
    (main,) = (run for name, run in runs.items() if name.startswith("main"))
    files = read_json(Path(main.info.artifact_uri.removeprefix("file://")) / "files.json")["result"]
    assert {name for name in files if name.endswith("/")} == {"data/", "evaluation/"}
    assert "finetune/release/adapter.safetensors" in files


def test_nothing_of_a_model_without_a_guarantee_is_kept_but_keyed(tmp_path, monkeypatch):
    recorded(tmp_path / "project", 12, monkeypatch, private=False)
    runs = runs_of(store(tmp_path / "project"))
    (main,) = (run for name, run in runs.items() if name.startswith("main"))
    files = read_json(Path(main.info.artifact_uri.removeprefix("file://")) / "files.json")["result"]
    assert {name for name in files if name.endswith("/")} == {"data/", "evaluation/", "finetune/", "samples/"}
    assert not any(name.startswith("finetune/") and not name.endswith("/") for name in files)


def test_data_dvc_stays_on_this_machine(neighbours, monkeypatch):
    monkeypatch.setattr("dp_lora.cli.record.RUNS", neighbours[0] / "runs")
    for run in runs_of(store(neighbours[0])).values():
        kept = operator_folder(run.info.run_id)
        assert (kept / "data.dvc").read_text() == (neighbours[0] / "data.dvc").read_text()
        assert (kept.stat().st_mode & 0o777, (kept / "data.dvc").stat().st_mode & 0o777) == (0o700, 0o600)
        assert not any("data.dvc" in where for _, where, _ in leaves(run, neighbours[0]))


def test_a_kept_lock_has_hashes_of_code_and_of_what_is_public_alone():
    for pipeline in PIPELINES.values():
        if pipeline.lock.exists():
            lock = yaml.safe_load(pipeline.lock.read_text())
            kept = public_lock(lock)
            assert kept["stages"].keys() == lock["stages"].keys()
            for stage in kept["stages"].values():
                for entry in (*stage.get("deps", []), *stage.get("outs", [])):
                    private = entry["path"].startswith(("data/", "outputs/")) and entry["path"].split("/")[-1] in (
                        "data", "finetune", "samples", "evaluation", "celebahq", "mnist",
                    )  # fmt: skip
                    if private and entry["path"] != "outputs/letters/data":
                        assert entry == {"path": entry["path"]}
                    else:
                        assert "md5" in entry


def test_what_is_not_known_to_be_public_counts_as_private(tmp_path):
    (tmp_path / "something").mkdir()
    (tmp_path / "something/file").write_text("")
    assert not is_public(tmp_path / "something")
    assert not is_public(tmp_path / "something/file")
    assert is_public(ROOT / "outputs/letters/ldm")
    lock = {"stages": {"new": {"outs": [{"path": "outputs/x/seen", "md5": "0", "nfiles": 3}]}}}
    assert public_lock(lock)["stages"]["new"]["outs"] == [{"path": "outputs/x/seen"}]


@pytest.fixture
def client(tmp_path, monkeypatch):
    return use_store(tmp_path, monkeypatch)


@pytest.fixture
def picture(tmp_path) -> Path:
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "made.png")
    return tmp_path / "made.png"


def test_the_run_itself_lists_in_a_tag_what_is_private_by_its_name_in_the_store(client, picture, tmp_path):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "scores.json").write_text("{}")
    with tracking.run("fid", load("mnist5k")) as run:
        run.metric("private/loss (max)", 1.0)
        run.metric("accuracy", 0.5, private=True)
        run.metric("epsilon", 10.0)
        run.params({"found": 3}, private=True)
        run.tags({"seen": 3}, private=True)
        run.image("confusion", picture, private=True)
        run.image("grids/step-000050", picture, private=True)
        run.image("samples", picture)
        run.table({"class": ["a"]}, "per_class", private=True)
        run.artifact(tmp_path / "evaluation", private=True)
        run.artifact(picture)
        run.dataset("pictures", tmp_path, "ab" * 32, private=True)
        assert "accuracy" in client.get_run(run.run_id).data.tags["private"]  # already before the run ends
    assert client.get_run(run.run_id).data.tags["private"] == (
        "accuracy, confusion.png, evaluation, found, grids, images/confusion, images/grids, per_class.json, pictures, "
        "private/loss _max_, seen"
    )
    with tracking.run("sample", load("mnist5k")) as public:
        public.image("grid", picture)
        public.metric("epsilon", 10.0)
    assert "private" not in client.get_run(public.run_id).data.tags


def test_of_private_pictures_no_hash_is_recorded(client, tmp_path, monkeypatch):
    monkeypatch.setattr("dp_lora.tracking.provenance.ROOT", tmp_path)
    (tmp_path / "data/own").mkdir(parents=True)
    write_json(tmp_path / "data/own/source.json", {"origin": "o", "sha256": "cd" * 32})
    with tracking.run("finetune", load("mnist5k")) as run:
        run.dataset("own", tmp_path / "data/own", "ab" * 32, "training", private=True)
    (entry,) = client.get_run(run.run_id).inputs.dataset_inputs
    tags = {tag.key: tag.value for tag in entry.tags}
    assert tags == {"mlflow.data.context": "training", "private": "true", "origin": "o"}
    said = str(entry.to_dictionary())
    assert not any(text in said for text in ("abab", "cdcd", digest_file(tmp_path / "data/own/source.json")))


@pytest.mark.parametrize("private", [True, False])
def test_of_an_adapter_that_no_guarantee_covers_no_hash_is_recorded(client, tmp_path, private):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter.safetensors").write_bytes(b"weights")
    statement = {"private": private, "statement": "", "run_id": "0a", "epsilon": 1.0, "delta": 1e-5, "unit": "picture"}
    statement["relation"] = "add-or-remove-one"
    with tracking.run("sample", load("mnist5k")) as run:
        track_adapter(run, tmp_path / "adapter", {"base": {"path": "base"}}, statement, load("mnist5k"))
    (entry,) = client.get_run(run.run_id).inputs.dataset_inputs
    tags = {tag.key: tag.value for tag in entry.tags}
    assert tags["private"] == ("false" if private else "true")
    assert ("adapter" in client.get_run(run.run_id).data.tags.get("private", "")) == (not private)
    if not private:
        assert tags.keys() == {"mlflow.data.context", "private"}


@pytest.mark.parametrize(("stage", "named"), [("finetune", True), ("fid", True), ("pretrain_ae", False)])
def test_load_and_memory_of_what_reads_private_pictures_are_named_private(client, monkeypatch, stage, named):
    monkeypatch.setattr(opening, "_asked_for_system_metrics", lambda: True)
    monkeypatch.setattr(opening, "_monitor", lambda run_id: None)
    with tracking.run(stage, load("mnist5k")) as run:
        assert client.get_run(run.run_id).data.tags.get("private") == ("system" if named else None)


@pytest.mark.parametrize("overrides", ["privacy.eps=inf", f"privacy.accounting={PUBLISHED}"])
@pytest.mark.parametrize("stage", ["finetune", "sample", "fid", "export"])
def test_what_a_model_without_a_guarantee_shows_goes_to_no_server(client, picture, monkeypatch, stage, overrides):
    config = load("mnist5k", {}, overrides)
    assert config.privacy.guaranteed is False
    kept = []
    for at_home in (True, False):
        monkeypatch.setattr(tracked_run, "is_at_home", lambda: at_home)  # noqa: B023
        with tracking.run(stage, config) as run:
            run.image("grids/step-000050", picture)
            run.image("grid", picture)
            run.artifact(picture)
            run.table({"class": ["a"]}, "of_samples")
        found = {path.relative_to(artifacts(run.run_id)).parts[0] for path in artifacts(run.run_id).rglob("*")}
        kept.append(found - {"config.yaml", "messages.txt"})
        tags = client.get_run(run.run_id).data.tags
        listed = "grid.png, grids, images/grid, images/grids, made.png, of_samples.json"
        assert tags.get("private") == (listed if at_home else None)
    assert kept == [{"grid.png", "grids", "images", "made.png", "of_samples.json"}, set()]


def test_a_statement_without_a_guarantee_counts_whatever_the_config_says(client, picture, monkeypatch):
    monkeypatch.setattr(tracked_run, "is_at_home", lambda: False)
    with tracking.run("sample", load("mnist5k")) as run:
        run.image("before", picture)
        run.privacy({"private": False, "statement": "no"})
        run.image("after", picture)
    assert {path.name for path in artifacts(run.run_id).glob("*.png")} == {"before.png"}


def test_config_and_plan_agree_on_what_has_a_guarantee():
    plans = {
        "": plan_of(),
        "privacy.eps=inf": no_privacy(),
        f"privacy.accounting={PUBLISHED}": plan_of(accounting=PUBLISHED),
    }
    for overrides, plan in plans.items():
        assert load("mnist5k", {}, overrides).privacy.guaranteed == plan.guaranteed, overrides


def test_a_line_for_the_terminal_is_in_no_record(client, capsys):
    with tracking.run("finetune", load("mnist5k")) as run:
        run.terminal("the same private data were used before")
        run.message("another line")
    assert "used before" in capsys.readouterr().err
    assert "used before" not in (artifacts(run.run_id) / "messages.txt").read_text()


def spoil(folder: Path, how: str) -> None:
    path = folder / "cat/anna-larsson-0.png"
    if how == "cut short":
        path.write_bytes(path.read_bytes()[:90])
    elif how == "no picture":
        path.write_text("anna")
    elif how == "a link":
        path.unlink()
        path.symlink_to("/etc/hostname")
    elif how == "another class":
        (folder / "anna-larsson").mkdir()
    elif how == "in no class":
        for one in (path, path.with_suffix(".txt")):
            one.rename(folder / one.name)
    elif how == "a person is missing":
        (folder / "metadata.csv").write_text("file_name,label,person\ncat/anna-larsson-0.png,cat,\n")
    elif how == "a repeated name":
        (folder / "metadata.csv").write_text("file_name,label\n" + "cat/anna-larsson-0.png,cat\n" * 2)


@pytest.mark.parametrize(
    "how",
    ["cut short", "no picture", "a link", "another class", "in no class", "a person is missing", "a repeated name"],
)
def test_a_bad_private_picture_is_named_on_the_terminal_and_not_in_the_store(client, tmp_path, how):
    spoil(folder_of_pictures(tmp_path / "pictures", 4), how)
    unit = " privacy.unit=person" if how == "a person is missing" else ""
    config = load("folder", {}, f"data.path={tmp_path}/pictures {CLASSES}{unit}")
    with pytest.raises(InputError, match="anna-larsson") as caught, tracking.run("prepare", config) as run:
        prepare_private(config, tmp_path / "out", run)
    assert "anna-larsson" in str(caught.value)
    done = client.get_run(run.run_id)
    assert (done.info.status, done.data.tags["error"]) == ("FAILED", PRIVATE_PICTURE)
    assert told(tmp_path, {b"anna-larsson"}) == []


def spoil_caption(folder: Path, how: str) -> None:
    text = folder / "cat/anna-larsson-0.txt"
    if how == "not UTF-8":
        text.write_bytes("the caption of anna-larsson".encode("utf-16"))
    elif how == "too long":
        text.write_text("the caption of anna-larsson " * 5000)
    elif how == "empty":
        text.write_text("")
    elif how == "no picture":
        text.with_suffix(".png").unlink()
    elif how == "a link":
        text.unlink()
        text.symlink_to("/etc/hostname")
    elif how == "another ending":
        text.rename(text.with_suffix(".caption"))
    elif how == "a number in a table":
        (folder / "metadata.jsonl").write_text('{"file_name": "cat/anna-larsson-0.png", "label": "cat", "text": 7}')
    elif how == "no column":
        (folder / "metadata.jsonl").write_text('{"file_name": "cat/anna-larsson-0.png", "anna-larsson": "cat"}')


@pytest.mark.parametrize(
    "how",
    [
        "not UTF-8",
        "too long",
        "empty",
        "no picture",
        "a link",
        "another ending",
        "a number in a table",
        "no column",
    ],
)
def test_a_bad_caption_is_named_on_the_terminal_and_neither_its_name_nor_its_text_is_in_the_store(
    client, tmp_path, how
):
    spoil_caption(folder_of_pictures(tmp_path / "pictures", 4), how)
    config = load("folder", {}, f"data.path={tmp_path}/pictures {CLASSES} data.captions=true")
    with pytest.raises(InputError, match="anna-larsson") as caught, tracking.run("prepare", config) as run:
        prepare_private(config, tmp_path / "out", run)
    assert "caption of" not in str(caught.value)
    done = client.get_run(run.run_id)
    assert (done.info.status, done.data.tags["error"]) == ("FAILED", PRIVATE_PICTURE)
    assert told(tmp_path, {b"anna-larsson", b"caption of"}) == []


def test_the_number_of_bad_pictures_is_told_on_the_terminal_alone(client, tmp_path):
    pictures = folder_of_pictures(tmp_path / "pictures", 6)
    for path in pictures.rglob("*.png"):
        path.write_text("anna-larsson")
    config = load("folder", {}, f"data.path={pictures} {CLASSES}")
    with pytest.raises(InputError, match="name 6 files"), tracking.run("prepare", config) as run:
        prepare_private(config, tmp_path / "out", run)
    assert client.get_run(run.run_id).data.tags["error"] == PRIVATE_PICTURE
    assert told(tmp_path, {b"anna-larsson", b"6 files"}) == []


def test_whatever_looks_at_the_folder_or_draws_its_sheet_records_no_name(tmp_path):
    """Otherwise one caller that forgets its boundary would put a private name into the store."""
    good, bad = folder_of_pictures(tmp_path / "good", 8), folder_of_pictures(tmp_path / "bad", 2)
    picture, text = bad / "cat/anna-larsson-0.png", bad / "cat/anna-larsson-0.txt"
    for path in (picture, text):
        path.write_bytes("anna-larsson".encode("utf-16"))
    prepare_private(load("folder", {}, f"data.path={good} {CLASSES}"), tmp_path / "out", Events())
    for path in (tmp_path / "out/images").rglob("*.png"):
        path.write_bytes(b"no picture")
    stated = Stated(("cat", "dog"))
    for read in (
        lambda: list_pictures(bad, stated),
        lambda: list(folder_pictures(bad, stated, 16, 1, Events())),
        lambda: fingerprint(bad, stated),
        lambda: read_text(text, bad),
        lambda: look_at(picture, 16),
        lambda: read_picture(picture, 16, 1),
        lambda: read_dataset(tmp_path / "out", ["cat", "dog"], "train").images([0]),
        lambda: read_dataset(tmp_path / "out", ["emu"], "train"),
        lambda: write_contact_sheet(tmp_path / "out", ["cat", "dog"], tmp_path / "sheet.png"),
    ):
        with pytest.raises(InputError, match="anna-larsson") as caught:
            read()
        assert caught.value.public == PRIVATE_PICTURE


def test_a_bad_picture_leaves_no_name_in_the_run_that_mlflow_made(client, tmp_path, monkeypatch):
    for error in (
        InputError("anna.png: no", "a private picture cannot be read"),
        OSError(5, "Input error", "anna.png"),
    ):
        joined = client.create_run("0").info.run_id
        monkeypatch.setenv("MLFLOW_RUN_ID", joined)
        with pytest.raises(SystemExit), one_line_errors():
            raise error
        assert client.get_run(joined).data.tags["error"] in ("a private picture cannot be read", "Input error")


def test_an_error_s_public_text_is_stated_once_and_survives_a_worker_process():
    assert InputError("a").public == "a"
    error = pickle.loads(pickle.dumps(InputError("anna.png", "a private picture")))
    assert (str(error), error.public) == ("anna.png", "a private picture")
    for raised, public in ((InputError("anna.png"), "of the boundary"), (InputError("anna.png", "own"), "own")):
        with pytest.raises(InputError) as caught, private_names("of the boundary"):
            raise raised
        assert (str(caught.value), caught.value.public) == ("anna.png", public)


@pytest.fixture
def open_to_all():
    """Set umask 0: a file is closed to others only if its writer closes it."""
    before = os.umask(0)
    yield
    os.umask(before)


def modes(folder: Path) -> set[str]:
    """Kinds and modes of a folder and everything in it except locks, such as `file 600`."""
    paths = [path for path in (folder, *folder.rglob("*")) if path.suffix != ".lock"]
    return {f"{'folder' if path.is_dir() else 'file'} {path.stat().st_mode & 0o777:o}" for path in paths}


def test_prepared_private_pictures_and_caches_are_their_owner_s_alone(open_to_all, tmp_path):
    folder_of_pictures(tmp_path / "pictures", 8)
    config = load("folder", {}, f"data.path={tmp_path}/pictures {CLASSES}")
    prepare_private(config, tmp_path / "data", Events())
    prepare_private(load("mnist5k", {}, "data.size=8 data.classes=[0]"), tmp_path / "packed", Events())
    cache = Cache(tmp_path / "cache")
    cache.json("a", {}, lambda: {})
    cache.array("b", {}, lambda: np.zeros(3))
    cache.classifier("d", {}, lambda: Classifier(1, 2))
    for folder in ("data", "packed", "cache"):
        assert modes(tmp_path / folder) == {"folder 700", "file 600"}, folder


def test_a_private_file_is_closed_while_it_is_written(open_to_all, tmp_path):
    with whole_file(tmp_path / "one.npy", private=True) as path:
        np.save(path, np.zeros(3))
        assert path.stat().st_mode & 0o777 == 0o600
    with whole_folder(tmp_path / "folder", private=True) as temporary:
        assert temporary.stat().st_mode & 0o777 == 0o700
        (temporary / "inside").mkdir()
        (temporary / "inside/file").write_text("")
    assert modes(tmp_path / "folder") == {"folder 700", "file 600"}


@pytest.mark.parametrize(("mask", "then"), [(0o022, {"folder 755", "file 644"}), (0o027, {"folder 750", "file 640"})])
def test_what_is_meant_for_others_follows_the_umask_whoever_wrote_it(mask, then, open_to_all, tmp_path):
    os.umask(mask)
    with whole_folder(tmp_path / "release") as temporary:
        (temporary / "peft").mkdir(0o700)
        save_file({"a": np.zeros(3)}, temporary / "peft/a.safetensors")  # save_file gives 0600 under any umask
        write_json(temporary / "privacy.json", {})
    with whole_file(tmp_path / "release/b.safetensors") as temporary:
        save_file({"a": np.zeros(3)}, temporary)
    assert modes(tmp_path / "release") == then


def test_each_command_closes_the_folders_that_dvc_fills_with_files_for_all(open_to_all, tmp_path, monkeypatch):
    config = load("mnist5k")
    for module in ("closed_folders", "pipelines"):
        monkeypatch.setattr(f"dp_lora.cli.{module}.ROOT", tmp_path)
    monkeypatch.setattr("dp_lora.cli.closed_folders.RUNS", tmp_path / "runs")
    close_folders(config)
    assert list(tmp_path.iterdir()) == []  # it makes no folder
    closed = [tmp_path / name for name in ("data", "runs", "outputs/mnist5k", ".dvc/cache")]
    for folder in closed:
        folder.mkdir(parents=True)
    close_folders(config)
    assert [oct(folder.stat().st_mode & 0o777) for folder in closed] == ["0o700"] * 4
