"""A pipeline of the Hub, through the Hub's client and a server of the test's own; every fault gives one line."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import constants
from PIL import Image

from dp_lora.config import ROOT
from dp_lora.data.hub_base import fetch_base, outline_base
from dp_lora.errors import InputError
from dp_lora.events import Events
from dp_lora.files import read_json
from dp_lora.models.folder import load_model
from dp_lora.models.memory import memory_line
from dp_lora.models.shapes import base_shapes
from tests.support.download_server import Server, serving
from tests.support.prepare_call import clone
from tests.support.text2image import text_config
from tests.support.tiny_pipelines import make_pipeline
from tests.support.tiny_project import run

REPO, REVISION = "somebody/tiny-sd", "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("hub") / "sd", "sd")


def listed(files: dict[str, bytes]) -> bytes:
    siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
    return json.dumps({"id": REPO, "sha": REVISION, "siblings": siblings}).encode()


def put(server: Server, files: dict[str, bytes]) -> None:
    server.files = {f"/{REPO}/resolve/{REVISION}/{name}": content for name, content in files.items()}
    server.files[f"/api/models/{REPO}/revision/{REVISION}"] = listed(files)


@pytest.fixture
def files(made) -> dict[str, bytes]:
    found = {p.relative_to(made).as_posix(): p.read_bytes() for p in sorted(made.rglob("*")) if p.is_file()}
    # files that nobody needs: variants, pickles beside safetensors, pictures
    return found | {
        "unet/diffusion_pytorch_model.fp16.safetensors": b"half",
        "unet/diffusion_pytorch_model.bin": b"pickle",
        "picture.png": b"png",
    }


@pytest.fixture
def hub(monkeypatch, files) -> Iterator[Server]:
    with serving() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        put(server, files)
        yield server


def fetch(folder: Path) -> None:
    fetch_base(REPO, REVISION, folder, Events())


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as error:
        fetch(folder)
    assert not folder.exists()
    return str(error.value)


def names_got(server: Server) -> set[str]:
    mark = f"/resolve/{REVISION}/"
    return {path.partition(mark)[2] for method, path, _ in server.requests if method == "GET" and mark in path}


def test_what_a_pipeline_is_loaded_from_comes_and_nothing_else(hub, files, made, tmp_path):
    folder = tmp_path / "data/base"
    fetch(folder)
    got = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert got == (files.keys() - {"unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin",
                                   "picture.png"}) | {"source.json"}  # fmt: skip
    for ours, theirs in zip(
        load_model(folder).denoiser.parameters(), load_model(made).denoiser.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)
    source = read_json(folder / "source.json")
    assert (source["origin"], source["revision"]) == (REPO, REVISION)
    hub.requests.clear()
    fetch(folder)
    assert hub.requests == []


def test_the_disk_that_a_download_needs_is_said_before_the_first_weight_comes(hub, files, tmp_path):
    got = {}

    class Heard(Events):
        def message(self, text):
            got[text] = {name for name in names_got(hub) if name.endswith(".safetensors")}

    fetch_base(REPO, REVISION, tmp_path / "base", Heard())
    (line,) = [text for text in got if "to download to" in text]
    assert got.pop(line) == set()
    assert all(len(names) > 1 for names in got.values())  # what is said at the end is said after the weights


def test_a_broken_download_is_resumed_by_the_client(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    fetch_small = {name for name in hub.files if name.endswith((".json", ".txt"))}
    hub.cut = [10**9] * (len(fetch_small) + 2) + [2000]  # the first answers stay whole
    fetch(tmp_path / "base")
    assert [asked for _, _, asked in hub.requests if asked]
    load_model(tmp_path / "base")


def test_a_gated_repository_is_one_line_and_a_token_opens_it(hub, tmp_path, monkeypatch):
    hub.token = "hf_secret"
    line = refused(tmp_path / "base")
    assert "HF_TOKEN" in line
    assert "secret" not in line
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch(tmp_path / "base")


def test_pickles_alone_foreign_code_and_other_classes_are_refused_before_any_weight_comes(hub, files, tmp_path):
    weights = "unet/diffusion_pytorch_model.safetensors"
    index = json.loads(files["model_index.json"])
    for changed, part in (
        ({name: content for name, content in files.items() if name != weights}, "pickled weights alone"),
        (files | {"unet/mine.py": b"import os"}, "code of its own"),
        (files | {"model_index.json": json.dumps(index | {"_class_name": "OtherPipeline"}).encode()}, "must be one of"),
        ({name: content for name, content in files.items() if name != "model_index.json"}, "no model_index.json"),
    ):
        put(hub, changed)
        hub.requests.clear()
        assert part in refused(tmp_path / part.replace(" ", "-"))
        assert not [name for name in names_got(hub) if name.endswith(".safetensors")]


def test_offline_a_base_that_is_not_here_is_one_line(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused(tmp_path / "base")
    assert hub.requests == []


def test_an_outline_counts_as_its_pipeline_does_and_takes_neither_weights_nor_room(hub, files, made, tmp_path):
    folder = tmp_path / "outline"
    folder.mkdir()
    outline_base(REPO, REVISION, folder)
    asked = [part for method, path, part in hub.requests if method == "GET" and path.endswith(".safetensors")]
    assert asked
    assert set(asked) == {"bytes=0-100000"}  # enough for a header
    assert not [name for name in names_got(hub) if name.endswith((".txt", ".model"))]
    config = text_config(f"model.base={made}")
    outlined, whole = base_shapes(config, folder), base_shapes(config, made)
    assert (outlined.denoiser, outlined.vae, outlined.family) == (whole.denoiser, whole.vae, whole.family)
    assert memory_line(config, folder, outlined) == memory_line(config, made, whole)
    sizes = {p.relative_to(made).as_posix(): p.stat().st_size for p in made.rglob("*") if p.is_file()}
    del sizes["model_index.json"]
    assert read_json(folder / "outline.json") == {"bytes": sum(sizes.values())}
    lying = sum(path.stat().st_blocks * 512 for path in folder.rglob("*.safetensors"))
    assert lying < sum(size for name, size in sizes.items() if name.endswith(".safetensors")) / 2
    with pytest.raises(InputError, match="an outline of a pipeline, without weights"):
        load_model(folder)


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("import_base", "to download to data/somebody--tiny-sd-0123456789ab, "),
        pytest.param("finetune", "base: StableDiffusionPipeline; its unet is adapted", marks=pytest.mark.slow),
    ],
)
def test_a_dry_run_says_its_facts_before_any_weight_is_downloaded(hub, tmp_path, monkeypatch, stage, words):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a thing")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    settings = (
        f"data.path={tmp_path} data.n_public=400 data.size=32 model.base={REPO} model.revision={REVISION} "
        "model.privacy_status=public sampling.prompts=sun privacy.batch_size=40 compute.device=cpu"
    )
    command = importlib.import_module(f"dp_lora.commands.{stage}").main
    done = CliRunner().invoke(command, ["--config", "text2image", "--dry-run", "--overrides", settings])
    assert done.exit_code == 0, done.output
    assert words in done.stdout
    if stage == "finetune":
        assert "first: data/somebody--tiny-sd-0123456789ab: missing; type the same overrides with `import_base`" in (
            done.stdout
        )
    assert not (ROOT / "data/somebody--tiny-sd-0123456789ab").exists()
    assert not [part for _, path, part in hub.requests if path.endswith(".safetensors") and part != "bytes=0-100000"]


@pytest.mark.slow
def test_import_base_brings_it_and_a_dry_run_says_so_first(hub, tmp_path):
    project = clone(ROOT, tmp_path / "project")
    (project / "pictures").mkdir()
    (project / "pictures/a.png").write_bytes(b"")
    (project / "pictures/a.txt").write_text("a thing")
    settings = (
        f"data.path=pictures data.n_public=400 data.size=32 model.base={REPO} model.revision={REVISION} "
        "model.privacy_status=public sampling.prompts=sun privacy.batch_size=40 compute.device=cpu"
    )
    given = ("--config", "text2image", "--overrides", settings)
    early = run(project, "dp_lora", "finetune", *given)
    assert early.returncode == 1
    assert "import_base" in early.stderr
    brought = run(project, "dp_lora", "import_base", *given, HF_ENDPOINT=hub.url)
    assert brought.returncode == 0, brought.stderr[-3000:]
    assert f"data/somebody--tiny-sd-{REVISION[:12]} is {REPO} at {REVISION}: StableDiffusionPipeline" in brought.stdout
    dry = run(project, "dp_lora", "count_params", *given, "--dry-run")
    assert dry.returncode == 0, dry.stderr
