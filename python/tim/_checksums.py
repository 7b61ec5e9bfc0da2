"""SHA-256 sums of the files of a directory, in the format of `sha256sum`.

    SHA256SUMS          one line a file: digest, two blanks, path below the directory

`sha256sum -c SHA256SUMS` in the directory checks them too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

SUMS = "SHA256SUMS"
_CHUNK = 1 << 20


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    found = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            found.update(buffer[:count])
    return found.hexdigest()


def write_sums(folder: Path, digests: Mapping[str, str]) -> None:
    """Write `folder`/SHA256SUMS for the files `digests` names, by their paths below `folder`."""
    lines = [f"{value}  {name}\n" for name, value in sorted(digests.items())]
    (folder / SUMS).write_text("".join(lines))


def read_sums(folder: Path) -> dict[str, str] | None:
    """The sums in `folder`, None where none were written.

    Raises ValueError when the file of the sums is damaged itself.
    """
    try:
        text = (folder / SUMS).read_text()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise ValueError(f"{folder / SUMS} is damaged: it is no text") from None
    sums = {}
    for line in text.splitlines():
        value, _, name = line.partition("  ")
        if len(value) != 64 or not name:
            raise ValueError(f"{folder / SUMS} is damaged: a line reads {line!r}")
        sums[name] = value
    return sums


def problem_with(folder: Path, sums: Mapping[str, str], names: Iterable[str]) -> str | None:
    """What is wrong with the first damaged file of `names`, None when all are as they were."""
    for name in names:
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if digest(path) != sums[name]:
            return f"{path} is damaged: its checksum is not the one in {SUMS}"
    return None
