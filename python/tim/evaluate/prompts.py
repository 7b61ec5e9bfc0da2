"""Prompts in files."""

from __future__ import annotations

import json
from pathlib import Path

from tim.data.sources import captions_in


def read_prompts(path: str | Path) -> list[str]:
    """The prompts in a file: .txt, one a line; .jsonl, a record a line; .json, a list or a mapping
    of records. A record is a text, or has an entry prompt, caption or text.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no prompts, or something else (the line is named).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"prompts: {path} does not exist")
    if path.suffix not in (".txt", ".json", ".jsonl"):
        raise ValueError(f"prompts must be a .txt, .json or .jsonl file, got {path}")
    text = read_text(path)
    if path.suffix == ".txt":
        prompts = [line.strip() for line in text.splitlines() if line.strip()]
    else:
        prompts = []
        for where, record in records(path, text):
            try:
                prompts.append(captions_in(record)[0])
            except (ValueError, IndexError):
                raise ValueError(
                    f"{where} must be a text or have an entry prompt or caption, "
                    f"got {json.dumps(record):.60}"
                ) from None
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return prompts


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file: {error}") from None


def records(path: Path, text: str) -> list[tuple[str, object]]:
    """Place (for messages) and value of each record of a .json or .jsonl file."""
    try:
        if path.suffix == ".json":
            values = json.loads(text)
            if isinstance(values, dict):
                return [(f"{path}: {name}", value) for name, value in values.items()]
            if isinstance(values, list):
                return [(f"{path}: record {i}", value) for i, value in enumerate(values)]
            raise ValueError("neither a list nor a mapping")
        lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
        return [(f"{path}:{n}", json.loads(line)) for n, line in lines]
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as {path.suffix[1:]}: {error}") from None
