"""After a picture leaves the folder, every command removes it from prepared data, caches and later training."""

import os
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from dp_lora.cli import common, pipeline, pipelines, prepared
from dp_lora.cli.common import Call
from dp_lora.config import Config, load
from dp_lora.data.fingerprint import fingerprint
from dp_lora.data.metadata_table import Stated
from dp_lora.errors import InputError
from dp_lora.files import digest_file, read_json, write_json
from tests.support.prepare_call import clone, commit_all
from tests.support.tiny import TINY, tiny_config, tiny_dataset
from tests.support.tiny_project import run

EXPERIMENT = "own-tiny"
LITTLE = (
    "autoencoder.epochs=1 autoencoder.batch_size=6 ldm.epochs=1 ldm.batch_size=6 sampling.n=8 "
    "evaluation.classifier_steps=2 evaluation.min_images=4 compute.device=cpu"
)
ROOT = Path(__file__).resolve().parents[1]


def draw(path: Path, seed: int) -> None:
    """Draw a picture whose file has the same size for every seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (16, 16), dtype=np.uint8)
    Image.fromarray(noise).save(path, compress_level=0)


def fill(folder: Path, each: int = 20) -> Path:
    for place, name in enumerate("xy"):
        for number in range(each):
            draw(folder / name / f"{number}.png", 100 * place + number)
            (folder / name / f"{number}.txt").write_text(f"picture {number}")
    return folder


def change_in_place(path: Path) -> None:
    """Replace a picture by another one with the same name, size and time."""
    before = path.stat()
    draw(path, 999)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def move(path: Path, target: Path | None) -> None:
    """Move a picture and its caption to another place, or delete them."""
    for ending in (".png", ".txt"):
        file = path.with_suffix(ending)
        file.unlink() if target is None else file.rename(target.with_suffix(ending))


CHANGES = {
    "removed": lambda folder: move(folder / "x/3.png", None),
    "added": lambda folder: draw(folder / "x/new.png", 999),
    "changed in place": lambda folder: change_in_place(folder / "x/3.png"),
    "renamed": lambda folder: move(folder / "x/3.png", folder / "x/other.png"),
    "a caption": lambda folder: (folder / "x/3.txt").write_text("another one"),
    "another class": lambda folder: move(folder / "x/3.png", folder / "y/3-of-x.png"),
    "broken": lambda folder: (folder / "x/new.png").write_bytes(b"no picture"),
}


def own_config(pictures: Path) -> Config:
    return load("mnist5k", {}, f"{TINY} data.source=folder data.path={pictures}")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project root of the test's own: a dataset prepared from pictures, and everything kept of it."""
    monkeypatch.setattr(common, "RUNS", tmp_path / "runs")
    for module in (pipeline, pipelines):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(prepared, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(prepared, "WORKING", tmp_path / "runs/working")
    config = own_config(fill(tmp_path / "pictures", 4))
    with prepared.sealing(config, pipelines.private_data(config)):
        tiny_dataset(pipelines.private_data(config))
    (prepared.caches(config) / "latents").mkdir()
    (prepared.caches(config) / "latents/1.npy").write_bytes(b"latents")
    return tmp_path


@pytest.mark.parametrize("change", CHANGES)
def test_prepared_pictures_and_all_that_is_kept_of_them_go_when_the_folder_changes(place, change, capsys):
    config = own_config(place / "pictures")
    data, kept = pipelines.private_data(config), prepared.caches(config) / "latents/1.npy"
    prepared.look(config)
    assert data.exists()
    assert kept.exists()
    CHANGES[change](place / "pictures")
    with pytest.raises(InputError, match=r"data: data\.path has changed since it was prepared"):
        prepared.require_prepared(Call("finetune", config, Path("out"), dry_run=False))
    prepared.look(config)
    assert not data.exists()
    assert not kept.exists()
    assert "outputs/mnist5k/data" in capsys.readouterr().err


def test_pictures_prepared_from_another_folder_are_said_to_be_so(place, capsys):
    prepared.look(own_config(fill(place / "elsewhere", 5)))
    said = capsys.readouterr().err
    assert "outputs/mnist5k/data" in said
    assert "removed: prepared from another data.path; prepared anew" in said
    prepared.look(own_config(place / "pictures"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("change", ["removed", "changed in place", "renamed"])
def test_what_other_experiments_kept_trees_and_copies_of_dvc_made_of_the_folder_goes_too(place, monkeypatch, change):
    """Otherwise a withdrawn picture stays in the data of an experiment that nobody runs any more."""
    mine, other = (
        own_config(place / "pictures"),
        load("standin", {}, f"{TINY} data.source=folder data.path={place / 'pictures'}"),
    )
    elsewhere = load("folder", {}, f"{TINY} data.source=folder data.path={fill(place / 'elsewhere', 4)}")
    for config in (other, elsewhere):
        with prepared.sealing(config, pipelines.private_data(config)):
            tiny_dataset(pipelines.private_data(config))
    tree = place / "runs/reproduce/0a1b/tree"
    # copies of killed `dvc exp run --queue` and `--temp`; their seals use the project's own secret
    copies = [place / ".dvc/tmp/exps/tmp0a1b", place / ".dvc/tmp/exps/standalone/tmp2c3d"]
    for root, parts in [(tree, ("outputs", "runs/working", "runs/.key"))] + [
        (copy, ("outputs", "runs/working")) for copy in copies
    ]:
        for part in parts:
            take = shutil.copytree if (place / part).is_dir() else shutil.copy2
            (root / part).parent.mkdir(parents=True, exist_ok=True)
            take(place / part, root / part)
    folders = [pipelines.private_data(config) for config in (mine, other)]
    roots = (place, tree, *copies)
    held = [*(root / folder.relative_to(place) for root in roots for folder in folders), prepared.caches(other)]
    spared = [root / pipelines.private_data(elsewhere).relative_to(place) for root in roots]
    prepared.look(mine)
    assert all(path.exists() for path in (*held, *spared))
    CHANGES[change](place / "pictures")
    prepared.look(mine)
    assert not any(path.exists() for path in held)
    assert all(path.exists() for path in spared)


@pytest.mark.parametrize("content", ["", "{", '"an earlier form"', "[]", '{"seal": "0"}', '{"origin": "x"}'])
def test_a_broken_seal_of_another_experiment_stops_nobody_and_of_this_one_counts_as_none(place, content):
    mine = own_config(place / "pictures")
    other = load("standin", {}, f"{TINY} data.source=folder data.path={place / 'pictures'}")
    for config in (other, mine):
        prepared.private_folder(prepared.caches(config))
        (prepared.caches(config) / prepared.SEAL).write_text(content)
        assert not prepared._is_sealed(config, prepared._pictures(config))
    prepared.look(mine)
    assert not pipelines.private_data(mine).exists()
    assert not prepared.caches(mine).exists()
    assert prepared.caches(other).exists()


def test_a_seal_from_before_there_were_captions_still_holds_and_still_names_its_folder(place):
    """Otherwise an update would forget from which other datasets a withdrawn picture must go."""
    mine = own_config(place / "pictures")
    file = prepared.caches(mine) / prepared.SEAL
    seal = read_json(file)
    for name in prepared.CAPTIONS:
        del seal["origin"][name]
    write_json(file, seal)
    prepared.look(mine)
    assert pipelines.private_data(mine).exists()
    other = load("standin", {}, f"{TINY} data.source=folder data.path={place / 'pictures'}")
    for ending in (".png", ".txt"):
        (place / f"pictures/x/3{ending}").unlink()
    prepared.look(other)
    assert not pipelines.private_data(mine).exists()


def test_a_class_that_another_experiment_lacks_removes_its_dataset_and_refuses_nothing_here(place):
    """Otherwise the folder's new class would stop this experiment with an error about another one's classes."""
    one_more = load("standin", {}, f"{TINY} data.source=folder data.path={place / 'pictures'} data.classes=[x,y,z]")
    draw(place / "pictures/z/0.png", 7)
    prepared.look(one_more)
    assert not pipelines.private_data(own_config(place / "pictures")).exists()


def test_a_dataset_that_is_put_back_is_not_taken_for_the_prepared_one(place):
    config = own_config(place / "pictures")
    data = pipelines.private_data(config)
    tiny_dataset(data, n=41)
    prepared.look(config)
    assert not data.exists()


def test_pictures_of_a_prepare_that_was_killed_are_removed(place):
    config = own_config(place / "pictures")
    left = pipelines.private_data(config).with_name(".data.0a1b2c3d.tmp")
    left.mkdir()
    with prepared.sealing(config, pipelines.private_data(config)):
        assert not left.exists()


def test_a_folder_that_changes_while_it_is_prepared_is_refused(place):
    config = own_config(place / "pictures")
    data = pipelines.private_data(config)
    with pytest.raises(InputError, match="changed while they were prepared"), prepared.sealing(config, data):
        CHANGES["removed"](place / "pictures")


def test_a_change_of_the_folder_meanwhile_is_told_on_the_terminal_alone(place):
    config = own_config(place / "pictures")
    with pytest.raises(InputError) as caught, prepared.sealing(config, pipelines.private_data(config)):
        CHANGES["removed"](place / "pictures")
    assert "changed" not in caught.value.public


def test_the_seal_tells_nothing_to_whoever_has_the_pictures_and_not_the_key(place):
    config = own_config(place / "pictures")
    seal = prepared.caches(config) / prepared.SEAL
    before = seal.read_text()
    assert fingerprint(place / "pictures", Stated(("x", "y"))) not in before
    (place / "runs/.key").unlink()
    with prepared.sealing(config, pipelines.private_data(config)):
        pass
    assert seal.read_text() != before


def test_pictures_of_other_sources_are_not_looked_at(place):
    config = load("mnist5k", {}, TINY)
    (prepared.caches(config) / prepared.SEAL).unlink()
    prepared.look(config)
    assert pipelines.private_data(config).exists()


def project_of_own_pictures(folder: Path, pictures: Path) -> Path:
    sections = asdict(tiny_config(f"{LITTLE} data.source=folder data.path={pictures}"))
    del sections["experiment"]["name"]
    clone(ROOT, folder)
    (folder / f"configs/{EXPERIMENT}.yaml").write_text(yaml.safe_dump(sections), encoding="utf-8")
    commit_all(folder)
    return folder


class Typed:
    """A project in which a user types commands, and the files that they prepare and keep."""

    def __init__(self, root: Path, pictures: Path) -> None:
        self.root, self.pictures = root, pictures

    def ok(self, *arguments: str) -> str:
        result = run(self.root, *arguments)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
        return result.stdout + result.stderr

    def refused(self, *arguments: str) -> str:
        result = run(self.root, *arguments)
        assert result.returncode != 0
        return result.stdout + result.stderr

    @property
    def data(self) -> Path:
        return self.root / f"outputs/{EXPERIMENT}/data"

    def prepared(self) -> dict[str, str]:
        """SHA-256 of each prepared picture, by its name."""
        table = pq.read_table(self.data / "metadata.parquet").to_pydict()
        return dict(zip(table["file_name"], table["sha256"], strict=True))

    def ledgers(self) -> dict[str, bytes]:
        return {path.parent.name: path.read_bytes() for path in self.root.glob("runs/*/ledger.jsonl")}

    def latents(self) -> set[Path]:
        return set((self.root / "runs/working/private").rglob("*.npy"))

    def holds(self, digest: str) -> list[Path]:
        """Files of the whole project, DVC's cache included, that hold this picture."""
        files = [path for path in self.root.rglob("*") if path.is_file() and not path.is_symlink()]
        return [path for path in files if digest_file(path) == digest]


@pytest.mark.slow
def test_prepare_typed_again_sees_every_change_and_nothing_brings_a_withdrawn_picture_back(tmp_path):
    pictures = fill(tmp_path / "pictures")
    typed = Typed(project_of_own_pictures(tmp_path / "project", pictures), pictures)
    again = ("entrypoints.prepare", "--config", EXPERIMENT)
    typed.ok(*again)
    first = typed.prepared()
    assert len(first) == 40
    assert typed.holds(first["x/3.png"]) == [typed.data / "images/x/3.png"]

    CHANGES["removed"](pictures)
    change_in_place(pictures / "x/4.png")
    move(pictures / "x/5.png", pictures / "x/renamed.png")
    typed.ok(*again)
    now = typed.prepared()
    assert set(first) - set(now) == {"x/3.png", "x/5.png"}
    assert set(now) - set(first) == {"x/renamed.png"}
    assert now["x/4.png"] != first["x/4.png"]
    for name in ("x/3.png", "x/4.png"):
        assert typed.holds(first[name]) == []

    shutil.rmtree(typed.root / f"outputs/{EXPERIMENT}")
    typed.ok("dvc", "repro", "prepare")
    assert typed.prepared() == now
    before = (typed.data / "metadata.parquet").stat().st_mtime_ns
    typed.ok("dvc", "repro", "prepare")
    assert (typed.data / "metadata.parquet").stat().st_mtime_ns == before  # without a change nothing is done

    CHANGES["broken"](pictures)
    assert "x/new.png: not a picture of a known format" in typed.refused("dvc", "repro", "prepare")
    assert not typed.data.exists()


@pytest.mark.slow
def test_finetune_main_and_dvc_repro_look_before_anything_is_spent(tmp_path):
    pictures = fill(tmp_path / "pictures")
    typed = Typed(project_of_own_pictures(tmp_path / "project", pictures), pictures)
    finetune = ("entrypoints.finetune", "--config", EXPERIMENT)
    typed.ok(*finetune)
    first, spent, kept = typed.prepared(), typed.ledgers(), typed.latents()
    assert len(spent) == len(kept) == 1

    move(pictures / "x/0.png", None)
    said = typed.ok(*finetune)
    assert f"outputs/{EXPERIMENT}/data, runs/working/private/{EXPERIMENT}: removed" in said
    assert set(first) - set(typed.prepared()) == {"x/0.png"}
    assert not kept & typed.latents()
    begun = typed.ledgers()
    assert len(begun) == 2  # another dataset gets another ledger
    assert spent.items() <= begun.items()

    typed.ok("entrypoints.main", "--config", EXPERIMENT)
    assert "nothing to do" in typed.ok("entrypoints.main", "--config", EXPERIMENT)
    scored = list((typed.root / "runs/working/private").rglob("evaluation/*"))
    assert scored
    begun = typed.ledgers()
    move(pictures / "y/0.png", None)
    # --single-item leaves out the first stage, which looks for changes: the stage itself must refuse
    said = typed.refused("dvc", "repro", "--single-item", "--force", "finetune")
    assert "data.path has changed since it was prepared; type the same command again" in said
    assert typed.ledgers() == begun
    said = typed.refused("dvc", "repro", "--single-item", "--force", "fid")
    assert "data.path has changed since it was prepared; type the same command again" in said

    typed.ok("dvc", "repro")
    assert set(first) - set(typed.prepared()) == {"x/0.png", "y/0.png"}
    assert not [path for path in scored if path.name.startswith("real-") and path.exists()]
    assert len(typed.ledgers()) == len(begun) + 1
    move(pictures / "y/1.png", None)
    typed.ok("entrypoints.main", "--config", EXPERIMENT)
    assert set(first) - set(typed.prepared()) == {"x/0.png", "y/0.png", "y/1.png"}
    for name in ("x/0.png", "y/0.png", "y/1.png"):
        assert typed.holds(first[name]) == []
