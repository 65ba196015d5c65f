"""Undo the shell quoting of command-line words that no shell reads."""

import os
import shlex
from collections.abc import Sequence

QUOTED = "DPLORA_QUOTED_WORDS"  # set by docker/kubernetes/job.yaml


def as_typed(words: Sequence[str]) -> list[str]:
    """`words` as a shell would pass them on if QUOTED is set; otherwise unchanged.

    MLflow's Kubernetes backend quotes each word, and the cluster starts the command without a shell: an empty parameter
    would arrive as two quotes. A word that is not the shell quoting of another word stays unchanged.
    """
    return [_unquoted(word) for word in words] if os.environ.get(QUOTED) == "1" else list(words)


def _unquoted(word: str) -> str:
    try:
        inside = shlex.split(word)
    except ValueError:
        return word
    return inside[0] if len(inside) == 1 and shlex.quote(inside[0]) == word else word
