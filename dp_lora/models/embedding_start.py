"""The start of a fine-tuning's fresh class embedding: the base's classes, by their names."""

from collections.abc import Sequence

from dp_lora.errors import InputError

EMBEDDING_STARTS = ("mean", "zero")


def start_positions(start: str, base_classes: Sequence[str], n_classes: int) -> list[int] | None:
    """Positions in `base_classes` of the classes that `start` (train.embedding_start) names; None for mean and zero.

    Raises InputError where these are not n_classes classes of the base.
    """
    if start in EMBEDDING_STARTS:
        return None
    names = [name.strip() for name in start.split(",")]
    unknown = [name for name in names if name not in base_classes]
    if unknown or len(names) != n_classes:
        wrong = f"{unknown[0]!r} is no class of the base" if unknown else f"{len(names)} names, {n_classes} classes"
        raise InputError(
            f"train.embedding_start={start}: {wrong}; must be {', '.join(EMBEDDING_STARTS)}, or a class of the "
            "base for each of data.classes, commas between"
        )
    return [list(base_classes).index(name) for name in names]
