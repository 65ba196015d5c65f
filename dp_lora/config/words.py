"""User input: splits overrides, and suggests names for a misspelt one."""

import difflib
import re
from collections.abc import Iterable

# a blank inside brackets, braces or quotes ends no override; an unclosed bracket or quote is a plain letter
OVERRIDE = re.compile(r"""(?:\[[^\[\]]*\]|\{[^{}]*\}|"(?:\\.|[^"\\])*"|'[^']*'|\S)+""")
MOST = 3  # most guesses
# names in the training scripts of diffusers, and the key that a user of them looks for; docs/bases.md has the table
OTHER_NAMES = {
    "pretrained_model_name_or_path": "model.base",
    "train_data_dir": "data.path",
    "instance_data_dir": "data.path",
    "caption_column": "data.caption_column",
    "instance_prompt": "data.prompt",
    "resolution": "data.size",
    "rank": "lora.rank",
    "lora_layers": "lora.targets",
    "train_batch_size": "compute.physical_batch_size",
    "gradient_checkpointing": "compute.checkpointing",
    "mixed_precision": "compute.precision",
    "num_train_epochs": "privacy.epochs",
    "max_grad_norm": "privacy.max_grad_norm",
    "learning_rate": "train.lr",
    "validation_prompt": "sampling.prompts",
}
# names there that need no key here, and why
NO_KEY = {
    "center_crop": "the centre square is always cut out",
    "random_flip": "pictures are never flipped",
    "repeats": "a repeated picture would change the weight of its unit of privacy",
    "max_train_samples": "all pictures of data.path take part",
    "max_train_steps": "privacy.epochs gives the steps",
    "gradient_accumulation_steps": "rows are summed over as many micro-batches as a step needs",
}


def split_overrides(text: str) -> list[str]:
    """The overrides of a text with blanks between: `data.classes=[cat, dog] data.path="my pictures"` are two."""
    return OVERRIDE.findall(text)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean A or B?` where names of `known` are like `word`, the likeliest first; else nothing.

    A name of diffusers' scripts, whatever section or dashes it has, is answered by its key, or why none is needed.
    """
    other = word.lstrip("-").rpartition(".")[2]
    if other in OTHER_NAMES:
        return f"; did you mean {OTHER_NAMES[other]}?"
    if other in NO_KEY:
        return f"; no key is needed: {NO_KEY[other]}"
    close = difflib.get_close_matches(word, list(known), MOST)
    return f"; did you mean {' or '.join(close)}?" if close else ""
