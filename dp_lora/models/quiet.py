"""Silence the libraries that models come from: no bar, no line below the level of an error."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside, transformers and diffusers show errors alone.

    `encode_prompt` warns with the cut-off end of a caption in full, and a caption is private. Loading draws a bar for
    each part, and warns of a text encoder that is not CLIP's.
    """
    import diffusers
    import transformers

    logs = (transformers.utils.logging, diffusers.utils.logging)
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    try:
        for log in logs:
            log.set_verbosity_error()
            log.disable_progress_bar()
        yield
    finally:
        for log, (verbosity, bars) in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()
