"""The command line on a diffusers pipeline, from prepare to export with captions; no record holds a word of them."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from dp_lora.config import ROOT, STAGES
from dp_lora.files import read_json
from dp_lora.statement import read_privacy
from tests.support import served
from tests.support.download_server import serving
from tests.support.kept import runs_of, told, unnamed
from tests.support.prepare_call import clone
from tests.support.tiny_pipelines import TEXT, make_pipeline
from tests.support.tiny_project import run

SECRETS = ("elderberry", "quartzite", "zeppelin")
SETTINGS = (
    "data.path=pictures data.n_public=40 data.size=32 privacy.batch_size=8 privacy.epochs=1 privacy.delta=1e-3 "
    "model.base=base model.privacy_status=public sampling.prompts='a sun|a tree' sampling.n=8 sampling.steps=2 "
    "compute.device=cpu train.grid_every=2 public.n=60 evaluation.min_images=4 evaluation.classifier_steps=2"
)
# a fixed hash seed: DVC orders independent stages by a hash, and a run keeps the dvc.lock of its moment
PLAIN = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}


def calls(project, config, settings, said):
    """A function that runs a command with `settings`, adds its output to `said`, and returns its stdout."""

    def ok(command, *more):
        done = run(project, "dp_lora", command, "--config", config, "--overrides", settings, *more)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        said.append(done.stdout + done.stderr)
        return done.stdout

    return ok


def write_pictures(folder, captioned=True, n=40):
    rng = np.random.default_rng(0)
    for number in range(n):
        path = folder / ("" if captioned else ("cat", "dog")[number % 2]) / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 36, 3), dtype=np.uint8)).save(path)
        if captioned:
            # one caption is longer than the encoder takes: no warning may show the part that is cut off
            path.with_suffix(".txt").write_text(f"the {SECRETS[number % 3]} " * (60 if number == 7 else 1))


def released_and_drawn(project, ok):
    """Run the chain from `prepare` to `export`; gives the samples' folder."""
    ok("prepare")
    told_of = ok("finetune", "--dry-run")
    assert "noise ratio: " in told_of
    assert "memory: " in told_of
    release = re.search(r"^(runs/[0-9a-f]{32}/release): ", ok("finetune"), re.MULTILINE)[1]
    assert 0 < read_privacy(project / release)["epsilon"] <= 10
    samples = re.search(r"^(runs/\S+/samples)/grid.png", ok("sample", "--adapter", release), re.MULTILINE)[1]
    ok("fid", "--samples", samples)
    exported = re.search(r"^(runs/\S+/export): ", ok("export", "--adapter", release), re.MULTILINE)[1]
    assert (project / exported / "model_index.json").exists()
    return project / samples


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXT)
def test_a_folder_with_captions_becomes_a_release_and_no_record_holds_a_word_of_a_caption(name, tmp_path):
    project = clone(ROOT, tmp_path / "project")
    make_pipeline(project / "base", name)
    write_pictures(project / "pictures", captioned=True)
    said = []
    samples = released_and_drawn(project, calls(project, "text2image", SETTINGS, said))
    assert read_json(samples / "samples.json")["classes"] == ["a sun", "a tree"]

    # no message and no record holds one of them
    assert not [secret for secret in SECRETS if secret in "".join(said)]
    assert told(project, {secret.encode() for secret in SECRETS}) == []


@pytest.fixture(scope="module")
def neighbours(tmp_path_factory):
    """Two projects after `main` on one given base: one with N captioned pictures, one with one more."""
    place = tmp_path_factory.mktemp("neighbours")
    # public results are made once, so that the order of their stages cannot tell the projects apart
    public = clone(ROOT, place / "public")
    make_pipeline(public / "base", "sd")
    write_pictures(public / "pictures")
    typed = {"config": "text2image", "overrides": SETTINGS}
    (public / "pipelines/diffusers/params.yaml").write_text(
        yaml.safe_dump(dict.fromkeys(STAGES["main"].parameters) | typed)
    )
    stages = [f"pipelines/diffusers/dvc.yaml:{stage}" for stage in ("prepare_public", "count_params")]
    done = run(public, "dvc", "repro", *stages, **PLAIN)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    (public / "mlflow.db").unlink()
    shutil.rmtree(public / "mlartifacts")
    made = []
    for name, pictures in (("one", 40), ("two", 41)):
        project = Path(shutil.copytree(public, place / name, symlinks=True))
        shutil.rmtree(project / "pictures")
        write_pictures(project / "pictures", n=pictures)
        done = run(project, "dp_lora", "main", "--config", "text2image", "--overrides", SETTINGS, **PLAIN)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        made.append(project)
    return made


