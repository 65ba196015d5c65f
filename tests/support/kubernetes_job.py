"""The job of docker/kubernetes as MLflow's own functions fill it in, from MLproject to the definition that it sends."""

import json
import shlex
from collections.abc import Mapping
from typing import Any

from mlflow.projects import _parse_kubernetes_config
from mlflow.projects.kubernetes import _get_kubernetes_job_definition, _get_run_command
from mlflow.projects.utils import get_entry_point_command, load_project

from dp_lora.config import ROOT

FOLDER = ROOT / "docker" / "kubernetes"
DIGEST = f"sha256:{'0' * 64}"


def job(entry: str, parameters: Mapping[str, str], variables: Mapping[str, str], monkeypatch: Any) -> dict[str, Any]:
    """The definition for one call of an entry point, made at the project's root; `variables` are MLflow's own."""
    monkeypatch.chdir(ROOT)  # backend.json names the template relative to the root, where users call
    monkeypatch.delenv("KUBE_MLFLOW_TRACKING_URI", raising=False)
    config = _parse_kubernetes_config(json.loads((FOLDER / "backend.json").read_text(encoding="utf-8")))
    project = load_project(str(ROOT))
    command = _get_run_command(get_entry_point_command(project, entry, dict(parameters), None))
    image = f"{config['repository-uri']}:abcdef0"
    template = config["kube-job-template"]
    return _get_kubernetes_job_definition(project.name, image, DIGEST, command, dict(variables), template)


def container(definition: Mapping[str, Any]) -> dict[str, Any]:
    """The definition's one container."""
    (found,) = definition["spec"]["template"]["spec"]["containers"]
    return found


def typed(entry: str, parameters: Mapping[str, str]) -> list[str]:
    """The words into which a shell splits the entry point's command line in MLproject."""
    project = load_project(str(ROOT))
    (line,) = get_entry_point_command(project, entry, dict(parameters), None)
    return shlex.split(line)


def docker_arguments(definition: Mapping[str, Any], project: str) -> list[str]:
    """Arguments that confine a Docker container as the job confines its pod; they mount `project` as its volume."""
    spec, one = definition["spec"]["template"]["spec"], container(definition)
    user, own = spec["securityContext"], one["securityContext"]
    mounts = {mount["name"]: mount["mountPath"] for mount in one["volumeMounts"]}
    scratch = [volume["name"] for volume in spec["volumes"] if "emptyDir" in volume]
    values = {variable["name"]: variable["value"] for variable in one["env"] if "value" in variable}
    # Docker's own seccomp profile is the runtime's default
    return [
        *("--user", f"{user['runAsUser']}:{user['runAsGroup']}"),
        *(("--read-only",) if own["readOnlyRootFilesystem"] else ()),
        *(("--security-opt", "no-new-privileges") if not own["allowPrivilegeEscalation"] else ()),
        *(word for name in own["capabilities"]["drop"] for word in ("--cap-drop", name)),
        *(word for name in scratch for word in ("--tmpfs", f"{mounts[name]}:mode=1777,exec")),
        *("--volume", f"{project}:{mounts['project']}", "--workdir", one["workingDir"]),
        *(word for name, value in values.items() for word in ("--env", f"{name}={value}")),
    ]
