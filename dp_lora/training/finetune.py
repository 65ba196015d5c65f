"""Private fine-tuning: DP-SGD on LoRA weights and class embedding (Tsai et al., arXiv 2406.01355, section 4).

Everything here is post-processing of `privacy.step.noisy_sum`, except the operator's own metrics under `private/`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dp_lora.config.schema import Config
from dp_lora.data.conditions import AnyCaptions
from dp_lora.data.persons import check_persons
from dp_lora.errors import InputError
from dp_lora.events import Events
from dp_lora.models.adapters import (
    Adapter,
    add_lora,
    drawn_of,
    untrained_class_embedding,
    use_checkpointing,
    with_embedding,
)
from dp_lora.models.device import full_precision
from dp_lora.models.folder import Model
from dp_lora.privacy.accounting import spent
from dp_lora.privacy.composition import ReleaseCost, base_parts, compose, together
from dp_lora.privacy.plan import PrivacyPlan, require_stated_number
from dp_lora.privacy.randomness import Randomness, read_secret
from dp_lora.privacy.rounding import dummies, require_small_rounding
from dp_lora.privacy.step import PrivateFacts, mean_gradient, noisy_sum
from dp_lora.privacy.sums import LossFactory
from dp_lora.privacy.sums import assist as assist_steps
from dp_lora.progress import progress
from dp_lora.release import write_result
from dp_lora.team import Team
from dp_lora.training.averaged import Averaged
from dp_lora.training.canaries import Canaries
from dp_lora.training.checkpoints import Keeper, load_checkpoint
from dp_lora.training.physical_batch import dummy_loss, physical_batch_size
from dp_lora.training.private_loss import diffusion_loss
from dp_lora.training.run_folder import RunFolder, binding_digest
from dp_lora.training.start import dead_weights, require_finite, require_its_process, require_rows_apart
from dp_lora.training.steps import curve_steps


@dataclass(frozen=True)
class PrivateData:
    """The private training split: latents (N, c, h, w) float32, labels (N,), each unit's pictures; for a pipeline,
    each picture's captions."""

    latents: np.ndarray
    labels: np.ndarray
    units: Sequence[Sequence[int]]
    captions: AnyCaptions | None = None
    canaries: Canaries | None = None  # of an audit, after the private pictures; weights trained with them are no result

    def with_canaries(self, canaries: Canaries) -> "PrivateData":
        """These pictures and units, and those of an audit's canaries."""
        return PrivateData(
            canaries.latents(self.latents),
            canaries.labels(self.labels),
            [*self.units, *canaries.units],
            canaries.captions(self.captions),
            canaries,
        )

    def trained(self, adapter: Adapter, config: Config, device: torch.device) -> dict[str, Tensor]:
        """The trained tensors: the adapter's parameters, and the tensor that an audit's canaries pull at."""
        own = {} if self.canaries is None else self.canaries.parameters(device)
        return adapter.parameters(config.lora.train) | own

    def loss_factory(self, config: Config, model: Model, device: torch.device) -> LossFactory:
        """Loss of the rows of these pictures."""
        loss = diffusion_loss(config, model, self.latents, self.labels, device, self.captions)
        return loss if self.canaries is None else self.canaries.loss_factory(loss)


def units_of(n_pictures: int, persons: Sequence[str] | None, unit: str) -> list[list[int]]:
    """Pictures of each unit of privacy: one each, or all of a person's.

    Raises InputError where there are no persons, one has no name, or two spellings.
    """
    if unit == "picture":
        return [[picture] for picture in range(n_pictures)]
    if persons is None:
        raise InputError("privacy.unit=person: the dataset has no person column; give one in metadata.csv")
    # whoever wrote the dataset: two spellings of one person would be two units
    check_persons(((f"picture {row}", person) for row, person in enumerate(persons)), "the training split")
    grouped: dict[str, list[int]] = {}
    for picture, person in enumerate(persons):
        grouped.setdefault(person, []).append(picture)
    return [grouped[person] for person in sorted(grouped)]


