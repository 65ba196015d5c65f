"""What a finished study=smoke has left, however it was run: its members' results, its runs, its report."""

import json
from pathlib import Path

from mlflow import MlflowClient

from tests.support.tracking_store import all_runs

TARGETS = {"smoke: eps=10 seed=0": 10.0, "smoke: eps=5 k=2 seed=0": 5.0, "smoke: eps=inf seed=0": None}
STAGES = ["finetune", "sample", "fid"]
AUDITS = {"smoke: eps=10 seed=0": ["audit-eps1"], "smoke: eps=5 k=2 seed=0": ["audit-eps1", "audit-eps1-published"]}
CSV = ("members", "summary", "bounds", "costs", "published")
REPORT = {"report.html", "report.md", *(f"{name}.csv" for name in CSV)}


def member_records(project: Path, study: str = "smoke") -> list[dict]:
    """The records of a study's members that have one."""
    return [json.loads(path.read_text()) for path in (project / "runs/studies" / study).glob("*/member.json")]


def finetunings(project: Path, study: str = "smoke") -> set[str]:
    """The runs of the fine-tunings that are finished."""
    records = member_records(project, study)
    return {record["runs"]["finetune"] for record in records if "finetune" in record["seconds"]}


def assert_smoke_is_done(project: Path, client: MlflowClient) -> None:
    """Check that one call finished it: each member once below one run, with its epsilon and audits, and the report."""
    runs = [found for found in all_runs(client) if "stage" in found.data.tags]
    assert not [found for found in runs if found.info.status == "RUNNING"]
    ended = {found.info.run_id: found for found in runs if found.info.status == "FINISHED"}
    (whole,) = [run_id for run_id, found in ended.items() if found.data.tags["stage"] == "study"]
    members = {run_id: found.data.tags for run_id, found in ended.items() if found.data.tags["stage"] == "main"}
    assert sorted(tags["mlflow.runName"] for tags in members.values()) == sorted(TARGETS)
    assert {tags["mlflow.parentRunId"] for tags in members.values()} == {whole}

    records = member_records(project)
    assert len(records) == len(TARGETS)
    for record in records:
        name = members[ended[record["runs"]["fid"]].data.tags["mlflow.parentRunId"]]["mlflow.runName"]
        assert {*record["seconds"]} == {*record["runs"]} == {*AUDITS.get(name, []), *STAGES}, name
        for stage, run_id in record["runs"].items():
            assert ended[run_id].data.tags["stage"] == stage.split("-")[0]
        epsilon, target = ended[record["runs"]["finetune"]].data.metrics.get("epsilon"), TARGETS[name]
        assert epsilon is None if target is None else 0.9 * target < epsilon <= target, name

    assert {Path(file.path).name for file in client.list_artifacts(whole, "report")} == REPORT
    folder = project / "runs/studies/smoke/report"
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert [record["runs"] for record in records if f"/runs/{record['runs']['fid']}?" not in page] == []
    lines = (folder / "bounds.csv").read_text(encoding="utf-8").splitlines()
    published = [line for line in lines if line.startswith("published,2,") and not line.endswith(",not audited")]
    assert len(published) == 1, lines