@pytest.mark.slow
def test_of_neighbours_with_captions_what_differs_stands_in_a_run_whose_tag_names_it(neighbours):
    runs = [runs_of(f"sqlite:///{project}/mlflow.db") for project in neighbours]
    assert {name.split()[0] for name in runs[0]} >= {"main", "prepare", "finetune", "sample", "fid"}
    assert unnamed(*runs, tuple(neighbours)) == []
    for project in neighbours:
        assert told(project, {secret.encode() for secret in SECRETS}) == []


@pytest.mark.slow
def test_main_begins_anew_where_the_given_base_changed_and_does_nothing_where_it_did_not(neighbours):
    def main():
        done = run(neighbours[0], "dp_lora", "main", "--config", "text2image", "--overrides", SETTINGS)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert "nothing to do" in main()
    index = neighbours[0] / "base/model_index.json"
    index.write_text(index.read_text().replace("{", '{"_note": "another",', 1))
    said = main()
    assert "nothing to do" not in said
    assert "Running stage 'pipelines/diffusers/dvc.yaml:finetune'" in said
    assert "Running stage 'pipelines/diffusers/dvc.yaml:prepare':" not in said  # the pictures have not changed


@pytest.mark.slow
def test_a_folder_of_classes_becomes_a_release_of_a_class_conditional_pipeline(tmp_path):
    project = clone(ROOT, tmp_path / "project")
    make_pipeline(project / "base", "dit")
    write_pictures(project / "pictures", captioned=False)
    settings = f"{SETTINGS} data.classes=[cat,dog] data.channels=3"
    samples = released_and_drawn(project, calls(project, "folder", settings, []))
    assert read_json(samples / "samples.json")["classes"] == ["cat", "dog"]

    other = f"{settings} data.size=64"
    refused = run(project, "dp_lora", "finetune", "--dry-run", "--config", "folder", "--overrides", other)
    assert refused.returncode == 1
    assert "the base is for pictures of 32 pixels and 3 channels" in refused.stderr


@pytest.mark.slow
def test_captioned_pictures_of_the_hub_become_a_release_through_main_and_no_record_holds_a_word(tmp_path):
    project = clone(ROOT, tmp_path / "project")
    make_pipeline(project / "base", "sd")
    given = f"{SETTINGS} {served.SETTINGS} data.source=huggingface data.folder=data/faces huggingface.licence=none"
    settings = given.replace("data.path=pictures ", "").replace("data.size=32 ", "")
    with serving() as server:
        for file, rows in served.ROWS.items():
            captions = [f"the {SECRETS[row % 3]}" for row in range(rows)]
            server.files[served.path_of(file)] = served.captioned(file, captions)
        said = []
        for command in ("prepare", "main"):
            words = ("dp_lora", command, "--config", "text2image", "--overrides", settings)
            done = run(project, *words, HF_ENDPOINT=server.url, HF_HOME=str(tmp_path / "hub"), **PLAIN)
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
            said.append(done.stdout + done.stderr)
    made = project / "outputs/diffusers/text2image"
    assert read_json(made / "data/pictures.json")["folder"] == "data/faces"
    assert "epsilon" in read_json(made / "finetune/metrics.json")
    assert "precision" in read_json(made / "evaluation/metrics.json")
    assert not [secret for secret in SECRETS if secret in "".join(said)]
    assert told(project, {secret.encode() for secret in SECRETS}) == []
