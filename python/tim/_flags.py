"""Types of configuration fields that the command line treats in a way of its own."""

from __future__ import annotations

from typing import Annotated

try:
    import tyro
except ImportError:  # benchmarks run where there is no command line to parse
    tyro = None


def comma_separated_ints(text: str) -> tuple[int, ...]:
    """(1, 2, 4) of "1,2,4"; ValueError for anything else."""
    try:
        return tuple(int(item) for item in text.split(","))
    except ValueError:
        raise ValueError(f"expected whole numbers with commas between them, got {text!r}") from None


if tyro is None:
    IntList, NameList, Hidden = tuple[int, ...], tuple[str, ...], str
else:
    #: A tuple of ints that is one word on the command line: `--steps 1,2,4`.
    IntList = Annotated[
        tuple[int, ...],
        tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="INT,INT,...",
            instance_from_str=lambda words: comma_separated_ints(words[0]),
            is_instance=lambda value: isinstance(value, tuple),
            str_from_instance=lambda value: [",".join(map(str, value))],
        ),
    ]
    #: The same of names: `--metrics fid,kid`. One empty word is no name.
    NameList = Annotated[
        tuple[str, ...],
        tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="NAME,NAME,...",
            instance_from_str=lambda words: tuple(name for name in words[0].split(",") if name),
            is_instance=lambda value: isinstance(value, tuple),
            str_from_instance=lambda value: [",".join(value)],
        ),
    ]
    #: A string that is no flag.
    Hidden = tyro.conf.Suppress[str]
