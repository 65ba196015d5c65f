"""`main` on N and on N + 1 private pictures: only leaves that a tag marks private tell the runs apart."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from dp_lora.config import ROOT
from dp_lora.data.layout import read_dataset
from dp_lora.data.split import split_of
from dp_lora.tracking.provenance import dvc_hash
from tests.support.kept import hashes, runs_of, told, unnamed
from tests.support.prepare_call import clone
from tests.support.tiny import TINY
from tests.support.tiny_project import run

pytestmark = pytest.mark.slow

LITTLE = (
    "autoencoder.epochs=1 autoencoder.batch_size=6 ldm.epochs=1 ldm.batch_size=6 sampling.n=8 "
    "evaluation.classifier_steps=2 evaluation.min_images=4 train.grid_every=2 compute.device=cpu"
)
CLASSES = ("cat", "dog")
JOINS = "cat/zoe-ziegler-of-mill-lane.png"


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 20), dtype=np.uint8))


def folder_of_pictures(folder: Path) -> None:
    """Write 30 pictures per class, named after people."""
    for seed, name in enumerate(f"{label}/anna-larsson-{n}.png" for label in CLASSES for n in range(30)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(folder / name)


def overrides(pictures: Path) -> str:
    tiny = TINY.replace("data.classes=[x,y]", "data.classes=[cat,dog]").replace("data.n_public=40", "data.n_public=60")
    return f"data.path={pictures} {tiny} {LITTLE}"


def secrets_of(project: Path, pictures: Path) -> set[bytes]:
    """Names of the private pictures, and all plain hashes of the pictures, of the prepared data, and of the sets."""
    data = project / "outputs/folder/data"
    found = {b"anna-larsson", b"zoe-ziegler", b"ill-with"}
    for path in (*pictures.rglob("*"), *data.rglob("*")):
        if path.is_file() and path.name != "dataset.json":
            found |= hashes(path.read_bytes())
    for split in ("train", "test") if data.exists() else ():
        found.add(read_dataset(data, list(CLASSES), split).digest()[:36].encode())
    if data.exists():
        found.add(dvc_hash(data).encode())
    return found


@pytest.fixture(scope="module")
def projects(tmp_path_factory) -> list[Path]:
    """Two projects after `main`, on N pictures and on one more; both share public results that were made before."""
    assert split_of(JOINS) == "train"
    place = tmp_path_factory.mktemp("neighbours")
    public = clone(ROOT, place / "public")
    folder_of_pictures(public / "pictures")
    # one public statement in both: the folder has one path
    stated = {"config": "folder", "overrides": overrides(Path("pictures"))}
    parameters = yaml.safe_load((public / "params.yaml").read_text(encoding="utf-8")) | stated
    (public / "params.yaml").write_text(yaml.safe_dump(parameters), encoding="utf-8")
    (public / "dvc.lock").unlink()
    done = run(public, "dvc", "repro", "count_params", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    (public / "mlflow.db").unlink()
    shutil.rmtree(public / "mlartifacts")
    made = []
    for name in ("one", "two"):
        project = Path(shutil.copytree(public, place / name, symlinks=True))
        if name == "two":
            picture(1000).save(project / "pictures" / JOINS)
        given = ("--config", "folder", "--overrides", stated["overrides"])
        done = run(project, "entrypoints.main", *given, OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        made.append(project)
    return made


def store(project: Path) -> str:
    return f"sqlite:///{project}/mlflow.db"


def test_what_differs_between_neighbours_stands_in_a_run_whose_tag_names_it(projects):
    first, second = (runs_of(store(project)) for project in projects)
    assert {name.split()[0] for name in first} == {"main", "prepare", "finetune", "sample", "fid"}
    assert unnamed(first, second, (projects[0], projects[1])) == []
    for name, tagged in first.items():
        # a run without private leaves needs no tag
        assert ("private" not in tagged.data.tags) == (name.split()[0] == "sample"), name


def test_no_run_holds_a_name_or_a_plain_hash_of_a_private_picture(projects):
    for project in projects:
        assert told(project, secrets_of(project, project / "pictures")) == []


def test_that_the_same_data_were_used_before_is_told_on_the_terminal_alone(projects):
    project = projects[0]
    before = [path.parent.name for path in project.glob("runs/*/plan.json")]
    given = ("--config", "folder", "--overrides", f"{overrides(Path('pictures'))} experiment.seed=1")
    done = run(project, "entrypoints.finetune", *given, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the same private data were used before" in done.stderr
    assert len(before) == 1
    assert before[0] in done.stderr
    folders = {path.parent.name.encode() for path in project.glob("runs/*/plan.json")}
    assert told(project, {b"private data were used before", *folders}) == []


def test_a_broken_picture_is_named_on_the_terminal_alone(projects):
    project = projects[1]
    pictures = project / "pictures"
    broken = pictures / "dog/bob-ill-with-fever.png"
    broken.write_bytes((pictures / JOINS).read_bytes()[:200])
    done = run(project, "entrypoints.main", "--config", "folder", "--overrides", overrides(Path("pictures")))
    broken.unlink()
    assert done.returncode == 1
    assert broken.name in done.stderr
    failed = runs_of(store(project))["prepare folder"]
    assert failed.info.status == "FAILED"
    assert "a private picture" in failed.data.tags["error"]
    assert told(project, secrets_of(project, pictures)) == []


def test_private_pictures_latents_and_caches_are_their_owner_s_alone_also_after_dvc_checked_out(projects):
    project = projects[0]
    data = project / "outputs/folder/data"
    kept = project / "runs/working/private/folder"
    for folder in (data, kept / "latents", kept / "evaluation"):
        assert list(folder.rglob("*"))
        for path in (folder, *folder.rglob("*")):
            assert path.stat().st_mode & 0o077 == 0 or path.suffix == ".lock", path
    shutil.rmtree(data)
    done = run(project, "dvc", "checkout", "outputs/folder/data")
    assert done.returncode == 0, done.stderr
    # check the outer folders alone: DVC sets its own modes below them
    for folder in (project / "outputs/folder", project / "runs", project / ".dvc/cache"):
        assert folder.stat().st_mode & 0o077 == 0, folder
