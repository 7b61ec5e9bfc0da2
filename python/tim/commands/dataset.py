"""`tim dataset NAME --out DIR`"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from tim.cli import parse


@dataclass(frozen=True)
class DatasetCommand:
    """Make a folder of pictures with captions from a package, for text-to-image training:
    tim train PRESET --data.kind folder --data.path DIR --data.captions DIR/captions.jsonl

    digits: scikit-learn's scanned digits, with captions in words, some of them held out. emoji: the
    pictures of npm's emoji-datasource-google (or -twitter), with their names."""

    name: tyro.conf.Positional[Literal["digits", "emoji"]]
    """Which set."""
    out: Path
    """Folder for pictures and captions."""
    package: Path | None = None
    """The unpacked package (emoji)."""
    categories: tuple[str, ...] = ()
    """Only these, such as "Food & Drink" (emoji); by default all."""
    variants: bool = False
    """Also the skin tones (emoji)."""


def main(arguments: list[str]) -> int:
    command = parse(DatasetCommand, "tim dataset", arguments, config=(tyro.conf.DisallowNone,))
    if command.out.exists() and not command.out.is_dir():
        raise ValueError(f"out must be a folder, got the file {command.out}")
    if command.out.is_dir() and any(command.out.iterdir()):
        raise FileExistsError(f"out must be a new or empty folder, got {command.out}")

    from tim.data.captioned_sets import LISTING, write_digits, write_emoji

    if command.name == "digits":
        if command.package or command.categories or command.variants:
            raise ValueError("package, categories and variants are for emoji, not for digits")
        count = write_digits(command.out)
    else:
        if command.package is None:
            raise ValueError(
                "package is missing: where is npm's emoji-datasource-google unpacked? "
                "(npm pack emoji-datasource-google, tar xf)"
            )
        count = write_emoji(command.out, command.package, command.categories, command.variants)
    print(f"{count} pictures with captions")
    print(command.out / LISTING)
    return 0
