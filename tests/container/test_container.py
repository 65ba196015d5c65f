"""`mlflow run` in the container, for real: figures, files, owners, kills and resume, read back from server and host.

Run by `make test-container`: needs Docker (as root it starts the daemon itself), 20 GB of disk for image and build
cache, and the package registry or a built image.
"""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from dp_lora.config import ROOT
from dp_lora.tracking.provenance import environment_tags
from tests.support.container_house import HOST_STORE_FOLDER, IMAGE, must
from tests.support.kubernetes_job import container, docker_arguments, job
from tests.support.tracking_server import free_port

pytestmark = pytest.mark.container

LONG = "epochs=100"  # 500 steps


def test_the_image_names_its_commit_and_lock_and_runs_without_root(image):
    (described,) = json.loads(must(["docker", "image", "inspect", IMAGE]))
    labels = described["Config"]["Labels"]
    assert re.match(r"[0-9a-f]{40}", labels["org.opencontainers.image.revision"])
    assert labels["dp-lora.lock"] == environment_tags()["lock_digest"]
    assert described["Config"]["User"] not in ("", "root", "0")
    history = must(["docker", "history", "--no-trunc", "--format", "{{.CreatedBy}}", IMAGE])
    assert "://" not in history


def test_nothing_of_the_build_s_secrets_lies_in_the_image(image):
    listing = "ls -A /run/secrets /var/cache/dp-lora || true"
    found = must(["docker", "run", "--rm", "--network", "none", IMAGE, "sh", "-c", listing])
    assert not re.search(r"^ca$", found, flags=re.MULTILINE)
    assert "uv" not in found


def test_torch_compile_works_in_the_image_without_a_network(image):
    code = "import torch; print(torch.compile(lambda x: torch.sin(x) + 1)(torch.zeros(3)).sum().item())"
    user = ["--network", "none", "--user", "4321:4321"]
    assert must(["docker", "run", "--rm", *user, IMAGE, "python", "-c", code]).strip() == "3.0"


def test_doctor_finds_every_package_in_the_image_and_says_where_docker_is_asked_for(image):
    mounted = ["--network", "none", "--volume", f"{ROOT}:/mlflow/projects/code"]
    user = ["--user", f"{os.getuid()}:{os.getgid()}"]
    found = must(["docker", "run", "--rm", *mounted, *user, IMAGE, "python", "-m", "dp_lora.doctor"])
    states = {line[6:21].strip(): line[:6].strip() for line in found.splitlines()}
    assert states["python"] == states["packages"] == "ok"
    assert "wrong" not in states.values()


def test_main_makes_everything_in_the_container_and_dvc_on_the_host_finds_it_up_to_date(house, made, image):
    run = house.client.get_run(made)
    assert run.info.status == "FINISHED"
    assert run.data.params["config"] == "emnist-tiny"
    assert 0 < run.data.metrics["epsilon"] <= 10
    assert run.data.metrics["delta"] == 1e-3
    assert run.data.metrics["rank"] == 2
    children = [r for r in house.runs() if r.data.tags.get("mlflow.parentRunId") == made]
    assert {"pretrain_ae", "pretrain_ldm", "finetune", "sample", "fid"} <= {r.data.tags["stage"] for r in children}
    for each in [run, *children]:
        assert each.info.status == "FINISHED"
        assert each.data.tags["image_digest"] == image
        assert each.data.tags["lock_digest"] == environment_tags()["lock_digest"]
        assert each.data.tags["dirty"] == "false"
    released = house.client.get_model_version_by_alias("dp-lora-emnist-tiny", "eps10")
    assert released.run_id in {child.info.run_id for child in children}
    status = json.loads(house.native("dvc", "status", "--json", "pipelines/emnist/dvc.yaml"))
    assert all(reasons == ["always changed"] for reasons in status.values()), status
    again = house.mlflow_run("main", "config=emnist-tiny")
    assert again.returncode == 0, again.stderr[-2000:]
    assert "nothing to do" in again.stdout


