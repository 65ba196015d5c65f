"""`fid` on samples that are training pictures: results that show this are marked private, for the operator alone."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from dp_lora.config import load, write_resolved
from dp_lora.data.layout import Picture, read_dataset, write_dataset
from dp_lora.data.letters import letter_pictures
from dp_lora.data.png import encode_png
from dp_lora.files import digest_folder, read_json, write_json
from dp_lora.models.info import model_digest
from dp_lora.sampling import SPLIT
from tests.support.kept import everything, is_named
from tests.support.project_root import use_root
from tests.support.tiny import TINY, make_base, make_release, tiny_config, tiny_dataset
from tests.support.tracking_store import all_runs

LITTLE = (
    f"{TINY} model.base=base evaluation.classifier_steps=2 evaluation.min_images=8 evaluation.membership=true "
    "compute.device=cpu"
)
COPIES = ("exact_copies", "near_copies", "near_copies_held_out", "near_copies_base")
OF_BOTH = ("nearer_than_held_out", "nearer_than_held_out_pixels")
MEMBERSHIP = ("membership_auc", "membership_tpr_at_1pct_fpr")
SHARES = (
    *OF_BOTH, *(f"{name}_base" for name in OF_BOTH), *MEMBERSHIP, *(f"{name}_beside" for name in MEMBERSHIP)
)  # fmt: skip
PUBLIC = {"samples", "epsilon", "delta", "rank", "k", "max_grad_norm"}


def lay_out(root: Path) -> None:
    """Write base, release, private and public pictures, and samples that are the private training pictures."""
    config = tiny_config()
    make_base(root / "base", config)
    own = root / "outputs/mnist5k"
    make_release(root / "base", own / "finetune/release")
    make_release(root / "base", own / "beside", private=False)
    tiny_dataset(own / "data", 60)
    write_dataset(root / "outputs/letters/data", letter_pictures(12, ["A", "B", "C"], 0, 16, 1), {}, 16, 1, packed=True)
    real = read_dataset(own / "data", ["x", "y"], "train")
    images, names = real.images(slice(None)), [real.classes[label] for label in real.labels]
    rows = [
        Picture(f"{i}.png", name, SPLIT, encode_png(image))
        for i, (image, name) in enumerate(zip(images, names, strict=True))
    ]
    write_dataset(own / "samples", rows, {}, 16, 1, packed=True)
    facts = {"classes": ["x", "y"], "rank": 2, "adapter": "outputs/mnist5k/finetune/release"}
    facts["base"] = {"path": "base", "digest": model_digest(root / "base")}
    write_json(own / "samples/samples.json", facts | {"privacy": read_json(own / "finetune/release/privacy.json")})


def fid(root: Path, beside: Path | None = None):
    main = importlib.import_module("dp_lora.commands.fid").main
    beside = beside or root / "outputs/mnist5k/beside"
    write_resolved(load("mnist5k", {}, f"{LITTLE} evaluation.membership_beside={beside}"), root / "resolved.yaml")
    given = ("--resolved", str(root / "resolved.yaml"), "--out", str(root / "outputs/mnist5k/evaluation"))
    return CliRunner().invoke(main, given)


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    root = tmp_path_factory.mktemp("house")
    with pytest.MonkeyPatch.context() as patch:
        client = use_root(root, patch)
        patch.setattr("dp_lora.evaluation.membership.DRAWS", 2)
        lay_out(root)
        released = digest_folder(root / "outputs/mnist5k/finetune")
        result = fid(root)
        assert result.exit_code == 0, result.output
        (run,) = all_runs(client)
        yield SimpleNamespace(root=root, run=run, released=released, said=result.output, client=client)


def test_the_copies_are_found_and_each_number_that_reads_private_pictures_is_named_private(house):
    metrics = house.run.data.metrics
    assert metrics["exact_copies"] == metrics["near_copies"] == metrics["samples"] == 48
    assert metrics["nearer_than_held_out"] == metrics["nearer_than_held_out_pixels"] == 1
    wanted = {*COPIES, "precision", "recall", *(f"{name}{end}" for name in SHARES for end in ("", "_low", "_high"))}
    assert wanted <= metrics.keys()
    assert {name for name in metrics if not is_named(name, house.run)} <= PUBLIC
    table = read_json(house.root / "outputs/mnist5k/evaluation/table.json")
    assert {row["metric"] for row in table if not row["private"]} == {"samples"}
    (precision,) = (row["meaning"] for row in table if row["metric"] == "precision")
    assert "k=3, 12 samples, 12 real test pictures, features: classifier of the public pictures" in precision


def test_an_adapter_beside_is_asked_for_its_members_on_the_same_base_without_the_first(house):
    # both adapters hold the same weights: the second would score otherwise, were it put on top of the first
    metrics = house.run.data.metrics
    for name in MEMBERSHIP:
        assert metrics[f"{name}_beside"] == metrics[name]


def test_an_adapter_of_another_base_cannot_stand_beside(house):
    other = make_release(house.root / "base", house.root / "foreign")
    info = read_json(other / "model.json")
    write_json(other / "model.json", info | {"base": {**info["base"], "digest": "0" * 64}})
    result = fid(house.root, other)
    assert result.exit_code == 1
    said = f"evaluation.membership_beside={other}: is of another base than the samples' adapter"
    assert said in result.output


def test_the_pairs_lie_beside_the_private_caches_alone(house):
    pairs = list(house.root.rglob("nearest_pairs*"))
    assert [path.parent.relative_to(house.root).as_posix() for path in pairs] == [
        "runs/working/private/mnist5k/evaluation"
    ]
    assert pairs[0].stat().st_mode & 0o777 == 0o600
    assert f"{pairs[0].name}: samples beside the nearest training pictures; for your eyes alone" in house.said
    stored = dict(everything(house.root))
    assert not [name for name in stored if "nearest_pairs" in name]
    assert not [name for name, content in stored.items() if b"nearest_pairs" in content]


def test_the_plot_is_in_the_private_folder_and_nothing_is_added_to_the_release(house):
    assert (house.root / "outputs/mnist5k/evaluation/nearest_distances.png").stat().st_mode & 0o777 == 0o600
    stored = [name for name, _ in everything(house.root) if name.endswith("nearest_distances.png")]
    assert stored
    assert all("/evaluation/" in name for name in stored)
    assert is_named("evaluation", house.run)
    assert digest_folder(house.root / "outputs/mnist5k/finetune") == house.released


def test_samples_of_an_adapter_that_another_one_replaced_have_no_membership(house):
    path = house.root / "outputs/mnist5k/samples/samples.json"
    facts = read_json(path)
    write_json(path, facts | {"privacy": {**facts["privacy"], "run_id": "1" * 32}})
    result = fid(house.root)
    write_json(path, facts)
    assert result.exit_code == 1
    said = "evaluation.membership=true: outputs/mnist5k/finetune/release, which drew the samples, is gone"
    assert said in result.output
