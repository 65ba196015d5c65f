"""Shared by all entry points: parameters, configuration, error lines, the tracked run and its folder."""

import math
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import click
from safetensors import SafetensorError

from dp_lora import tracking
from dp_lora.cli.changes import telling_changes
from dp_lora.cli.closed_folders import close_folders
from dp_lora.cli.pipelines import RUNS
from dp_lora.cli.quoted import as_typed
from dp_lora.cli.record import LEDGER, operator_folder, record
from dp_lora.config import (
    STAGES,
    Config,
    config_names,
    filed,
    flatten,
    load,
    read_resolved,
    relative,
    resolved_yaml,
    typed_command,
)
from dp_lora.config.words import did_you_mean
from dp_lora.errors import InputError, SaidError
from dp_lora.files import full_disk
from dp_lora.models.driver import driver_is_there, no_gpu
from dp_lora.statement import EPSILONS, privacy_tag
from dp_lora.tracking.provenance import override_text
from dp_lora.tracking.session import end_with_caller

HELP = {
    "config": "experiment: the name of a file in configs/",
    "eps": "target epsilon, above 0; inf: no privacy",
    "delta": "target delta, below 1 / data.n_public",
    "rank": "rank of the LoRA matrices",
    "k": "noise draws per picture, averaged before the one clip",
    "max_grad_norm": "bound on the norm of one unit's gradient",
    "batch_size": "rows per step; in private fine-tuning the expected number of units",
    "epochs": "passes over the data; in private fine-tuning epochs / sample_rate steps",
    "lr": "learning rate",
    "seed": "seed of everything public",
    "overrides": "section.key=value, blanks between",
    "adapter": "folder, or MLflow run id of a finetune run; empty: that of the experiment's stage",
    "samples": "folder, or MLflow run id of a sample run; empty: those of the experiment's stage",
}
INPUTS = ("adapter", "samples")
GOES_ON = "the same command goes on"


@dataclass(frozen=True)
class Call:
    """One call of an entry point, parsed and resolved."""

    stage: str
    config: Config
    out: Path | None  # where DVC expects the result; None: the run's own folder
    dry_run: bool
    part: str | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)
    typed: Mapping[str, str] = field(default_factory=dict)
    repeat: str = ""  # command that repeats this run; empty: derived from the config

    def of_adapter(self, statement: Mapping[str, Any], rank: int) -> "Call":
        """This call with the privacy and rank of its adapter in place of those in the config's file.

        The run's name, params and config.yaml then describe the adapter whose images are drawn or scored.
        """
        privacy = self.config.privacy
        # the released accounting states no target epsilon; a statement with neither is of training without privacy
        eps = statement.get("target_epsilon", privacy.eps if "accounting" in statement else math.inf)
        # the run's own target delta, not its sum with earlier releases
        delta = statement.get("target_delta", statement.get("delta", privacy.delta))
        names = ("k", "max_grad_norm", "clipping", "accounting")
        stated = {name: statement[name] for name in names if name in statement}
        config = replace(
            self.config,
            privacy=replace(privacy, eps=eps, delta=delta, **stated),
            lora=replace(self.config.lora, rank=rank),
        )
        return replace(self, config=config, repeat=repeat_command(self.stage, self.config, self.inputs))

    @property
    def child(self) -> bool:
        """Whether DVC started this stage: its run is then a child of the caller's run."""
        return self.out is not None

    @property
    def joined(self) -> bool:
        """Whether `mlflow run` made the run of this call."""
        return not self.child and tracking.joined_run_id() is not None

    @contextmanager
    def tracked(self, *, system_metrics: bool = False) -> Iterator[tuple[tracking.TrackedRun, Path]]:
        """The MLflow run of this call and the folder that its result goes to."""
        command = self.repeat or repeat_command(self.stage, self.config, self.inputs)
        with tracking.run(self.stage, self.config, self.child, system_metrics=system_metrics, command=command) as run:
            folder = self.out if self.out is not None else RUNS / run.run_id
            run.output(folder)
            close_folders(self.config)
            yield run, folder
            close_folders(self.config)
            for name, value in peak_memory().items():
                # private: memory of work on private pictures depends on their number, or on the number drawn
                run.metric(f"private/{name}" if STAGES[self.stage].reads_private else name, value)
            record(run, self.stage, self.config)

    def shown_out(self, name: str = "") -> str:
        """The result's place, as a dry run shows it: DVC's folder, or NAME in the run's own folder."""
        return relative(self.out) if self.out else f"runs/RUN_ID/{name}".rstrip("/")

    def print_dry_run(self, facts: Mapping[str, Any], writes: list[str]) -> None:
        """Print what the call would do and write, the MLflow run included, then its config; change nothing."""
        for name, value in facts.items():
            click.echo(f"{name}: {value}")
        click.echo(f"would write: {', '.join([*writes, f'a run in {tracking.shown_uri()}'])}")
        click.echo(f"# its config, resolved:\n{resolved_yaml(self.config)}", nl=False)


