"""`mlflow run . -b slurm` on a real cluster of one node, as `make test-slurm` starts it."""

import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


def test_finetune_sample_and_fid_run_as_jobs_and_finish(site):
    done = site.run("finetune")
    run = site.last()
    assert done.returncode == 0, done.stderr[-3000:] + site.log(run.info.run_id)[-3000:]
    assert run.info.status == "FINISHED"
    assert run.data.tags["slurm.state"] == "COMPLETED"
