"""CLIP score (Hessel et al. 2021, arXiv 2104.08718): how well samples fit their public prompts."""

from pathlib import Path
from typing import Any

import torch

from dp_lora.data.layout import Dataset
from dp_lora.errors import InputError, line
from dp_lora.models.quiet import quiet_libraries
from dp_lora.progress import progress

BATCH_SIZE = 32


def load_clip(folder: Path, shown: str, device: torch.device) -> tuple[Any, Any]:
    """CLIPModel and CLIPProcessor of a local folder, from safetensors alone; nothing is downloaded.

    Raises InputError, one line that begins with `shown`, for a folder that holds no such model.
    """
    from transformers import CLIPModel, CLIPProcessor

    if not folder.is_dir():
        raise InputError(f"{shown}: no such folder; name one with transformers' CLIPModel and CLIPProcessor, or null")
    try:
        with quiet_libraries():
            model: Any = CLIPModel.from_pretrained(str(folder), use_safetensors=True, local_files_only=True)
            processor = CLIPProcessor.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
        raise InputError(f"{shown}: is no CLIPModel and CLIPProcessor in safetensors ({line(error)})") from None
    return model.eval().requires_grad_(False).to(device), processor


@torch.inference_mode()
def clip_score(samples: Dataset, model: Any, processor: Any) -> float:
    """100 times the mean cosine of each sample's embedding and its prompt's, which is `samples.classes[label]`.

    A prompt that is longer than the model takes is cut.
    """
    total, longest = 0.0, model.config.text_config.max_position_embeddings
    for start in progress(range(0, len(samples), BATCH_SIZE), desc="CLIP score", leave=False):
        labels = samples.labels[start : start + BATCH_SIZE]
        given = processor(
            text=[samples.classes[label] for label in labels],
            images=list(samples.images(slice(start, start + BATCH_SIZE))),
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=longest,
        )
        found = model(**given.to(model.device))
        # the model's own embeddings, of length 1
        total += float((found.image_embeds * found.text_embeds).sum(dim=1).double().sum())
    return 100 * total / len(samples)