def make_adapter(config: Config, model: Model, device: torch.device) -> Adapter:
    """The adapter at its public start, seeded by experiment.seed.

    Raises InputError for a base with NaN or infinite weights, and for a pipeline of another process or with rows that
    depend on each other.
    """
    require_finite(config, model)
    generator = torch.Generator().manual_seed(config.experiment.seed)
    lora = add_lora(model.denoiser, config.lora, generator, model.family)
    dead, embedding = frozenset[str](), None
    if model.pipeline is not None:
        require_its_process(model)
        with full_precision():
            require_rows_apart(config, model, device)
            dead = dead_weights(config, model, device)
        if config.compute.checkpointing in ({"always"} if device.type == "cpu" else {"always", "auto"}):
            use_checkpointing(model.denoiser)
    if model.family.of_classes:
        train, classes = config.train, len(config.data.classes)
        start = untrained_class_embedding(
            model, train.embedding_start, classes, train.embedding_noise, config.experiment.seed
        )
        embedding = start.clone().to(device).requires_grad_()
    return Adapter(model.denoiser, lora, embedding, model.family, dead)


def finetune(
    config: Config,
    model: Model,
    base: Mapping[str, str],
    data: PrivateData,
    run: RunFolder,
    device: torch.device,
    events: Events,
    grid: Callable[[Model, Path], None],
    team: Team = Team(),  # noqa: B008 (frozen)
    audits: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Fine-tune `model` (changed in place) on private data and write run.result; begins or continues in `run`.

    `base` (`private_run.named_base`) and the records `audits` are named in the result. `grid` draws a sample grid of a
    model into a file; it sees released weights only. Steps that an earlier process took count: with fresh randomness a
    run that lost steps in a crash ends with fewer, never beyond its budget. The first rank of `team` calls this, the
    others `assist`. Returns the folder of the adapter.

    Guarantee: the returned folder, and the grids, are (plan.target_epsilon, plan.delta)-DP under add-or-remove-one unit
    where plan.guaranteed, composed with the earlier costs of the base and of privacy.parent.
    """
    parent = [ReleaseCost(**part) for part in run.bound["parent"]]
    # these refuse before any budget is spent
    made_up = 0 if data.canaries is None else len(data.canaries.units)
    require_stated_number(run.plan, len(data.units) - made_up)
    before = together(base_parts(model.info, lambda: base["digest"], run.plan), parent)
    epsilon_before, _ = compose([*before, ReleaseCost(0.0, run.plan.delta)])
    if run.result.exists():
        events.terminal(f"{run.folder.name}: this fine-tuning is finished; nothing is trained, nothing is spent")
        team.once(None)
        return run.result
    adapter = make_adapter(config, model, device)
    state = Averaged(config.train, data.trained(adapter, config, device), run.plan)
    _train(config, model, adapter, state, data, run, device, events, grid, team, epsilon_before)
    if data.canaries is not None:
        return run.folder
    with state.released():
        counted = run.ledger.counted_steps(run.plan)
        head = run.ledger.head(run.plan)
        write_result(run.result, run.plan, counted, run.run_id, head, config, adapter, before, base, audits)
    return run.result


def assist(config: Config, model: Model, data: PrivateData, device: torch.device, team: Team) -> None:
    """Work of every rank but the first in a fine-tuning: its share of each step's clipped sum, and nothing else."""
    parameters = data.trained(make_adapter(config, model, device), config, device)
    loss_factory = data.loss_factory(config, model, device)
    with full_precision():
        assist_steps(data.units, loss_factory, parameters, team)


def _train(
    config: Config,
    model: Model,
    adapter: Adapter,
    state: Averaged,
    data: PrivateData,
    run: RunFolder,
    device: torch.device,
    events: Events,
    grid: Callable[[Model, Path], None],
    team: Team,
    epsilon_before: float,
) -> None:
    plan = run.plan
    secret = read_secret(Path(config.privacy.seed_file)) if config.privacy.seed_file else None
    randomness = Randomness(binding_digest(run.bound), secret)
    if not randomness.fresh:
        events.message("reproducible mode: sampling and noise replay from the seed file; keep it secret")
    loss_factory = data.loss_factory(config, model, device)
    step, counted_then, counted = _go_on(state, run, device, events)
    physical = physical_batch_size(config, model, state.parameters, run, device, events, team.size)
    _check_rounding(config, model, plan, state.parameters, device, physical)
    bar = progress(total=plan.steps, initial=step, desc="private fine-tuning", unit="step")
    keeper = Keeper(run.checkpoints, state.tensors, step, counted_then)

    def draw() -> None:
        path = run.folder / "grids" / f"step-{step:06d}.png"
        with state.released():
            grid(with_embedding(model, adapter.embedding, drawn_of(config, model)), path)
        events.image(f"grids/{path.name}", path, private=not plan.guaranteed)

    with keeper.saving_when_stopped():
        # MLflow's chart page opens at step 0, and would show an empty card
        if step == 0 and config.train.grid_every:
            draw()
        while step < plan.steps and may_step(plan, counted, replay=not randomness.fresh):
            began = time.perf_counter()
            with full_precision():
                total, facts = noisy_sum(
                    plan, step, data.units, loss_factory, state.parameters, randomness, run.ledger, physical, team
                )
            if facts.physical_batch_size < physical:
                physical = facts.physical_batch_size
                events.terminal(f"out of memory: from here on {physical} rows at a time; no draw is lost or repeated")
                # before this step's sum moves a weight: where the new shape rounds too much, the sum is never released
                _check_rounding(config, model, plan, state.parameters, device, physical)
                if config.compute.physical_batch_size is None:
                    run.keep_physical_batch_size(physical)
            counted = run.ledger.counted_steps(plan)
            if data.canaries is not None:
                data.canaries.saw(total)
            with keeper.taking(step + 1, counted):
                state.step(mean_gradient(total, plan), step)
            step += 1
            drawn = config.train.grid_every and (step % config.train.grid_every == 0 or step == plan.steps)
            # a grid is drawn with averaged weights in the state's place: save the state before
            if step % config.train.checkpoint_every == 0 or step == plan.steps or drawn:
                keeper.save()
            _report(run, facts, counted, step, time.perf_counter() - began, events, epsilon_before)
            if drawn:
                draw()
            bar.update()
    bar.close()
    team.once(None)  # the others are done
    if step < plan.steps:
        events.message(
            f"stopped at step {step} of {plan.steps}: steps that were lost in a crash are counted, and one more would "
            f"pass eps={plan.target_epsilon:g}"
        )


def _go_on(state: Averaged, run: RunFolder, device: torch.device, events: Events) -> tuple[int, int, int]:
    """Load the newest checkpoint of `run` into `state`; its step, the ledger's count then, and the count now."""
    step = counted_then = 0
    if (checkpoint := load_checkpoint(run.checkpoints)) is not None:
        step, counted_then, tensors = checkpoint
        state.load({name: tensor.to(device) for name, tensor in tensors.items()})
    counted = run.ledger.counted_steps(run.plan)
    if counted_then > counted:
        raise InputError(
            f"{run.ledger.path}: holds {counted} steps, but {counted_then} were taken: the ledger is lost or was "
            "shortened; restore it, or start in another folder"
        )
    if counted:
        events.terminal(f"going on after step {step}; the ledger holds {counted} of {run.plan.steps} steps")
        if not run.heads.last().lines:
            events.terminal(
                "this place has not seen this ledger before (its folder comes from elsewhere, or was killed in its "
                "first step): only one copy of a folder may go on, the newest one"
            )
    return step, counted_then, counted


def _check_rounding(
    config: Config,
    model: Model,
    plan: PrivacyPlan,
    parameters: Mapping[str, Tensor],
    device: torch.device,
    rows: int,
) -> None:
    """InputError where kernels of this device round by more than the noise covers (`privacy.rounding`)."""
    with full_precision():
        loss = dummy_loss(config, model, dummies(plan, rows), device)
        require_small_rounding(plan, loss, parameters, rows)


def _report(
    run: RunFolder,
    facts: PrivateFacts,
    counted: int,
    step: int,
    seconds: float,
    events: Events,
    epsilon_before: float,
) -> None:
    events.metric("private/loss", facts.loss, step)
    events.metric("private/gradient_norm", facts.mean_norm, step)
    events.metric("private/clipped_share", facts.clipped_share, step)
    events.metric("private/physical_batch_size", facts.physical_batch_size, step)
    events.metric("private/units_per_second", facts.units / seconds, step)
    plan = run.plan
    if plan.guaranteed and step in curve_steps(plan.steps):
        events.metric("epsilon", epsilon_before + spent(plan, counted).epsilon, step)


def may_step(plan: PrivacyPlan, counted: int, *, replay: bool) -> bool:
    """True where one more of the plan's steps stays within it; `counted` steps stand in the ledger.

    A replay (the reproducible mode) may take all of them, however often: a step is the same release each time, since
    the ledger refuses another sum, and there are only plan.steps steps.

    Guarantee: at most plan.steps steps are ever counted, so epsilon never passes its target.
    """
    return not plan.private or replay or counted < plan.steps
