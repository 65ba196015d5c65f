"""Runs made again: the comparison calls the right files equal, and some runs are refused with a reason."""

import json
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from dp_lora.commands import reproduce
from dp_lora.config import ROOT
from dp_lora.files import digest_file, digest_folder
from dp_lora.reproduction import compare, digests, manifest


def two_makings(tmp_path):
    folders = []
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "facts.json").write_text(json.dumps({"run_id": number, "scores": [1, {"run_id": number}]}))
        save_file({"a": np.full(3, 1.0, np.float32)}, folder / "weights.safetensors")
        folders.append(folder)
    return folders


def words(before, after):
    return {
        comparison.file: (comparison.equal, comparison.words)
        for comparison in compare(manifest(before), before, after, str.upper)
    }


def test_equal_files_are_equal_and_a_run_s_own_id_does_not_count(tmp_path):
    before, after = two_makings(tmp_path)
    assert words(before, after) == {
        "facts.json": (True, "equal but for run_id"),
        "weights.safetensors": (True, "equal"),
    }


def test_a_difference_is_named_with_its_size(tmp_path):
    before, after = two_makings(tmp_path)
    save_file({"a": np.array([1.0, 1.5, 1.0], np.float32)}, after / "weights.safetensors")
    (after / "facts.json").write_text(json.dumps({"run_id": 2, "scores": 3}))
    (after / "more.txt").write_text("")
    found = words(before, after)
    assert found["weights.safetensors"] == (False, "different by at most 0.5")
    assert found["facts.json"][0] is False
    assert "scores" in found["facts.json"][1]
    assert found["more.txt"] == (False, "not there in the first making")
    assert words(after, before)["more.txt"] == (False, "missing in the second making")


def test_a_changed_first_making_is_not_compared_with(tmp_path):
    before, after = two_makings(tmp_path)
    recorded = manifest(before)
    for folder, value in ((before, 2.0), (after, 3.0)):
        save_file({"a": np.full(3, value, np.float32)}, folder / "weights.safetensors")
    found = {comparison.file: comparison.words for comparison in compare(recorded, before, after, str.upper)}
    assert found["weights.safetensors"] == "different; the first making's file is gone"


def with_private(folder, picture):
    (folder / "data").mkdir(parents=True)
    (folder / "data/anna").write_bytes(picture)
    (folder / "public.json").write_text("{}")
    return folder


def sign(digest):
    return f"keyed {digest}"


def test_of_a_private_folder_one_signed_digest_is_kept_and_compared(tmp_path):
    before, after = (with_private(tmp_path / name, b"picture") for name in ("before", "after"))
    recorded = digests(before, [before / "data"], sign)
    assert recorded == {
        "data/": f"keyed {digest_folder(before / 'data')}",
        "public.json": digest_file(before / "public.json"),
    }
    assert [one.equal for one in compare(recorded, before, after, sign)] == [True, True]
    assert digests(before, [before], sign) == {"./": f"keyed {digest_folder(before)}"}
    # a changed picture is named while the first result still exists, later its folder alone
    (after / "data/anna").write_bytes(b"another")
    (found,) = (one for one in compare(recorded, before, after, sign) if not one.equal)
    assert found == ("data/anna", False, "different")
    (before / "data/anna").unlink()
    (found,) = (one for one in compare(recorded, before, after, sign) if not one.equal)
    assert found == ("data/", False, "different; the first making's files are gone")


HEAD = {"mlflow.source.git.commit": "0" * 40, "lock_digest": "0", "output": "outputs/x", "stage": "pretrain_ae"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


def in_a_process(run_id):
    command = [sys.executable, "-m", "dp_lora", "reproduce", run_id]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def here(run_id):
    done = CliRunner().invoke(reproduce.main, [run_id])
    return done.exit_code, done.stderr


@pytest.mark.parametrize(
    ("tags", "status", "reason", "call"),
    [
        (HEAD | {"dirty": "true"}, "FINISHED", "its tree was dirty", in_a_process),
        (HEAD | {"dirty": "false"}, "FINISHED", "is not in this repository", here),
        ({"stage": "pretrain_ae"}, "FINISHED", "lock_digest, output not recorded", here),
        (HEAD | {"dirty": "false"}, "FAILED", "it is FAILED", here),
    ],
)
def test_a_run_that_cannot_be_made_again_is_refused_with_the_reason(store, monkeypatch, tags, status, reason, call):
    from mlflow import MlflowClient

    client = MlflowClient(store)
    run_id = client.create_run("0", tags=tags).info.run_id
    client.set_terminated(run_id, status)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    status_of_exit, stderr = call(run_id)
    assert status_of_exit == 1
    assert stderr.startswith(f"error: {run_id}: cannot be made again: ")
    assert reason in stderr
    assert not (ROOT / "runs" / "reproduce" / run_id).exists()
