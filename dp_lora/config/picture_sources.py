"""The sources of pictures, and what each of them has: the rules of the config and `prepare` read it here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """What a source has."""

    downloaded: bool = False  # `prepare` fills a folder below data/, which DVC tracks
    mirrored: bool = False  # its files may come from another address
    captions: bool = False
    persons: bool = False  # it says which pictures show one person
    own: bool = False  # the operator's own pictures, which the operator looks at on a contact sheet


PUBLIC_SOURCES = {
    "letters": Source(),
    "emnist": Source(downloaded=True, mirrored=True),
    "openmoji": Source(downloaded=True),
    "imagenet": Source(),
}
PRIVATE_SOURCES = {
    "mnist5k": Source(),
    "digits": Source(),
    "folder": Source(captions=True, persons=True, own=True),
    "mnist": Source(downloaded=True, mirrored=True),
    "huggingface": Source(downloaded=True, captions=True, own=True),
    "twemoji": Source(downloaded=True, captions=True, persons=True),
    "none": Source(),
}
