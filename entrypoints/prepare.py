"""Make the datasets of an experiment in the project's one layout."""

from pathlib import Path

from dp_lora.tracking import TrackedRun
from entrypoints.common import Call, entry_point, relative
from entrypoints.pipeline import dvc, write_params
from entrypoints.pipelines import pipeline_of, private_data, public_data


@entry_point("prepare", parts=("public", "private"))
def main(call: Call) -> None:
    """Prepare the public letters and the private pictures (outputs/letters/data, outputs/EXPERIMENT/data)."""
    if call.dry_run:
        call.print_dry_run({}, [relative(public_data(call.config)), relative(private_data(call.config))])
        return
    from dp_lora.data.prepare import prepare_private, prepare_public

    with call.tracked() as (run, folder):
        if call.out is None:
            write_params(pipeline_of(call.config), {"config": call.config.experiment.name, **call.typed})
            dvc("repro", "prepare_public", "prepare", environment=run.environment())
            return
        if call.part == "public":
            prepare_public(call.config, folder, run)
            _track(run, folder, "letters", list(call.config.public.classes), private=False)
        else:
            prepare_private(call.config, folder, run)
            _track(run, folder, call.config.experiment.name, list(call.config.data.classes), private=True)


def _track(run: TrackedRun, folder: Path, name: str, classes: list[str], *, private: bool) -> None:
    from dp_lora.data.layout import read_dataset

    data = read_dataset(folder, classes, "train")
    run.dataset(name, folder, data.digest(), context="prepared", private=private)


if __name__ == "__main__":
    main()
