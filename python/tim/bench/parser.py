"""The command lines of `tim bench`, which run with torch and numpy alone: argparse."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import NoReturn

import torch


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as the other commands do."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def device(self, name: str | None) -> torch.device:
        """The device of `--device NAME`: a GPU where there is one when it is not given."""
        there = torch.cuda.is_available()
        if name == "cuda" and not there:
            self.error("--device cuda: PyTorch finds no CUDA device on this machine")
        return torch.device(name or ("cuda" if there else "cpu"))


def count(text: str) -> int:
    """A number of things, at least one."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    """Such numbers with commas between them."""
    values = text.split(",")
    if not all(value.isdecimal() and int(value) for value in values):
        raise argparse.ArgumentTypeError(f"must be positive numbers, got {text!r}")
    return tuple(map(int, values))


def seconds(text: str) -> float:
    """A length of time."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text!r}")
    return value


def result_file(text: str) -> Path:
    """A file that can be written when the measurements are done: its folder is there."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file, got the folder {text!r}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be in a folder that exists, got {text!r}")
    return path
