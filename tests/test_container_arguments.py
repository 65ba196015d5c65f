"""The arguments that MLproject's volume entry adds to `docker run`, and the store as code in the container finds it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from dp_lora import __version__
from dp_lora.config import ROOT
from dp_lora.errors import InputError
from dp_lora.models.device import pick_device
from dp_lora.tracking import provenance, store

IMAGE = f"localhost/dp-lora:{__version__}"


def added(folder: Path, **values: str) -> list[str]:
    """Words that the host's shell makes of MLproject's volume entries, in `folder`, with a docker that answers."""
    (folder / "docker").mkdir(parents=True, exist_ok=True)
    (folder / "bin").mkdir(exist_ok=True)
    script = folder / "docker" / "run_arguments.py"
    script.write_bytes((ROOT / "docker/run_arguments.py").read_bytes())
    script.chmod(0o755)
    docker = folder / "bin" / "docker"
    docker.write_text("#!/bin/sh\necho sha256:123\n", encoding="utf-8")
    docker.chmod(0o755)
    volumes = yaml.safe_load((ROOT / "MLproject").read_text(encoding="utf-8"))["docker_env"]["volumes"]
    environment = {"PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.defpath}", **values}
    command = f"printf '%s\\n' {volumes[0]} {volumes[1]}"
    result = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return result.stdout.splitlines()


def test_the_caller_s_user_the_host_s_network_and_the_image_s_digest_reach_docker_run(tmp_path):
    project = tmp_path / "with blank"
    words = added(project)
    assert words[:2] == [f"{project}:/mlflow/projects/code", f"{project}:{project}"]
    assert words[2:] == [
        *("--network", "host", "--pid", "host", "--user", f"{os.getuid()}:{os.getgid()}"),
        *("--env", "DPLORA_IMAGE=sha256:123"),
    ]


def test_secrets_reach_docker_run_by_name_alone(tmp_path):
    words = added(tmp_path, MLFLOW_TRACKING_TOKEN="of my own", HF_TOKEN="another")
    assert words[-4:] == ["--env", "MLFLOW_TRACKING_TOKEN", "--env", "HF_TOKEN"]
    assert "of my own" not in " ".join(words)


def test_flags_of_one_s_own_take_the_place_of_user_and_network(tmp_path):
    words = added(tmp_path, DPLORA_DOCKER_ARGS="--network host")
    assert words[2:] == ["--network", "host", "--env", "DPLORA_IMAGE=sha256:123"]


def test_the_artifact_folder_of_a_local_store_is_made_by_the_caller(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    run = client.create_run(client.create_experiment("x", artifact_location=(tmp_path / "kept here").as_uri()))
    added(tmp_path, MLFLOW_TRACKING_URI=uri, MLFLOW_RUN_ID=run.info.run_id)
    assert (tmp_path / "kept here" / run.info.run_id / "artifacts").is_dir()


def test_mlflow_s_mount_of_its_default_store_is_the_project_s_own_and_another_is_refused(tmp_path, monkeypatch):
    mounted, project = tmp_path / "mounted", tmp_path / "project"
    project.mkdir()
    monkeypatch.setattr(store, "DOCKER_STORE", mounted)
    monkeypatch.setattr(store, "PROJECT", project)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{mounted}")
    own = project / "mlflow.db"
    own.write_bytes(b"")
    mounted.mkdir()
    assert store.tracking_uri() == f"sqlite:///{own}"
    mounted.rmdir()
    os.link(own, mounted)
    assert store.tracking_uri() == f"sqlite:///{own}"
    mounted.unlink()
    mounted.write_bytes(b"")
    with pytest.raises(InputError, match="only a server or the project's own"):
        store.tracking_uri()


def test_a_run_names_the_lock_and_in_a_container_the_image(tmp_path, monkeypatch):
    native = provenance.environment_tags()
    assert set(native) == {"lock_digest"}
    assert len(native["lock_digest"]) == 64
    (tmp_path / "lock").write_bytes(b"")
    monkeypatch.setenv("DPLORA_LOCK", str(tmp_path / "lock"))
    monkeypatch.setenv("DPLORA_IMAGE", "sha256:123")
    tags = provenance.environment_tags()
    assert tags["image_digest"] == "sha256:123"
    assert tags["lock_digest"].startswith("e3b0c44298fc1c14")


def test_an_image_older_than_the_name_of_its_lock_is_refused_in_one_line(monkeypatch):
    monkeypatch.setenv("DP_LORA_LOCK", "x")
    with pytest.raises(InputError, match=r"^DP_LORA_LOCK: .* make image$"):
        provenance.environment_tags()


def test_a_missing_gpu_in_a_container_names_docker_s_flag(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("DPLORA_LOCK", "x")
    with pytest.raises(InputError, match="-A gpus=all"):
        pick_device("cuda")


def test_compose_and_mlproject_name_one_image():
    services = yaml.safe_load((ROOT / "docker/compose.yaml").read_text(encoding="utf-8"))["services"]
    assert {service["image"] for service in services.values()} == {IMAGE}
