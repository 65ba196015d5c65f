"""The Kubernetes job that MLflow makes of the template fits the schema, is confined, and calls the entry point."""

import copy
import shlex
import subprocess
import sys

import pytest
import yaml
from kubernetes_validate import ValidationError, validate

from dp_lora import __version__
from dp_lora.cli.quoted import QUOTED, as_typed
from dp_lora.config import ROOT, STAGES
from tests.support.kubernetes_job import FOLDER, container, job, typed

VERSIONS = ("1.28", "1.37")  # of Kubernetes: an old one that is still in use, and the newest that the validator knows
PARAMETERS = {"eps": "5", "overrides": "data.classes=[cat, dog] train.lr=0.02"}
VARIABLES = {"MLFLOW_RUN_ID": "0" * 32, "MLFLOW_TRACKING_URI": "http://mlflow:5000", "MLFLOW_EXPERIMENT_ID": "1"}


@pytest.fixture
def made(monkeypatch):
    return job("finetune", PARAMETERS, VARIABLES, monkeypatch)


def volume_and_pod():
    found = list(yaml.safe_load_all((FOLDER / "project.yaml").read_text(encoding="utf-8")))
    assert [one["kind"] for one in found] == ["PersistentVolumeClaim", "Pod"]
    return found


def pod_of(definition):
    return definition["spec"]["template"]["spec"]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_job_that_mlflow_makes_keeps_to_the_schema_of_kubernetes(made, version):
    assert validate(made, version, strict=True) == version


@pytest.mark.parametrize("version", VERSIONS)
def test_the_volume_and_the_pod_that_fills_it_keep_to_the_schema_of_kubernetes(version):
    for one in volume_and_pod():
        validate(one, version, strict=True)


def test_a_key_that_is_misspelled_or_a_value_of_another_type_is_seen(made):
    for change in ({"readOnlyRootFilesytem": True}, {"readOnlyRootFilesystem": "yes"}):
        broken = copy.deepcopy(made)
        container(broken)["securityContext"].update(change)
        with pytest.raises(ValidationError):
            validate(broken, VERSIONS[-1], strict=True)


def test_the_pod_runs_without_root_token_capabilities_or_a_writable_root(made):
    image = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    pods = [
        made["spec"]["template"]["spec"],
        list(yaml.safe_load_all((FOLDER / "project.yaml").read_text("utf-8")))[1]["spec"],
    ]
    for pod in pods:
        assert pod["automountServiceAccountToken"] is False
        (one,) = pod["containers"]
        assert one["securityContext"]["allowPrivilegeEscalation"] is False
        assert one["securityContext"]["readOnlyRootFilesystem"] is True
        assert one["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert f"--uid {pod['securityContext']['runAsUser']} " in image
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC", "serviceAccountName"} & pod.keys()
        kinds = {kind for volume in pod["volumes"] for kind in volume.keys() - {"name"}}
        assert kinds == {"persistentVolumeClaim", "emptyDir"}
        assert {"requests", "limits"} <= one["resources"].keys()


def test_the_job_asks_for_a_gpu_and_both_share_one_volume(made):
    claim, _ = volume_and_pod()
    claims = [volume["persistentVolumeClaim"] for volume in pod_of(made)["volumes"] if "emptyDir" not in volume]
    assert claims == [{"claimName": claim["metadata"]["name"]}]
    assert claim["metadata"]["namespace"] == made["metadata"]["namespace"]
    assert container(made)["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_secrets_come_by_reference_alone(made):
    variables = container(made)["env"]
    values = {variable["name"]: variable["value"] for variable in variables if "value" in variable}
    assert values.keys() == {QUOTED, "XDG_CACHE_HOME", "HF_HOME", *VARIABLES}
    assert {v["name"] for v in variables if "value" not in v} == {
        "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "HF_TOKEN",
    }  # fmt: skip
    assert all(v["valueFrom"].keys() == {"secretKeyRef"} for v in variables if "value" not in v)


def test_image_and_version_are_those_of_the_project():
    _, pod = volume_and_pod()
    assert pod["spec"]["containers"][0]["image"].endswith(f"/dp-lora:{__version__}")


@pytest.mark.parametrize("entry", STAGES)
def test_the_container_s_command_is_the_entry_point_s_command_line(entry, monkeypatch):
    parameters = {name: value for name, value in PARAMETERS.items() if name in STAGES[entry].parameters}
    command = container(job(entry, parameters, VARIABLES, monkeypatch))["command"]
    monkeypatch.setenv(QUOTED, "1")
    assert as_typed(command) == typed(entry, parameters)
    assert command[:3] == ["python", "-m", f"entrypoints.{entry}"]


@pytest.mark.parametrize("word", ["", "a b", "it's", "'", "''", '"', "data.classes=[cat, dog]", "-5", "ä", "a'b c"])
def test_each_word_that_mlflow_quotes_comes_out_as_it_was_typed(word, monkeypatch):
    monkeypatch.setenv(QUOTED, "1")
    assert as_typed([shlex.quote(word)]) == [word]
    monkeypatch.setenv(QUOTED, "0")
    assert as_typed([shlex.quote(word)]) == [shlex.quote(word)]


def test_a_word_that_nobody_quoted_stays_as_it_is(monkeypatch):
    monkeypatch.setenv(QUOTED, "1")
    words = ["--eps", "5", "a b", "it's", "outputs/x y/z.yaml", "'a' 'b'"]
    assert as_typed(words) == words


def test_the_job_s_command_started_without_a_shell_resolves_what_was_typed(made):
    """Start it as the container would, but with this Python, and as a dry run."""
    one = container(made)
    values = {variable["name"]: variable["value"] for variable in one["env"] if "value" in variable}
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": "/nowhere", QUOTED: values[QUOTED]}
    command = [sys.executable, *one["command"][1:], "--dry-run"]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=250
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "eps: 5" in result.stdout
    assert "lr: 0.02" in result.stdout
