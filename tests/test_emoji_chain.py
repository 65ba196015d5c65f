"""config=emoji through the command line and DVC, from made-up packages to scores."""

import os

import pytest

from dp_lora.config import ROOT
from dp_lora.files import read_json
from dp_lora.statement import read_privacy
from tests.support.prepare_call import clone
from tests.support.tiny_emoji import little, write_packages, write_text_encoder
from tests.support.tiny_project import run


@pytest.mark.slow
def test_two_commands_lead_from_packages_to_a_private_release_and_scores_by_caption(tmp_path):
    project = clone(ROOT, tmp_path / "project")
    settings = little(write_text_encoder(tmp_path / "bert"))
    path = os.pathsep.join([str(project), str(write_packages(tmp_path / "packages"))])
    for command in ("prepare", "main"):
        done = run(project, "dp_lora", command, "--config", "emoji", "--overrides", settings, PYTHONPATH=path)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    made = project / "outputs/emoji"
    assert (made / "ldm/model_index.json").exists()
    assert 0 < read_privacy(made / "finetune/release")["epsilon"] <= 10
    assert {"private_style", "private_style_base", "letter_frechet_distance"} <= set(
        read_json(made / "evaluation/metrics.json")
    )
    assert "letter_frechet_distance" in done.stdout
