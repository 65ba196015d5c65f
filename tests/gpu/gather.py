"""`make gpu-wheels`: what a GPU machine's own Python lacks beside its torch, unpacked into a folder for PYTHONPATH.

gather.py FOLDER PYTHON: versions and hashes are those of requirements.lock; PYTHON (3.12) is the machine's. Such a
machine is taken to have torch, torchvision, numpy, scipy, pyarrow, peft, lightning, matplotlib and pytest.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
UV = Path(sys.executable).with_name("uv")
PLATFORM = "x86_64-manylinux_2_28"
MOST = 60e6  # bytes
# what the imports of `pytest -m gpu` need; MLflow and DVC are not among them
PACKAGES = (
    *("diffusers", "importlib-metadata", "zipp"),
    *("opacus", "opt-einsum"),
    *("omegaconf", "antlr4-python3-runtime"),
    "click",
)


def pinned(lock: str, packages: tuple[str, ...]) -> str:
    """The entries of `lock` for `packages`: each with its version and all of its hashes."""
    entries = dict(re.findall(r"^(([a-z0-9.\-]+)==[^\n]*\n(?:    [^\n]*\n)*)", lock, flags=re.MULTILINE))
    by_name = {name: entry for entry, name in entries.items()}
    return "".join(by_name[package] for package in packages)


def gather(folder: Path, python: str) -> None:
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    command = [UV, "pip", "install", "--quiet", "--no-deps", "--require-hashes", "--python", sys.executable]
    command += ["--target", new, "--python-version", python, "--python-platform", PLATFORM, "--requirements", "-"]
    requirements = pinned((ROOT / "requirements.lock").read_text(encoding="utf-8"), PACKAGES)
    if subprocess.run(command, input=requirements, text=True, check=False).returncode:
        sys.exit("error: the wheels could not be had (see above); the network is needed here, not on the GPU machine")
    size = sum(path.stat().st_size for path in new.rglob("*") if path.is_file())
    if size > MOST:
        sys.exit(f"error: {new} has {size / 1e6:.0f} MB; must have at most {MOST / 1e6:.0f}")
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
    print(f"{folder}: {size / 1e6:.0f} MB for Python {python} on the GPU machine")


if __name__ == "__main__":
    gather(Path(sys.argv[1]), sys.argv[2])
