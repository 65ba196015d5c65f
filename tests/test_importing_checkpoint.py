"""A checkpoint is a pickle from the internet: it may hold known types alone, and nothing in it ever runs."""

import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from dp_lora.errors import InputError
from dp_lora.models.importing import import_model, read_state_dict
from dp_lora.models.importing.checkpoint import Inert
from tests.support.golden import GOLDEN, NAMES, checkpoint, golden_config

HOSTILE = GOLDEN / "hostile"
BENIGN = HOSTILE / "benign-lightning14-callbacks-cuda.ckpt"
# words that each file's error line must have
REFUSED = {
    "open-call.pkl": "cannot be read as a checkpoint",
    "os-system.pkl": "cannot be read as a checkpoint",
    "payload-in-callbacks.ckpt": "io.open",
    "payload-in-state-dict.ckpt": "eval",
    "payload-legacy-format.ckpt": "cannot be read as a checkpoint",
    "truncated.ckpt": "cannot be read as a checkpoint",
    "no-state-dict.ckpt": "holds no state_dict",
    "nan-weights.ckpt": "holds NaN",
}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """An empty current directory: a payload that runs writes PWNED into it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as error:
        import_model(path, golden_config("emnist"), "0" * 64)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


def saved(content: object, name: str = "model.ckpt") -> Path:
    torch.save(content, name)
    return Path(name).absolute()


def test_the_table_names_every_hostile_file():
    assert {path.name for path in HOSTILE.iterdir()} == {*REFUSED, BENIGN.name}


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_file_is_refused_in_one_line_and_nothing_runs(name, empty_folder, capfd):
    assert REFUSED[name] in refusal(HOSTILE / name)
    assert not list(empty_folder.iterdir())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["open-call.pkl", "payload-in-callbacks.ckpt", "payload-in-state-dict.ckpt"])
def test_the_payloads_are_real(name, empty_folder):
    """Read as pickles, the payloads do write: the files refused above are really dangerous."""
    if name.endswith(".pkl"):
        with (HOSTILE / name).open("rb") as file:
            pickle.load(file)
    else:
        torch.load(HOSTILE / name, weights_only=False)
    assert (empty_folder / "PWNED").exists()


def test_lightning_s_own_classes_become_inert_and_tensors_of_a_gpu_come_to_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(pickle.UnpicklingError, match="pytorch_lightning"):
        torch.load(BENIGN, map_location="cpu", weights_only=True)
    state = read_state_dict(BENIGN)
    assert set(state) == {"betas", "w"}
    assert {tensor.device.type for tensor in state.values()} == {"cpu"}


def test_an_inert_object_takes_whatever_a_pickle_gives_it_and_keeps_nothing():
    made = Inert(1, two=3)
    made.__setstate__({"best_model_path": "x"})
    assert vars(made) == {}
    assert type(Inert.__new__(Inert, "a", "b")) is Inert


@pytest.mark.parametrize("name", NAMES)
def test_the_tiny_checkpoints_are_read_whole(name):
    plain = torch.load(checkpoint(name), weights_only=True)["state_dict"]
    state = read_state_dict(checkpoint(name))
    assert list(state) == list(plain)
    assert all(torch.equal(state[key], plain[key]) for key in plain)


def test_a_class_that_only_sounds_like_lightning_is_refused():
    whole = BENIGN.read_bytes()
    evil = Path("evil.ckpt")
    with zipfile.ZipFile(BENIGN) as archive, zipfile.ZipFile(evil, "w") as copy:
        for member in archive.infolist():
            content = archive.read(member)
            copy.writestr(member, content.replace(b"pytorch_lightning.callbacks.", b"pytorch_lightning_evil.cbs."))
    assert b"pytorch_lightning.callbacks." in whole
    assert "pytorch_lightning_evil.cbs.model_checkpoint.ModelCheckpoint" in refusal(evil)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (3, "is a int"),
        ("x", "is a str"),
        (torch.eye(3).to_sparse(), "not a plain tensor"),
        (torch.zeros(2, dtype=torch.complex64), "not a plain tensor"),
    ],
)
def test_anything_but_a_plain_tensor_in_the_state_dict_is_refused_by_key(value, shown):
    message = refusal(saved({"state_dict": {"good": torch.zeros(1), "bad": value}}))
    assert "'bad'" in message
    assert shown in message


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {}}, {"state_dict": [torch.zeros(1)]}, torch.zeros(3)])
def test_a_file_without_a_state_dict_is_refused(content):
    assert "holds no state_dict" in refusal(saved(content))


def test_a_cut_a_missing_and_a_compressed_file_are_refused(empty_folder):
    whole = checkpoint("emnist").read_bytes()
    cut = empty_folder / "cut.ckpt"
    for length in (0, 1000, len(whole) // 2, len(whole) - 1000):
        cut.write_bytes(whole[:length])
        assert "cannot be read as a checkpoint" in refusal(cut)
    assert "no such file" in refusal(empty_folder / "none.ckpt")
    packed = empty_folder / "packed.ckpt"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**6))
    assert "compressed archive" in refusal(packed)
    html = empty_folder / "page.ckpt"
    html.write_text("<html>not found</html>")
    assert "cannot be read as a checkpoint" in refusal(html)


def test_the_old_format_of_torch_save_is_read_too():
    torch.save({"state_dict": {"w": torch.arange(3.0)}}, "old.ckpt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_state_dict(Path("old.ckpt"))["w"], torch.arange(3.0))
