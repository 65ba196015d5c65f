"""Errors that command line, config, a listing or a small file can show come without importing torch, MLflow or DVC."""

import json
import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

from dp_lora.config import ROOT

OWN = "data.n_public=2000 privacy.batch_size=200 compute.device=cpu"
CALLS = """
import importlib, json, subprocess, sys, time

class Heavy:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "mlflow", "dvc"):
            raise AssertionError(f"{name} is imported")

sys.meta_path.insert(0, Heavy())

def started(*arguments, **options):
    raise AssertionError(f"{arguments} is started")

subprocess.Popen = started
from click.testing import CliRunner
for stage, *arguments in json.loads(sys.argv[1]):
    before = time.process_time()
    result = CliRunner().invoke(importlib.import_module(f"dp_lora.commands.{stage}").main, arguments)
    error = None if isinstance(result.exception, SystemExit) else repr(result.exception)
    print(json.dumps([result.exit_code, result.stdout, result.stderr, error, time.process_time() - before]))
"""


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (200, 200)).save(path)


def test_what_cannot_be_done_is_refused_in_one_line_before_anything_heavy_is_imported_or_started(tmp_path):
    for name in ("cat", "dog", "bird"):
        picture(tmp_path / "pictures" / name / "a.png")
    picture(tmp_path / "broken/cat/a.png")
    (tmp_path / "broken/cat/b.png").write_bytes(b"no picture")
    (tmp_path / "table").mkdir()
    (tmp_path / "table/metadata.csv").write_text("file_name,class\na.png,cat\n")
    (tmp_path / "persons").mkdir()
    (tmp_path / "persons/metadata.csv").write_text("file_name,label\na.png,cat\n")
    (tmp_path / "base").mkdir()
    (tmp_path / "base/model.json").write_text('{"size": 64, "channels": 3}')

    def own(folder: str, more: str = "") -> list[str]:
        path = f"data.path={tmp_path}/{folder} data.classes=[cat, dog]"
        return ["--config", "folder", "--overrides", f"{path} {OWN} {more}".strip()]

    def base(name: str) -> list[str]:
        return ["--overrides", f"compute.device=cpu model.base={tmp_path}/{name}"]

    picture(tmp_path / "bare/cat/a.png")
    picture(tmp_path / "texts/a.png")
    (tmp_path / "texts/a.txt").write_text("a caption")
    path = f"data.path={tmp_path}/texts data.captions=true data.classes=[]"
    texts = ["--config", "folder", "--overrides", f"{path} {OWN}"]
    captioned = ["--config", "text2image", "--overrides", f"{path} {OWN} model.base=none sampling.prompts=a"]
    parent = ["--overrides", f"compute.device=cpu privacy.parent={tmp_path}"]
    another_size = ["--overrides", "compute.device=cpu data.size=64"]
    cases = [
        *((stage, own("pictures"), "class 'bird' is not in data.classes") for stage in ("main", "prepare", "finetune")),
        *((stage, own("broken"), "b.png: not a picture of a known format") for stage in ("main", "prepare")),
        ("main", own("table"), "no column 'label'"),
        ("prepare", own("persons", "privacy.unit=person"), "no column 'person'"),
        ("fid", own("nowhere"), "no such folder"),
        ("finetune", texts, "this base learns classes, not captions"),
        (
            "main",
            own("bare", "data.captions=true"),
            "no caption: 'cat/a.png'; write each into NAME.txt beside NAME.png",
        ),
        *((stage, base("base"), "pictures of 64 pixels and 3 channels") for stage in ("main", "finetune")),
        *((stage, base("none"), "no such folder") for stage in ("main", "finetune")),
        *((stage, captioned, "model.base=none: no such folder") for stage in ("main", "finetune", "count_params")),
        *((stage, base("pictures"), "model.json: cannot be read") for stage in ("main", "finetune")),
        ("main", another_size, "the base is for pictures of 32 pixels"),
        *((stage, parent, "holds no adapter") for stage in ("main", "finetune")),
        *((stage, ["--adapter", str(tmp_path)], "holds no adapter") for stage in ("sample", "export")),
        ("fid", ["--samples", str(tmp_path)], "holds no samples"),
    ]
    calls = [(stage, *arguments, *more) for stage, arguments, _ in cases for more in ([], ["--dry-run"])]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    environment.pop("MLFLOW_RUN_ID", None)
    command = [sys.executable, "-c", CALLS, json.dumps(calls)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    expected = [says for *_, says in cases for _ in range(2)]
    for call, (status, out, line, error, seconds), says in zip(calls, told, expected, strict=True):
        assert (status, out, error) == (1, "", None), call
        assert line.startswith("error: "), call
        assert says in line, call
        assert line.count("\n") == 1, call
        assert seconds < 2, call
    assert not (tmp_path / "mlflow.db").exists()
