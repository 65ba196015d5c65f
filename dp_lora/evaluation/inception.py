"""clean-fid's Frechet and kernel distances (Parmar et al. 2022, arXiv 2104.11222), on its own Inception weights."""

import re
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dp_lora.data.download import download, shown_url
from dp_lora.errors import InputError
from dp_lora.events import Events
from dp_lora.files import digest_file, exclusive, whole_file
from dp_lora.progress import progress

NAME = "inception-2015-12-05.pt"  # clean-fid looks for this name in a folder
SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
MAX_BYTES = 500_000_000
FEATURES = 2048
BATCH_SIZE = 32


def fetch_weights(source: str, cache_folder: Path, events: Events, sha256: str = SHA256) -> Path:
    """Bring the weights, a local path or an http(s) address, into the cache; returns the folder for clean-fid.

    A TorchScript archive can hold code, so nothing is opened before its SHA-256 has been compared: the copy in the
    cache is the compared file, and it is compared again at every call. Raises InputError for a missing file,
    a failed download and for any other content.
    """
    folder = Path(cache_folder) / f"inception-{sha256[:16]}"
    cached = folder / NAME
    if cached.is_file() and digest_file(cached) == sha256:
        return folder
    shown = f"evaluation.inception_weights={shown_url(source)}"
    with exclusive(folder.with_name(f"{folder.name}.lock"), wait=True), whole_file(cached) as temporary:
        if re.match(r"https?://", source):
            brought = folder / f"{NAME}.download"
            try:
                download(source, brought, events, MAX_BYTES)
            except InputError as error:
                raise InputError(f"evaluation.inception_weights={error}; or name a local copy of {NAME}") from None
            brought.replace(temporary)
        elif not Path(source).is_file():
            raise InputError(
                f"{shown}: no such file; name a local copy of {NAME} or its "
                "http(s) address, or null for a Frechet distance on letter features"
            )
        else:
            temporary.write_bytes(Path(source).read_bytes())
        found = digest_file(temporary)
        if found != sha256:
            raise InputError(f"{shown}: is not {NAME}: its SHA-256 is {found}, must be {sha256}")
    return folder


class Inception:
    """clean-fid's feature network, from a folder that `fetch_weights` returned."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        # clean-fid's own builder would load any file that lies in /tmp, unchecked
        from cleanfid.inception_torchscript import InceptionV3W

        self.device = device
        self.network = InceptionV3W(str(folder), download=False).to(device).eval()

    def features(self, batches: Iterable[NDArray[np.uint8]], description: str) -> NDArray[np.float32]:
        """Features (n, 2048) of images uint8 (n, H, W, C): clean-fid's antialiased resize to 299, then its network."""
        from cleanfid.fid import get_batch_features
        from cleanfid.resize import build_resizer

        resize = build_resizer("clean")
        found = []
        with progress(desc=description, unit="image", leave=False) as bar:
            for batch in batches:
                for start in range(0, len(batch), BATCH_SIZE):
                    part = batch[start : start + BATCH_SIZE]
                    rgb = np.broadcast_to(part, (*part.shape[:3], 3))
                    pixels = np.stack([resize(image).transpose(2, 0, 1) for image in rgb])
                    found.append(get_batch_features(torch.from_numpy(pixels), self.network, self.device))
                    bar.update(len(part))
        return np.concatenate(found)


def inception_distances(
    features: NDArray[np.float32], reference: NDArray[np.float32], min_images: int
) -> dict[str, float]:
    """`fid` and `kid` of two feature sets (n, 2048), by clean-fid's own functions.

    KID is its mean over 100 random subsets, drawn here from a fixed seed. Raises InputError for fewer than
    `min_images` images on a side and for features that are not finite.
    """
    from cleanfid.fid import fid_from_feats, kernel_distance

    for side in (features, reference):
        if len(side) < min_images:
            raise InputError(
                f"fid: too few images; at least {min_images} are needed on each side (evaluation.min_images)"
            )
        if not np.isfinite(side).all():
            raise InputError("fid: NaN or infinite Inception features; the images or the weights are broken")
    features, reference = features.astype(np.float64), reference.astype(np.float64)  # all sums from here on
    state = np.random.get_state()
    np.random.seed(0)
    try:
        with warnings.catch_warnings():
            # scipy's sqrtm(disp=...), gone in SciPy 1.18; singular covariances, usual below 2,048 images
            warnings.filterwarnings("ignore", module="cleanfid")
            fid = float(fid_from_feats(features, reference))
        kid = kernel_distance(features, reference)
    finally:
        np.random.set_state(state)
    if not np.isfinite([fid, kid]).all():
        raise InputError("fid: the statistics give NaN; compute the features again")
    return {"fid": fid, "kid": kid}