def test_finetune_sample_and_fid_hand_over_by_run_id_and_log_artifacts_and_datasets(house, made):
    finetuned = house.mlflow_run("finetune", "config=emnist-tiny", "eps=5")
    assert finetuned.returncode == 0, finetuned.stdout[-2000:] + finetuned.stderr[-2000:]
    finetune = house.last_run("finetune")
    assert finetune.data.params["eps"] == "5"
    assert finetune.data.params["privacy.eps"] == "5.0"
    assert 0 < finetune.data.metrics["epsilon"] <= 5
    assert (finetune.data.metrics["delta"], finetune.data.metrics["rank"]) == (1e-3, 2)
    assert sorted(i.dataset.name for i in finetune.inputs.dataset_inputs) == ["base", "emnist-tiny"]
    names = {file.path for file in house.client.list_artifacts(finetune.info.run_id)}
    assert {"config.yaml", "release"} <= names
    files = {Path(file.path).name for file in house.client.list_artifacts(finetune.info.run_id, "release")}
    assert {"privacy.json", "pytorch_lora_weights.safetensors", "class_embedding.safetensors"} <= files

    sampled = house.mlflow_run("sample", "config=emnist-tiny", f"adapter={finetune.info.run_id}")
    assert sampled.returncode == 0, sampled.stderr[-2000:]
    sample = house.last_run("sample")
    assert sample.info.status == "FINISHED"
    assert any(file.path.endswith(".png") for file in house.client.list_artifacts(sample.info.run_id))
    scored = house.mlflow_run("fid", "config=emnist-tiny", f"samples={sample.info.run_id}")
    assert scored.returncode == 0, scored.stderr[-2000:]
    fid = house.last_run("fid")
    assert 0 <= fid.data.metrics["accuracy"] <= 1
    assert "letter_frechet_distance" in fid.data.metrics
    assert fid.inputs.dataset_inputs


def test_a_seeded_fine_tuning_gives_the_same_bits_natively_and_in_the_container(house, made, second_project):
    seed = "privacy.reproducible=true privacy.seed_file=seed"
    for project in (house.project, second_project):
        (project / "seed").write_bytes(b"s" * 32)
        (project / "seed").chmod(0o600)
        house.give_to_user(project / "seed")
    adapters = []
    for project, backend in ((house.project, "local"), (second_project, "native")):
        result = house.mlflow_run(
            "finetune", "config=emnist-tiny", f"overrides={seed}", project=project, backend=backend
        )
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
        run = house.last_run("finetune")
        assert ("image_digest" in run.data.tags) == (backend == "local")
        adapters.append(project / run.data.tags["adapter"])
    for name in ("pytorch_lora_weights.safetensors", "class_embedding.safetensors", "peft/adapter_model.safetensors"):
        in_container, native = ((adapter / name).read_bytes() for adapter in adapters)
        assert in_container == native, name


def test_the_kubernetes_job_s_command_trains_in_the_image_confined_as_its_pod_is(
    house, made, second_project, monkeypatch
):
    """No cluster: Docker starts the very words that the pod would start, as its user, on a read-only root."""
    # an override with a blank arrives quoted, and so do the empty parameters
    parameters = {"config": "emnist-tiny", "eps": "5", "overrides": "compute.device=cpu train.lr=0.011"}
    run = house.client.create_run("0")
    variables = {"MLFLOW_TRACKING_URI": house.server, "MLFLOW_RUN_ID": run.info.run_id, "MLFLOW_EXPERIMENT_ID": "0"}
    definition = job("finetune", parameters, variables, monkeypatch)
    user = definition["spec"]["template"]["spec"]["securityContext"]["runAsUser"]
    if os.getuid() == 0:
        must(["chown", "--recursive", f"{user}:{user}", second_project])
    confined = ["docker", "run", "--rm", "--network", "host", *docker_arguments(definition, str(second_project))]
    must([*confined, IMAGE, *container(definition)["command"]])
    done = house.client.get_run(run.info.run_id)
    assert done.info.status == "FINISHED"
    assert done.data.params["privacy.eps"] == "5.0"
    assert done.data.params["train.lr"] == "0.011"
    assert 0 < done.data.metrics["epsilon"] <= 5
    assert (second_project / done.data.tags["adapter"] / "privacy.json").exists()


def stop_in_the_first_steps(house, entry, *parameters, stop, **values):
    """Start an entry point, stop it by `stop(process, container)` in its first steps; what it said, the ledger then."""
    before = house.ledgers()
    process = house.start(entry, "config=emnist-tiny", LONG, *parameters, **values)
    ledger, text = house.wait_for_steps(before, process)
    (container,) = house.containers()
    stop(process, container)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output, container, (ledger, text)


def test_ctrl_c_ends_container_and_run_and_a_secret_is_shown_nowhere(house, made):
    shown = []

    def stop(process, _container):
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                shown.append(path.read_bytes())
            except OSError:
                continue
        os.killpg(process.pid, signal.SIGINT)

    status, output, container, _ = stop_in_the_first_steps(
        house, "finetune", "eps=3", stop=stop, MLFLOW_TRACKING_TOKEN="a-token-of-the-test"
    )
    assert status != 0
    house.wait_for_end(container)
    run = house.last_run("finetune")
    assert run.info.status in ("FAILED", "KILLED")
    assert any(b"MLFLOW_TRACKING_TOKEN" in line for line in shown)
    assert not any(b"a-token-of-the-test" in line for line in shown)
    assert "a-token-of-the-test" not in output + str(run.data)


def test_docker_stop_ends_the_run(house, made):
    status, _, _, _ = stop_in_the_first_steps(
        house, "finetune", "eps=6", stop=lambda _, container: must(["docker", "stop", "--time", "30", container])
    )
    assert status != 0
    assert house.last_run("finetune").info.status in ("FAILED", "KILLED")