def peak_memory() -> dict[str, float]:
    """Peak memory in GiB of this process or of a child, whichever is larger; on a GPU also the peak of its tensors."""
    held = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    peaks = {"peak_memory_gib": max(held) / 2**20}
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        peaks["peak_gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return peaks


def track_privacy(
    run: tracking.TrackedRun, statement: Mapping[str, Any], config: Config, step: int | None = None
) -> None:
    """Log the adapter's privacy as metrics of this run, so that one chart can show scores against epsilon.

    `config` is the adapter's (`Call.of_adapter`); `step` is the last step that spent privacy.
    """
    for name in ("epsilon", *EPSILONS, "delta"):
        if name in statement:
            run.metric(name, statement[name], step)
    run.metric("rank", config.lora.rank)
    run.metric("k", config.privacy.k)
    if "max_grad_norm" in statement:  # nothing is clipped without privacy
        run.metric("max_grad_norm", statement["max_grad_norm"])
    run.tags({"privacy": privacy_tag(statement), "run_id_of_adapter": statement["run_id"]})
    run.privacy(statement)


def repeat_command(stage: str, config: Config, inputs: Mapping[str, str]) -> str:
    """The command that repeats this run alone, whoever started it; states the settings that differ from the file's."""
    plain = filed(config.experiment.name)
    changed = {key: override_text(value) for key, value in flatten(config).items() if value != plain[key]}
    given = {"config": config.experiment.name, **{name: value for name, value in inputs.items() if value}}
    for name, key in STAGES[stage].sets.items():
        if key in changed:
            given[name] = changed.pop(key)
    if changed:
        given["overrides"] = " ".join(f"{key}={text}" for key, text in changed.items())
    return typed_command(stage, given)


def entry_point(stage: str, parts: tuple[str, ...] = ()) -> Callable[[Callable[[Call], None]], click.Command]:
    """Make a click command of `stage` from a function of a Call, with the stage's parameters in STAGES."""

    def decorate(function: Callable[[Call], None]) -> click.Command:
        def command(dry_run: bool, resolved: Path | None, out: Path | None, **values: str) -> None:
            end_with_caller()
            with one_line_errors(child=out is not None):
                part = values.pop("part", None)
                inputs = {name: values.pop(name) for name in INPUTS if name in values}
                typed = {name: value for name, value in values.items() if value != ""}
                name = values.pop("config") or STAGES[stage].default_config
                overrides = values.pop("overrides", "")
                config = read_resolved(resolved) if resolved else load(name, values, overrides, stage=stage)
                if STAGES[stage].computes and not dry_run:
                    require_device(config)
                call = Call(stage, config, out, dry_run, part, inputs, typed)
                try:
                    with nullcontext() if dry_run or call.child else telling_changes():
                        function(call)
                except KeyboardInterrupt as error:
                    error.add_note(_how_to_go_on(call))
                    raise

        command.__doc__ = function.__doc__
        for option in reversed(_options(stage, parts)):
            command = option(command)
        settings = {"max_content_width": 120}
        return click.command(name=stage, cls=OneLineCommand, context_settings=settings)(command)

    return decorate


def _how_to_go_on(call: Call) -> str:
    """What to type after a stop. `mlflow run` again would begin a new working folder, so train.resume names the old."""
    run_id = tracking.joined_run_id()
    own = call.stage == "finetune" and call.joined and not call.config.privacy.reproducible
    if not own or run_id is None or not (operator_folder(run_id) / LEDGER).exists():
        return GOES_ON
    config = replace(call.config, train=replace(call.config.train, resume=run_id))
    return f"to go on, type: {repeat_command(call.stage, config, call.inputs)}"


class OneLineCommand(click.Command):
    """A command whose usage errors are one line too."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with _one_line_usage(self, ctx):
            return super().parse_args(ctx, as_typed(args))


class OneLineGroup(OneLineCommand, click.Group):
    """A group of commands whose usage errors are one line too."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        with _one_line_usage(self, ctx):
            if self.get_command(ctx, args[0]) is None:
                ctx.fail(f"no such command {args[0]!r}{did_you_mean(args[0], self.list_commands(ctx))}")
            return super().resolve_command(ctx, args)


@contextmanager
def _one_line_usage(command: click.Command, ctx: click.Context) -> Iterator[None]:
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        # for an unknown option use the bare message: click may guess a hidden option
        unknown = isinstance(error, click.NoSuchOption)
        line = " ".join((error.message if unknown else error.format_message()).split()).rstrip(".")
        if isinstance(error, click.NoSuchOption):
            shown = [name for option in command.params if not getattr(option, "hidden", False) for name in option.opts]
            line += did_you_mean(error.option_name, shown)
        listed = "commands" if isinstance(command, click.Group) else "options"
        click.echo(f"error: {line}; --help lists the {listed}", err=True)
        ctx.exit(2)


def require_device(config: Config) -> None:
    """Raise InputError for compute.device=cuda on a machine without a GPU, before a file is made or a run is opened."""
    if config.compute.device == "cuda":
        if not driver_is_there():
            raise InputError(no_gpu())
        from dp_lora.models.device import pick_device

        pick_device(config.compute.device)


def _begun_configs(_ctx: click.Context, _option: click.Parameter, begun: str) -> list[str]:
    return [name for name in config_names() if name.startswith(begun)]


def _options(stage: str, parts: tuple[str, ...]) -> list[Callable]:
    row = STAGES[stage]
    options = [
        click.option(
            f"--{name}",
            name,
            default=row.default_config if name == "config" else "",
            help=HELP[name],
            shell_complete=_begun_configs if name == "config" else None,
        )
        for name in row.parameters
    ]
    options.append(click.option("--dry-run", is_flag=True, help="print what would be done, touch nothing"))
    # DVC stages pass these two: the resolved config, and the result's folder
    options.append(click.option("--resolved", type=click.Path(path_type=Path), hidden=True))
    options.append(click.option("--out", type=click.Path(path_type=Path), hidden=True))
    if parts:
        options.append(click.option("--part", type=click.Choice(parts), hidden=True))
    return options


@contextmanager
def one_line_errors(child: bool = False) -> Iterator[None]:
    """Turn bad input, a full disk and Ctrl-C into one line and an exit status; mark the run that `mlflow run` made."""
    try:
        yield
    except SaidError as error:
        tracking.fail_joined_run(error.public, child)
        sys.exit(1)
    except InputError as error:
        _stop(str(error), 1, child, error.public)
    except OSError as error:
        # the name may be a private picture's: show it on the terminal alone; for a copy, filename2 is the target
        name = error.filename2 or error.filename
        where = f": {name}" if name else ""
        what_to_do = "; make room, then the same command goes on" if full_disk(error) else ""
        _stop(f"{error.strerror or error}{where}{what_to_do}", 1, child, error.strerror or type(error).__name__)
    except SafetensorError as error:
        # the file is damaged
        _stop(f"a file of tensors: {error}", 1, child, "a file of tensors cannot be read")
    except tracking.Paused as error:
        # the run waits: whoever sent the signal starts the same command again
        click.echo(f"error: stopped ({error}); it goes on in the same run", err=True)
        sys.exit(130)
    except KeyboardInterrupt as error:
        (how,) = getattr(error, "__notes__", [GOES_ON])[:1]
        _stop(f"stopped ({str(error) or 'Ctrl-C'}); {how}", 130, child)


def _stop(message: str, status: int, child: bool, public: str | None = None) -> NoReturn:
    tracking.fail_joined_run(" ".join((message if public is None else public).split()), child)
    click.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(status)
