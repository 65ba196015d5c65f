"""The records that an entry point sends to its MLflow run while it works."""

import json
import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dp_lora.config import ROOT, STAGES, Config
from dp_lora.events import Events
from dp_lora.tracking import layout, records
from dp_lora.tracking.description import NOTE, Description, Upstream
from dp_lora.tracking.ending import recorded_error
from dp_lora.tracking.metrics import MetricBuffer, metric_key
from dp_lora.tracking.provenance import (
    dvc_hash,
    is_in_dvc,
    origin_tags,
    param_text,
)
from dp_lora.tracking.sender import Sender
from dp_lora.tracking.store import (
    first_line,
    is_at_home,
    tag_text,
    tracking_uri,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

VALUE_LENGTH = 6000  # of a param: MLflow's limit; config.yaml has the whole value
DIGEST_LENGTH = 36  # of a dataset: MLflow's limit


class TrackedRun(Events):
    """An entry point's run in MLflow.

    The caller marks as `private` each item that depends on private data without noise; a metric under `private/` is
    private by its name. The tag `private` lists the names of these items in the store before they are sent, so that a
    person who passes a run on knows what to leave out. All other items depend on private data through the mechanism
    alone. For a model without a guarantee (eps=inf, published accounting) all pictures, tables and files are private,
    and go to no tracking server: the model may have learnt single pictures by heart.
    """

    def __init__(self, client: "MlflowClient", opened: "Run", stage: str, config: Config):
        self.run_id: str = opened.info.run_id
        self.experiment_id: str = opened.info.experiment_id
        self._client = client
        self._sender = Sender(client, self.run_id, warn=super().message)
        self._known_params = dict(opened.data.params)
        self._known_tags = dict(opened.data.tags)
        self._parent: str | None = opened.data.tags.get("mlflow.parentRunId")
        self._description: Description | None = None
        self._lines: list[str] = []
        # names that an earlier process of this run marked private stay private
        self._private: set[str] = set(filter(None, self._known_tags.get("private", "").split(", ")))
        self._goes_on = "stage" in self._known_tags
        self._reads_private = STAGES[stage].reads_private
        self._guaranteed = not STAGES[stage].noisy or config.privacy.guaranteed
        self.output_folder: Path | None = None
        self._metrics = MetricBuffer(send=lambda batch: self._sender.send(records.metrics(batch)), warn=super().message)

    def _name_private(self, *names: str) -> None:
        if not self._private.issuperset(names):
            self._private.update(names)
            self.tags({"private": ", ".join(sorted(self._private))})

    def name_system_metrics(self) -> None:
        """Name `system/...` as private where the stage reads private data: memory and load depend on who takes part."""
        if self._reads_private:
            self._name_private("system")

    def _takes(self, name: str, private: bool) -> bool:
        """Whether a picture, table or file goes to the store; a private one is named first."""
        if not self._guaranteed and not is_at_home():
            self.terminal(f"{name}: has no guarantee of privacy, so it goes to no tracking server")
            return False
        if private or not self._guaranteed:
            self._name_private(name)
        return True

    def metric(self, name: str, value: float, step: int | None = None, *, private: bool = False) -> None:
        """Log a scalar."""
        if private or name.startswith("private/"):
            self._name_private(metric_key(name))
        self._metrics.add(name, value, step)

    def image(self, name: str, path: Path, *, private: bool = False) -> None:
        """Keep a picture file as the artifact `name`, with the file's suffix; `name` may hold folders.

        The chart page shows it beside other runs' pictures of that name. It shows pictures FOLDER/step-N as one, over
        steps; the tag `private` names them as FOLDER.
        """
        target = Path(name if Path(name).suffix == path.suffix else f"{name}{path.suffix}")
        found = re.fullmatch(r"(.+)/step-0*(\d+)", target.with_suffix("").as_posix())
        key, step = (found[1], int(found[2])) if found else (target.with_suffix("").as_posix(), 0)
        shown = layout.image_key(key)
        if not self._takes(key if found else target.as_posix(), private):
            return
        if private or not self._guaranteed:
            self._name_private(f"{layout.IMAGES}/{shown}")
        with tempfile.TemporaryDirectory() as made:
            shutil.copyfile(path, Path(made) / target.name)
            parent = None if target.parent == Path() else target.parent.as_posix()
            self._keep(Path(made) / target.name, parent)
            layout.write_images(path, shown, step, Path(made) / layout.IMAGES)
            self._keep(Path(made) / layout.IMAGES)
        self.tags(layout.image_tags())

    def artifact(self, path: Path, folder: str | None = None, *, private: bool = False) -> None:
        """Keep a file in `folder`, or a folder and its content, under its own name."""
        name = path.name if path.is_dir() or folder is None else f"{folder}/{path.name}"
        if self._takes(name, private):
            self._keep(path, folder)

    def _keep(self, path: Path, folder: str | None = None) -> None:
        self._sender.send(records.artifact(path, path.name if path.is_dir() else folder))

    def json(self, value: Any, name: str) -> None:
        """Keep a JSON-able value that depends on nothing private as the artifact `name`.json."""
        self.text(json.dumps(value, indent=2), f"{name}.json")

    def text(self, text: str, file: str) -> None:
        """Keep a text that depends on nothing private as the artifact `file`, which may lie in folders."""
        with tempfile.TemporaryDirectory() as made:
            path = Path(made) / Path(file).name
            path.write_text(text, encoding="utf-8")
            self._keep(path, None if Path(file).parent == Path() else Path(file).parent.as_posix())

    def message(self, text: str) -> None:
        """Print a line, without anything private; all lines become the artifact messages.txt when the run ends."""
        super().message(text)
        self._lines.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")

    def tags(self, values: Mapping[str, Any], *, private: bool = False) -> None:
        """Set tags; None leaves one out."""
        texts = {key: tag_text(value) for key, value in values.items() if value is not None}
        if private:
            self._name_private(*texts)
        self._sender.send(records.tags(texts))
        self._known_tags |= texts

    def params(self, values: Mapping[str, Any], *, private: bool = False) -> None:
        """Log params; a key that the run has already keeps its first value, as MLflow demands."""
        texts = {key: param_text(value) for key, value in values.items() if key not in self._known_params}
        if private:
            self._name_private(*texts)
        self._sender.send(records.params({key: text[:VALUE_LENGTH] for key, text in texts.items()}))
        self._known_params |= texts

    def dataset(
        self, name: str, source: Path | str, digest: str | None = None, context: str = "training", private: bool = False
    ) -> None:
        """Record an input: a file or folder, or the URI of one elsewhere.

        `digest` is ours (64 hex digits; None: MLflow makes one from name and source). An input in data/ or outputs/
        also gets its DVC hash, and a folder the origin in its source.json. A `private` input (pictures, and adapters or
        samples without a guarantee) is recorded by name, place and origin alone: with a hash, anybody could test
        whether a candidate is the right one.
        """
        if private:
            digest = None
            self._name_private(name)
        from mlflow.data.dataset_source_registry import resolve_dataset_source
        from mlflow.data.meta_dataset import MetaDataset
        from mlflow.entities import DatasetInput, InputTag

        local = isinstance(source, Path) or "://" not in source
        if local:
            source = os.path.abspath(source)
        with warnings.catch_warnings():
            # MLflow registers its local source twice and warns of it
            warnings.simplefilter("ignore", UserWarning)
            resolved = resolve_dataset_source(source)
        data = MetaDataset(resolved, name=name, digest=digest[:DIGEST_LENGTH] if digest else None)  # type: ignore[abstract]
        tags = {"mlflow.data.context": context, "private": tag_text(private)}
        if digest is not None:
            tags["digest"] = digest
        if local and not private and is_in_dvc(Path(source)):
            tags["dvc"] = dvc_hash(Path(source))
        if local:
            tags |= origin_tags(Path(source), private=private)
        inputs = [InputTag(key, value) for key, value in tags.items()]
        self._sender.send(records.dataset(DatasetInput(data._to_mlflow_entity(), inputs)))

    def table(self, columns: Mapping[str, Sequence[Any]], name: str, *, private: bool = False) -> None:
        """Keep columns of equal length as the table `name`.json, which the UI shows as a table."""
        if not self._takes(f"{name}.json", private):
            return
        self.text(layout.table_text(columns), f"{name}.json")
        self.tags(layout.table_tags(self._known_tags, f"{name}.json"))

    def describe(self, description: Description) -> None:
        """Show a description above the run; a description that the user gave stays."""
        if NOTE not in self._known_tags or self._goes_on:
            self._description = description
            self._show_description()

    def _show_description(self) -> None:
        if self._description is not None:
            self.tags({NOTE: self._description.markdown()})

    def privacy(self, statement: Mapping[str, Any]) -> None:
        """Show a privacy.json in the run's description; after a statement without a guarantee all files are private."""
        self._guaranteed = self._guaranteed and statement["private"]
        if self._description is not None:
            self._description.privacy = statement
            self._show_description()

    def made_from(self, what: str, *, nest: bool = False, **tags: str) -> None:
        """Link the newest finished run with these tags as the `what` that this run was made from; none found: no link.

        While a tracking server is away nothing is linked, and a line says so.

        With `nest` a run that has no parent becomes a child of the linked run's parent, or of the linked run.
        """
        conditions = [f"tags.`{key}` = '{value}'" for key, value in tags.items() if "'" not in value]
        if len(conditions) < len(tags):
            return
        condition = " and ".join(["attributes.status = 'FINISHED'", *conditions])
        order = ["attributes.end_time DESC"]
        runs = self._sender.ask(
            lambda: self._client.search_runs([self.experiment_id], condition, max_results=1, order_by=order)
        )
        if not runs:
            return
        found = runs[0]
        self.tags({f"made_from.{what.replace(' ', '_')}": found.info.run_id})
        if self._description is not None:
            name = found.info.run_name or found.info.run_id
            self._description.upstream.append(Upstream(what, found.info.run_id, self.experiment_id, name))
            self._show_description()
        if nest and self._parent is None:
            self._parent = found.data.tags.get("mlflow.parentRunId", found.info.run_id)
            self.tags({"mlflow.parentRunId": self._parent})

    def output(self, folder: Path) -> None:
        """Name the folder that this run writes, so that its run id can stand for it (`resolve_input`)."""
        self.output_folder = absolute = Path(os.path.abspath(folder))
        self.tags({"output": absolute.relative_to(ROOT) if absolute.is_relative_to(ROOT) else absolute})

    def register(self, config: Config, release: Path, base: Path) -> None:
        """Register a release as a model of the experiment; where the store cannot, one line says why.

        Never raises: the fine-tuning is finished and its privacy spent, and must not be lost to a failing registry.
        """
        from dp_lora.tracking.registry import register

        try:
            version, alias = register(self._client, self.experiment_id, self.run_id, config, release, base)
        except Exception as error:
            self.message(f"not registered as a model ({first_line(error)}); the release is not touched by that")
            return
        self.tags({"model": f"models:/{version.name}/{version.version}"})
        if self._description is not None:
            self._description.model = (version.name, str(version.version))
            self._show_description()
        self.message(f"registered: models:/{version.name}@{alias}, version {version.version}")

    def environment(self) -> dict[str, str]:
        """Environment variables under which another process of ours becomes a child of this run."""
        return {
            "MLFLOW_TRACKING_URI": tracking_uri(),
            "MLFLOW_EXPERIMENT_ID": self.experiment_id,
            "MLFLOW_RUN_ID": self.run_id,
        }

    def keep_working(self) -> None:
        """From here on the work goes on while a tracking server is away: records wait on disk."""
        self._sender.keep_working()

    def is_server_away(self) -> bool:
        """Whether the run's tracking server is away at this moment."""
        return self._sender.is_away()

    def close(self, status: str, error: BaseException | None = None) -> None:
        """Send what waits and end the run as `status` (FINISHED, FAILED, KILLED), or leave it SCHEDULED to go on later.

        A line says which records stay on disk.
        """
        try:
            self._metrics.close()
            if self._lines:
                self.text("\n".join(self._lines) + "\n", "messages.txt")
            if error is not None:
                self.tags({"error": recorded_error(error, self._reads_private)})
        finally:
            self._sender.send(records.pause() if status == "SCHEDULED" else records.end(status))
            self._sender.close()
