"""A full disk or a limit on file sizes: one error names the file or folder, and no file is half-written."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dp_lora.config import ROOT
from dp_lora.files import reserve

# each writes to `place` through another library, and exceeds a limit of 1,000 bytes
WRITERS = {
    "text": "with whole_file(place) as made: made.write_text('x' * 5000)",
    "json": "write_json(place, list(range(5000)))",
    "tensors": "with whole_folder(place) as made: save_file({'a': np.zeros(5000)}, made / 'a.safetensors')",
    "arrays": "with whole_file(place) as made: np.savez(made, a=np.zeros(5000))",
    "zip": "with whole_file(place) as made, zipfile.ZipFile(made, 'w') as file: file.writestr('a', 'x' * 5000)",
    "picture": "with whole_file(place) as made: Image.effect_noise((99, 99), 9).save(made)",
    "table": "with whole_file(place) as made: pq.write_table(pa.table({'a': np.random.rand(999)}), made)",
    "copied file": "with whole_file(place) as made: shutil.copyfile(source / 'large', made)",
    "copied folder": "with whole_folder(place) as made: shutil.copytree(source, made / 'in')",
    "ledger": "append_line(place, 'x' * 5000)",
}
SCRIPT = """
import os, resource, shutil, sys, zipfile
from pathlib import Path
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors.numpy import save_file
from dp_lora.files import append_line, full_disk, whole_file, whole_folder, write_json
root = Path(sys.argv[1])
source = root / "source"
source.mkdir()
(source / "large").write_bytes(bytes(5000))
for number, text in enumerate(sys.argv[2:]):
    place = root / f"written-{number}{'.npz' if 'savez' in text else '.png'}"  # by which libraries choose
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
        exec(text)
    except OSError as error:
        print(error.filename == str(place), full_disk(error) is not None, error.strerror)
    except Exception as error:
        print(type(error).__name__, error)
    else:
        print("written")
"""


def test_every_way_of_writing_names_what_did_not_fit_and_leaves_nothing(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), *WRITERS.values()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = dict(zip(WRITERS, done.stdout.splitlines(), strict=True))
    assert told == dict.fromkeys(WRITERS, "True True File too large") | {"ledger": "True True No space left on device"}
    left = {path.name: path.stat().st_size for path in tmp_path.iterdir() if path.name != "source"}
    assert left == {f"written-{len(WRITERS) - 1}.png": 0}


def test_what_cannot_be_reserved_is_refused_before_it_is_written_and_named(tmp_path, monkeypatch):
    def full(descriptor: int, offset: int, size: int) -> None:
        assert (offset, size) == (0, 900)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "a").write_bytes(bytes(900))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/a'"):
        reserve(tmp_path / "a")


@pytest.fixture
def little_disk(request, tmp_path) -> Iterator[Path]:
    """A disk of its own, of 300k or the size that a test gives."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={getattr(request, 'param', '300k')}", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


ENCODE = """
import sys
from pathlib import Path
from dp_lora.cli.common import one_line_errors
from dp_lora.data.latents import encode_dataset
from dp_lora.data.layout import read_dataset
from dp_lora.events import Events
from dp_lora.models.folder import load_model
from tests.support.text2image import captions_of, text_config
from tests.support.tiny import tiny_config, tiny_dataset, tiny_model
from tests.support.tiny_pipelines import make_pipeline
home, place = map(Path, sys.argv[1:])
tiny_dataset(home / "data", n=1000)
data = read_dataset(home / "data", tiny_config().data.classes, "train")
vae, model = tiny_model(home).vae, load_model(make_pipeline(home / "base", "sd"))
texts = [[str(number)] for number in range(1000)]
for encode in (
    lambda: encode_dataset(data, vae, place / "latents", "cpu", 256, Events()),
    lambda: captions_of(text_config(), model, place / "captions", texts),
):
    try:
        with one_line_errors():
            encode()
    except SystemExit as ended:
        print(ended.code)
"""


def test_a_disk_that_is_full_while_pictures_or_captions_are_encoded_is_one_line_that_names_the_file(
    tmp_path, little_disk
):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", ENCODE, str(tmp_path), str(little_disk)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "1\n1\n"), (done.returncode, done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    for kind, line in zip(("latents", "captions"), lines, strict=True):
        assert line.startswith(f"error: No space left on device: {little_disk}/{kind}/")
        assert line.endswith("; make room, then the same command goes on")


TRACK = """
import errno, os, sys
from pathlib import Path
from dp_lora import tracking
from dp_lora.cli.common import one_line_errors
from dp_lora.config import load
from dp_lora.tracking import store
from tests.support.tracking_store import empty_store
place = Path(sys.argv[1])

def fill():
    with (place / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)) == 4096:
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC

def told(work):
    try:
        with one_line_errors():
            work()
    except SystemExit as ended:
        print(ended.code)

def opened():
    with tracking.run("prepare", load("mnist5k")):
        pass

def kept():
    with tracking.run("prepare", load("mnist5k")) as run:
        fill()
        run.params({f"key{number}": "x" * 400 for number in range(90)})

os.environ["MLFLOW_TRACKING_URI"] = store.sqlite_uri(place / "new.db")
fill()
told(opened)  # the store is to be made
for left in place.iterdir():
    left.unlink()
os.environ["MLFLOW_TRACKING_URI"] = store.sqlite_uri(place / "mlflow.db")
(place / "mlflow.db").write_bytes(empty_store().read_bytes())
told(kept)
told(opened)
"""


@pytest.mark.slow
@pytest.mark.parametrize("little_disk", ["4m"], indirect=True)
def test_a_disk_that_is_full_under_the_tracking_store_is_one_line_that_names_its_folder(little_disk):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("MLFLOW_RUN_ID", None)
    command = [sys.executable, "-c", TRACK, str(little_disk)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "1\n1\n1\n"), (done.returncode, done.stderr)
    line = f"error: No space left on device: {little_disk}; make room, then the same command goes on"
    assert done.stderr.splitlines() == [line] * 3