def test_main_killed_by_docker_kill_goes_on_with_its_ledger_and_its_dead_stage_is_closed(house, made):
    status, _, _, (ledger, text) = stop_in_the_first_steps(
        house, "main", "eps=4", stop=lambda _, container: must(["docker", "kill", container])
    )
    assert status != 0
    assert house.last_run("main").info.status in ("FAILED", "KILLED")
    dead = house.last_run("finetune").info.run_id
    result = house.mlflow_run("main", "config=emnist-tiny", "eps=4", LONG)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert house.client.get_run(dead).info.status == "KILLED"
    after = ledger.read_text(encoding="utf-8")
    assert after.startswith(text)
    run = house.last_run("main")
    assert run.info.status == "FINISHED"
    assert 0 < run.data.metrics["epsilon"] <= 4


def test_out_of_memory_ends_the_run(house, made):
    result = subprocess.run(
        house.command("finetune", "config=emnist-tiny", "eps=7", arguments=["-A", "memory=200m"]),
        cwd=house.project, env=house.environment(), capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert result.returncode != 0
    newest = house.runs()[0]
    assert newest.data.params["eps"] == "7"
    assert newest.info.status in ("FAILED", "KILLED")


def test_a_container_that_outlives_mlflow_run_goes_on_and_once_killed_is_closed_by_the_next_command(house, made):
    def stop(process, container):
        process.terminate()
        process.wait(timeout=60)
        time.sleep(2)
        assert container in house.containers()
        must(["docker", "kill", container])
        house.wait_for_end(container)

    stop_in_the_first_steps(house, "finetune", "eps=8", stop=stop)
    orphan = house.last_run("finetune")
    house.native("entrypoints.count_params", "--config", "emnist-tiny")
    assert house.client.get_run(orphan.info.run_id).info.status in ("FAILED", "KILLED")


def test_without_a_tracking_uri_the_run_is_in_the_project_s_own_store_beside_an_open_ui(house, made):
    first = house.mlflow_run("count_params", "config=emnist-tiny", MLFLOW_TRACKING_URI="")
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    store = f"sqlite:///{house.project}/mlflow.db"
    served = ["--backend-store-uri", store, "--host", "127.0.0.1", "--port", str(free_port()), "--workers", "1"]
    ui = subprocess.Popen(
        ["mlflow", "server", *served],
        cwd=house.project, env=house.environment(MLFLOW_TRACKING_URI=""), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        main = house.mlflow_run("main", "config=emnist-tiny", "eps=9", MLFLOW_TRACKING_URI="")
        assert main.returncode == 0, main.stdout[-2000:] + main.stderr[-3000:]
        assert ui.poll() is None
    finally:
        os.killpg(ui.pid, signal.SIGTERM)
        ui.wait(timeout=30)
    client = MlflowClient(store)
    runs = house.runs(client=client)
    assert {run.info.status for run in runs} == {"FINISHED"}
    stages = {run.data.tags["stage"]: run for run in runs}
    assert {"main", "count_params", "finetune", "sample", "fid"} <= set(stages)
    assert 0 < stages["main"].data.metrics["epsilon"] <= 9
    for stage in ("main", "finetune", "sample", "fid"):
        names = {file.path for file in client.list_artifacts(stages[stage].info.run_id)}
        assert "config.yaml" in names, stage
    assert not HOST_STORE_FOLDER.is_dir() or not any(HOST_STORE_FOLDER.iterdir())


def test_a_sqlite_store_outside_of_the_project_is_refused_in_one_line(house, made):
    elsewhere = f"sqlite:///{house.project.parent}/elsewhere.db"
    result = house.mlflow_run("count_params", "config=emnist-tiny", MLFLOW_TRACKING_URI=elsewhere)
    assert result.returncode != 0
    assert "error: tracking store: in a container only a server" in result.stdout + result.stderr


def test_a_config_that_asks_for_cuda_stops_in_one_line_without_gpus(house, made):
    result = house.mlflow_run("finetune", "config=emnist-tiny", "overrides=compute.device=cuda")
    assert result.returncode != 0
    lines = [line for line in (result.stdout + result.stderr).splitlines() if line.startswith("error: ")]
    assert lines == [
        "error: compute.device=cuda: PyTorch sees no GPU here; start the container with `mlflow run . -A gpus=all`, "
        "or set overrides='compute.device=cpu' to go on without one"
    ]
    assert house.runs()[0].info.status == "FAILED"


def test_every_file_that_the_containers_wrote_is_the_caller_s(house, made):
    owners = {path: path.lstat().st_uid for path in house.project.rglob("*")}
    assert {path: owner for path, owner in owners.items() if owner != house.user} == {}
