"""The command `tim`: one table of sub-commands, each imported when it is called.

Exit codes: 0; 1 when a run had to stop; 2 for a mistake in flags, files or configuration, told in
one line on stderr (TIM_TRACEBACK=1 shows where it came from); 130 for Ctrl-C.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

#: Name: (module with `main(arguments) -> int | None`, one line of help).
COMMANDS = {
    "train": ("tim.commands.train", "train a model from a preset, or resume a run"),
    "sample": (
        "tim.commands.sample",
        "draw a grid of samples from a run, a row for each step count",
    ),
    "evaluate": ("tim.commands.evaluate", "quality of a run's samples against the number of steps"),
    "obeyed": ("tim.commands.obeyed", "whether a text model draws what prompts ask for"),
    "prompts": (
        "tim.commands.prompts",
        "sample the prompts of GenEval, DPG-Bench or MJHQ-30K for their scorers",
    ),
    "export": ("tim.commands.export", "weights of a run as one safetensors file"),
    "encode": ("tim.encode", "latents of a folder of images, with an autoencoder of diffusers"),
    "dataset": ("tim.commands.dataset", "a small captioned set of pictures, from a package"),
    "bench": ("tim.bench", "times of the operations and of the training step, against PyTorch"),
    "info": ("tim.info", "versions, devices and which operations run on kernels"),
}


class UsageError(ValueError):
    """A command line that cannot be understood."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line (sys.argv without one) and exit with its code."""
    sys.exit(run(sys.argv[1:] if arguments is None else list(arguments)))


def run(arguments: list[str]) -> int:
    """Run the command line and return its exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name == "--version":
        import tim

        print(tim.__version__)
        return 0
    try:
        if name not in COMMANDS:
            raise UsageError(f"no command {name!r}; there are {', '.join(COMMANDS)}")
        command: Callable[[list[str]], int | None] = importlib.import_module(COMMANDS[name][0]).main
        return command(rest) or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has seen enough; without this, Python complains again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get("TIM_TRACEBACK"):
            raise
        text = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{error.filename}: {error.strerror}"
        text = " ".join(text.split()) or type(error).__name__
        tell(f"tim {name}: {text}" if name in COMMANDS else f"tim: {text}", error)
        return 2


def tell(text: str, error: Exception | None = None) -> None:
    """A line on stderr. Of several ranks, only the first says what all of them know."""
    rank = int(os.environ.get("RANK", "0"))
    known = error is None or isinstance(error, UsageError) or getattr(error, "on_all_ranks", False)
    if rank == 0 or not known:
        print(text if rank == 0 else f"rank {rank}: {text}", file=sys.stderr)


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: tim COMMAND ...",
            "",
            "Transition Models: image generators for any number of steps (arXiv 2509.04394).",
            "",
            *lines,
            "",
            "`tim COMMAND --help` tells the flags of one.",
        ]
    )


def parse(cls: type[T] | Callable[..., T], prog: str, arguments: list[str], **options: object) -> T:
    """Flags to a dataclass, by tyro. Raises UsageError with one line instead of tyro's box."""
    import tyro

    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(cls, prog=prog, args=arguments, **options)  # type: ignore
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UsageError(f"{_one_line(box.getvalue())} (see {prog} --help)") from None


def _one_line(box: str) -> str:
    """The message inside a box of tyro's: no headline, no help texts, only suggestions of flags.

    The box is drawn with lines where stdout is UTF-8, and with blanks and dashes elsewhere.
    """
    lines = [re.sub(r"^(│| ) |\s*│?$", "", line) for line in box.splitlines()]
    sections = re.split(r"^ ?[─-]{5,}$|^[╭╰].*$", "\n".join(lines), flags=re.MULTILINE)
    message, *notes = [text.strip("\n") for text in sections if text.strip()][box[0] != "╭" :]
    parts = [message, *(n for n in notes if n.startswith(("Perhaps", "Arguments similar")))]
    # Help texts of options are set in by eight blanks.
    line = " ".join(re.sub(r"\n {8}.*", "", ". ".join(parts)).split())
    # Of an optional value, tyro prints the whole type in front of the reason.
    return re.sub(r"no type matching .* Got errors: - .*\]: ", "", line)
