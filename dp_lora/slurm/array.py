"""Send many commands as one array of jobs, with a bound on how many run at once."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from dp_lora.files import private_folder, whole_file
from dp_lora.slurm.commands import submit
from dp_lora.slurm.script import array_script
from dp_lora.slurm.settings import Settings
from dp_lora.slurm.states import JOB_OF


def submit_array(
    settings: Settings,
    name: str,
    commands: Sequence[str],
    limit: int,
    folder: Path,
    after: Sequence[str] = (),
    *,
    comment: str,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Send an array of jobs for a run that work in the current folder; returns its id: task N is job ID_N.

    `commands` are lines of shell, all values in them quoted. The array begins when the jobs `after` have ended well,
    and is cancelled if one has not. Script and output lie in `folder`, the operator's own; others may read the
    `comment`, which is the run's id. `environment` is added to this process's own for the jobs. Raises InputError in
    Slurm's own words.
    """
    private_folder(folder)
    script = folder / "job.sh"
    with whole_file(script, private=True) as temporary:
        temporary.write_text(array_script(settings, name, commands, limit), encoding="utf-8")
    options = [f"--chdir={Path.cwd()}", f"--output={str(folder).replace('%', '%%')}/%a.log", "--export=ALL"]
    options.append(f"--comment={comment}")
    if after:
        options += [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"]
    return submit(script, *options, environment={**(environment or {}), JOB_OF: comment})
