"""Words of a command line that were quoted for a shell which does not read them."""

import os
import shlex
from collections.abc import Sequence

QUOTED = "DPLORA_QUOTED_WORDS"  # set by docker/kubernetes/job.yaml


def as_typed(words: Sequence[str]) -> list[str]:
    """`words` as a shell would hand them over, where QUOTED is set; else as they are.

    MLflow's Kubernetes backend quotes each word, and the cluster starts the command without a shell: an empty parameter
    would arrive as two quotes. A word that is no shell's quoting of another one stays as it is.
    """
    return [_unquoted(word) for word in words] if os.environ.get(QUOTED) == "1" else list(words)


def _unquoted(word: str) -> str:
    try:
        inside = shlex.split(word)
    except ValueError:
        return word
    return inside[0] if len(inside) == 1 and shlex.quote(inside[0]) == word else word
