"""Refuse bad input that a listing or a small file shows, before torch is imported and DVC is started.

A stage would refuse it minutes later; the typed command refuses it at once, and so does a dry run.
"""

from pathlib import Path

from dp_lora.cli.adapters import adapter_folder, find_adapter
from dp_lora.cli.common import Call, relative
from dp_lora.cli.pipelines import base_to_read, is_made_here, pipeline_of, require_base
from dp_lora.config import Config
from dp_lora.config.prompts import drawn_prompts
from dp_lora.config.rules import check_classes, check_shape, check_text
from dp_lora.errors import InputError
from dp_lora.events import Events
from dp_lora.files import read_json
from dp_lora.models.info import load_info
from dp_lora.models.pipeline_index import family_of, is_pipeline
from dp_lora.models.text_encoder import text_encoder_folder


def refuse(call: Call) -> None:
    """Raise InputError for pictures, a base or an adapter that `call` cannot work with.

    Does nothing in a stage that DVC started: the command that started DVC has made the same checks.
    """
    config = call.config
    if call.child:
        return
    if call.stage in ("main", "prepare", "finetune", "fid"):
        _refuse_pictures(config, opened=call.stage in ("main", "prepare"))
    if call.stage in ("main", "finetune"):
        _refuse_base(call, made_anew=call.stage == "main")
        if config.privacy.parent is not None:
            find_adapter(config.privacy.parent, "privacy.parent")
    if call.stage == "count_params" and not is_made_here(config):
        # the config's own networks, which count where no base is there yet, say nothing about a base from elsewhere
        base_to_read(config, dry_run=call.dry_run)
    if call.stage in ("sample", "export"):
        if call.inputs.get("adapter") or not call.dry_run:
            adapter_folder(call)
        else:
            require_base(config)


def _learns_classes(base: Path) -> bool:
    return not is_pipeline(base) or family_of(base).of_classes


def _refuse_pictures(config: Config, *, opened: bool) -> None:
    """Raise InputError if `prepare` would refuse the listing of the operator's folder, or, `opened`, a header in it."""
    data = config.data
    if data.source != "folder" or data.path is None:
        return
    from dp_lora.data.folder import list_pictures, look_over
    from dp_lora.data.metadata_table import Stated

    listing = list_pictures(Path(data.path), Stated.of(config))
    if opened:  # before letters are drawn, and before pictures that were prepared earlier are removed
        look_over(Path(data.path), listing, data.size, Events())


def _refuse_base(call: Call, *, made_anew: bool) -> None:
    """InputError for a base of other size or channels; `made_anew`: do not read a base that the pipeline makes."""
    config = call.config
    # a base that is not there has no family: a later check would blame what the user typed for another one
    base = base_to_read(config, dry_run=call.dry_run)
    own = (made_anew or not base.exists()) and relative(base) in pipeline_of(config).made
    encoder = config.ldm.text_encoder if own else None
    of_classes = encoder is None and _learns_classes(base)
    if of_classes:
        check_classes(config.data)
    if encoder is not None:
        text_encoder_folder(encoder)
    if not of_classes:
        check_text(config)
        drawn_prompts(config)
        return
    if is_pipeline(base):
        info = load_info(base)
        check_shape(config.data, info["size"], info["channels"])
        return
    public, path = config.public, base / "model.json"
    try:
        stated = (public.size, public.channels) if own else tuple(read_json(path)[key] for key in ("size", "channels"))
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path}: cannot be read; {relative(base)} must be a model folder") from None
    check_shape(config.data, *stated)
