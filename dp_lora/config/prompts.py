"""Public prompts: a text-to-image base draws them, and they describe private pictures without captions."""

from pathlib import Path

from dp_lora.config.paths import ROOT
from dp_lora.config.schema import Config
from dp_lora.errors import InputError

SEPARATOR = "|"


def class_prompts(config: Config) -> list[str]:
    """What a text-to-image base draws for each of data.classes, in order: data.prompts; empty where there are none."""
    return [prompt.strip() for prompt in config.data.prompts or []]


def drawn_prompts(config: Config) -> list[str]:
    """The distinct prompts of grids and samples: sampling.prompts, else the public data.prompts.

    sampling.prompts is a text file with a prompt a line, or the prompts themselves with | between. Raises InputError
    where there is none: no private caption is ever a prompt, since its picture would depend on it without noise.
    """
    given = config.sampling.prompts
    if given is None:
        found = class_prompts(config) or ([config.data.prompt] if config.data.prompt else [])
    elif (path := ROOT / given).is_file():
        try:
            found = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            raise InputError(f"sampling.prompts={given}: cannot be read as text in UTF-8") from None
    elif Path(given).suffix == ".txt":
        raise InputError(f"sampling.prompts={given}: no such file; name one with a prompt a line")
    else:
        found = given.split(SEPARATOR)
    prompts = list(dict.fromkeys(prompt for line in found if (prompt := line.strip())))
    if not prompts:
        raise InputError(
            "sampling.prompts: none; a text-to-image base draws from public prompts: name a file with a prompt a line, "
            f"or write them with {SEPARATOR} between"
        )
    return prompts
