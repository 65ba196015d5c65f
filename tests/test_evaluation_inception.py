"""clean-fid's real code with a small random TorchScript network in Inception's place; the check of its digest."""

import http.server
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from dp_lora.data import download
from dp_lora.errors import InputError
from dp_lora.evaluation import inception as module
from dp_lora.evaluation.frechet import frechet_distance, statistics
from dp_lora.evaluation.inception import NAME, SHA256, Inception, fetch_weights, inception_distances
from dp_lora.events import Events
from dp_lora.files import digest_file
from tests.support.inception import write_stand_in


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("weights") / "inception.pt"
    return path, write_stand_in(path)


def pictures(n, seed, channels=1, brightness=0):
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 200, (n, 4, 4, channels), dtype=np.uint8)
    return (coarse.repeat(4, axis=1).repeat(4, axis=2) + np.uint8(brightness)).astype(np.uint8)


def test_features_are_those_of_clean_fid_s_own_path(weights, tmp_path):
    from cleanfid.fid import get_files_features
    from PIL import Image

    folder = fetch_weights(str(weights[0]), tmp_path / "cache", Events(), weights[1])
    inception = Inception(folder, torch.device("cpu"))
    images = pictures(5, 0)
    for i, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(tmp_path / f"{i}.png")
    files = [str(tmp_path / f"{i}.png") for i in range(5)]
    expected = get_files_features(
        files, inception.network, num_workers=0, device=torch.device("cpu"), verbose=False, mode="clean"
    )
    found = inception.features([images[:3], images[3:]], "test")
    assert found.shape == (5, 2048)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.slow
def test_fid_and_kid_are_clean_fid_s_and_leave_numpy_s_random_state_alone(weights, tmp_path):
    inception = Inception(fetch_weights(str(weights[0]), tmp_path, Events(), weights[1]), torch.device("cpu"))
    real = inception.features([pictures(40, 0)], "real")
    other = inception.features([pictures(40, 1, brightness=50)], "other")
    np.random.seed(5)
    expected = np.random.random()
    np.random.seed(5)
    found = inception_distances(other, real, min_images=40)
    assert np.random.random() == expected
    # an independent formula for the same distance
    assert found["fid"] == pytest.approx(frechet_distance(statistics([other]), statistics([real])), rel=1e-4)
    x, y = other.astype(np.float64), real.astype(np.float64)

    def kernel(a, b):
        return (a @ b.T / 2048 + 1) ** 3

    # each subset of 40 is the whole set of 40, so KID is the unbiased estimate itself
    within = sum((k.sum() - np.trace(k)) / (40 * 39) for k in (kernel(x, x), kernel(y, y)))
    assert found["kid"] == pytest.approx(within - 2 * kernel(x, y).mean(), rel=1e-6)


@pytest.mark.parametrize("source", ["weights.pt", "http"])
def test_a_file_of_another_digest_is_refused_before_anything_opens_it(weights, tmp_path, source, monkeypatch):
    monkeypatch.setattr(torch.jit, "load", lambda *args, **kwargs: pytest.fail("opened"))
    (tmp_path / "weights.pt").write_bytes(weights[0].read_bytes() + b"x")
    with served(tmp_path) as address:
        name = f"{address}/weights.pt" if source == "http" else str(tmp_path / source)
        with pytest.raises(InputError, match=rf"SHA-256 is [0-9a-f]{{64}}, must be {weights[1]}"):
            fetch_weights(name, tmp_path / "cache", Events(), weights[1])
    assert not list((tmp_path / "cache").rglob("*.pt"))


def test_the_real_digest_is_the_default(weights, tmp_path):
    assert SHA256 == "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
    with pytest.raises(InputError, match=SHA256):
        fetch_weights(str(weights[0]), tmp_path, Events())


def test_a_cached_copy_that_was_changed_is_replaced(weights, tmp_path):
    folder = fetch_weights(str(weights[0]), tmp_path, Events(), weights[1])
    (folder / NAME).write_bytes(b"something else")
    fetch_weights(str(weights[0]), tmp_path, Events(), weights[1])
    assert digest_file(folder / NAME) == weights[1]


class served:
    """A web server for one folder on this machine; gives its address and counts requests."""

    def __init__(self, folder: Path) -> None:
        self.requests = 0
        outer = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *args) -> None:
                outer.requests += 1

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))

    def __enter__(self) -> str:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}"

    def __exit__(self, *args) -> None:
        self.server.shutdown()
        self.server.server_close()


def test_weights_come_from_an_address_once(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = served(weights[0].parent)
    with server as address:
        for _ in range(2):
            folder = fetch_weights(f"{address}/{weights[0].name}", tmp_path, Events(), weights[1])
    assert server.requests == 1
    assert digest_file(folder / NAME) == weights[1]


def test_more_bytes_than_the_weights_may_have_are_not_kept_and_no_password_is_shown(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 100)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with served(weights[0].parent) as address, pytest.raises(InputError, match="more than 100 bytes"):
        fetch_weights(f"{address}/{weights[0].name}", tmp_path, Events(), weights[1])
    assert [path.stat().st_size for path in tmp_path.rglob("*") if path.suffix in (".pt", ".part")] == []
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    with pytest.raises(InputError, match=r"inception_weights=http://127.0.0.1:9/inception.pt: ") as caught:
        fetch_weights("http://anna:word@127.0.0.1:9/inception.pt", tmp_path, Events(), weights[1])
    assert "word" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "nowhere/inception.pt",
        "http://127.0.0.1:9/inception.pt",
        "file:///etc/hostname",
        "http://[x/i.pt",
        "http://127.0.0.1:x/i.pt",
    ],
)
def test_weights_that_cannot_be_had_are_one_line(source, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(InputError, match=r"evaluation\.inception_weights=") as caught:
        fetch_weights(source, tmp_path, Events())
    assert "\n" not in str(caught.value)


def test_too_few_and_nan_are_refused():
    good = np.random.default_rng(0).standard_normal((10, 4)).astype(np.float32)
    with pytest.raises(InputError, match=r"too few images.*at least 10"):
        inception_distances(good[:9], good, min_images=10)
    with pytest.raises(InputError, match="NaN"):
        inception_distances(np.full_like(good, np.nan), good, min_images=10)
